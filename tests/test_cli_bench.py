"""fastprompt bench: what it writes, what it compares, and one clear line for what is wrong."""

import json

import pytest
from typer.testing import CliRunner

from fastprompt import cli
from fastprompt.bench import records, run

CASE = "pooling/mean-sentences-384"


def bench(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    result = bench(CASE, "--quick", "--budget", 0, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def changed(out, name, factor):
    """A copy of the result in which ours took `factor` times as long, and no time has any noise."""
    result = records.read(out / "bench.json")
    for way, about in result["cases"][0]["ways"].items():
        median = about["seconds"]["median"] * (factor if way == "ours" else 1)
        about["seconds"] = dict.fromkeys(("median", "low", "high"), median)
    path = out / name
    records.write(path, result)
    return path


def test_writes_what_it_measured(measured):
    out, printed = measured
    result = records.read(out / "bench.json")
    assert [record["name"] for record in result["cases"]] == [CASE]
    assert result["settings"] == {"groups": [CASE], "quick": True, "budget": 0}
    assert result["machine"]["device"] == "cpu" and result["machine"]["threads"] >= 1
    assert set(result["state"]) == {"before", "after"}
    assert "mean-sentences-384" in (out / "bench.md").read_text()
    assert (out / "pooling-rivals.svg").is_file()
    for name in (CASE, "bench.json", "bench.md", "pooling-rivals.svg"):
        assert name in printed


def test_nothing_tells_of_host_or_user(measured):
    import getpass
    import platform

    text = (measured[0] / "bench.json").read_text()
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_compare(measured):
    out, _ = measured
    file = out / "bench.json"
    assert bench("--compare", file, file).exit_code == 0
    exact, worse = changed(out, "exact.json", 1.0), changed(out, "worse.json", 1.1)
    found = bench("--compare", exact, worse)
    assert found.exit_code == 2 and "slower" in found.output
    found = bench("--compare", worse, exact)
    assert found.exit_code == 0 and "faster: 1" in found.output


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    """Though a later case dies."""
    measure = run.measure

    def dies_later(case, *arguments, **options):
        if "first" in case.name:
            raise KeyboardInterrupt
        return measure(case, *arguments, **options)

    monkeypatch.setattr(run, "measure", dies_later)
    bench(CASE, "pooling/first-sentences-384", "--budget", 0, "--out", tmp_path)
    assert [record["name"] for record in json.loads((tmp_path / "bench.json").read_text())["cases"]] == [CASE]


def test_wrong_numbers_fail(tmp_path, monkeypatch):
    record = {"name": CASE, "group": "pooling", "sizes": {}, "sweep": None, "flops": 0, "bytes": 0, "missing": {}}
    monkeypatch.setattr(run, "measure", lambda *_, **__: record | {"wrong": {"ours": 0.5}, "ways": {}})
    found = bench(CASE, "--out", tmp_path)
    assert found.exit_code == 1 and f"numbers are wrong in {CASE}" in found.output
    assert (tmp_path / "bench.md").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["unknown"], "names must be of"),
        (["end-to-end"], "models and parallel must be given"),
        (["--device", "none"], "device must be one that is here"),
        (["--compare", "none.json", "none.json"], "none.json: must be"),
    ],
)
def test_one_clear_line(arguments, message, tmp_path):
    found = bench(*arguments, "--out", tmp_path)
    assert found.exit_code == 1
    assert message in found.output and "Traceback" not in found.output
