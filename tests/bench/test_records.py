import json
import math

import pytest
from results import job, record, result, wrong

from fastprompt.bench.records import best_rival, over_ours, read, rivals, seconds, useful_flops, write
from fastprompt.bench.timing import Interval


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "bench.json"
    about = result(record(rivals={"concat": 3e-3, "merge (ours)": 1e-3}), job())
    write(path, about)
    assert read(path) == about | {"cases": [about["cases"][0], about["cases"][1] | {"wrong": {}}]}
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_not_a_number_is_null_in_the_file_and_nan_again(tmp_path):
    path = tmp_path / "bench.json"
    write(path, result(wrong(error=math.nan), record("attention/b", wrong={"concat": math.inf, "flex": 0.25})))

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    strict = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert [each["wrong"] for each in strict["cases"]] == [{"ours": None}, {"concat": None, "flex": 0.25}]
    first, second = read(path)["cases"]
    assert math.isnan(first["wrong"]["ours"])
    assert math.isnan(second["wrong"]["concat"]) and second["wrong"]["flex"] == 0.25


def test_a_time_that_was_not_reached_stays_null(tmp_path):
    write(tmp_path / "bench.json", result(job()))
    (found,) = read(tmp_path / "bench.json")["cases"]
    assert found["ways"]["peft"]["seconds_to"] == {"R@1 0.40": None}


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.json: must be the JSON file of a benchmark"):
        read(tmp_path / "nothing.json")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff"])
def test_no_json(tmp_path, text):
    (tmp_path / "bench.json").write_bytes(text)
    with pytest.raises(ValueError, match="bench.json: must be JSON"):
        read(tmp_path / "bench.json")


@pytest.mark.parametrize(("text", "got"), [('{"format": 2}', "2"), ("{}", "None"), ("[1]", "'list'")])
def test_another_format(tmp_path, text, got):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(ValueError, match=f"with format 1, got {got}"):
        read(tmp_path / "bench.json")


def test_rivals_are_neither_ours_nor_wrong():
    found = record(ours=2e-3, rivals={"slow": 6e-3, "merge (ours)": 1e-3, "fast": 3e-3}, wrong={"bad": 0.5})
    assert {way: over.median for way, over in rivals(found).items()} == pytest.approx({"slow": 3, "fast": 1.5})
    assert best_rival(found) == "fast"
    assert best_rival(wrong()) is None and rivals(wrong()) == {}
    assert seconds(wrong(), "ours") is None


def test_over_ours_as_it_was_taken_else_between_the_extremes():
    found = record(ours=2e-3, rivals={"concat": 3e-3})
    found["ways"]["concat"]["over_ours"] = {"median": 1.4, "low": 1.3, "high": 1.6}
    assert over_ours(found, "concat") == (1.4, 1.3, 1.6)
    assert over_ours(job(0.2, 0.4), "peft") == pytest.approx(Interval(2, 2 * 0.99 / 1.01, 2 * 1.01 / 0.99))
    assert over_ours(found, "flex") is None


def test_useful_flops():
    assert useful_flops(record(ours=2e-3, flops=36 * 10**7)) == pytest.approx(180e9)
    assert useful_flops(record(flops=0)) is None and useful_flops(wrong()) is None and useful_flops(job()) is None
