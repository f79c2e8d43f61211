"""What is shown while a benchmark runs, and its plots."""

import re
import xml.etree.ElementTree as ET

import pytest
from results import job, record, result, wrong

from fastprompt.bench.plots import write_plots
from fastprompt.bench.table import live_table

RECORDS = [
    record(ours=1.6e-3, rivals={"concat": 3.2e-3, "merge (ours)": 1e-3, "peft": 1.92e-3}),
    wrong("attention/bad"),
    record("packing/x", ours=2e-4, flops=0, wrong={"concat": 0.5}),
    job(),
]
LINES = [
    "attention/small: ours 1.60 ms [1.58, 1.62], best rival peft 1.20x [1.19, 1.21], 225 of 240 GFLOP/s",
    "attention/bad: ours wrong: error 1e-02",
    "packing/x: ours 200 us [198, 202], concat wrong: error 5e-01",
    "end-to-end/retrieval: ours 200 ms [198, 202], best rival peft 2.00x [1.96, 2.04]",
]


def test_off_a_terminal_a_line_each_at_once(capsys):
    with live_table(["attention"]) as show:
        for about, line in zip(RECORDS, LINES, strict=True):
            show(about)
            assert capsys.readouterr().out == f"{line}\n"


@pytest.mark.parametrize("size", [(160, 50), (70, 8)], ids=["wide", "small"])
def test_on_a_terminal_in_the_end_the_whole_table(size, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name, value in zip(("COLUMNS", "LINES"), size, strict=True):
        monkeypatch.setenv(name, str(value))
    records = [record(f"attention/{number}", ours=number * 1e-3) for number in range(1, 30)] + RECORDS
    with pytest.raises(KeyboardInterrupt), live_table(["attention", "packing"]) as show:
        for about in records:
            show(about)
        raise KeyboardInterrupt
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "\x1b", capsys.readouterr().out)
    last = shown[shown.rindex("attention, packing") :]
    assert [last.count(f"attention/{number} ") for number in range(1, 30)] == [1] * 29
    assert "peft 1.20x" in last and "[1.19," in last and "wrong: error" in last


def texts(path):
    return " ".join(element.text or "" for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text"))


def test_plots_of_what_there_is(tmp_path):
    sweep = [
        record(f"attention/{n}", 1e-6 * n**2, sizes={"B": 8, "L": n}, sweep="L", rivals={"peft": 1e-6 * n**3})
        for n in (16, 32, 64)
    ]
    for one in sweep:
        one["ways"]["ours"]["peak_bytes"] = 2**20 * one["sizes"]["L"]
    about = result(
        *sweep, wrong("attention/bad"), record("packing/x", flops=0, rivals={"concat": 1.0}), wrong("step/x"), job()
    )
    paths = write_plots(about, tmp_path / "new")
    names = ["attention-rivals.svg", "attention-rate.svg", "packing-rivals.svg", "growth-attention-L-B8.svg"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    rivals, rate, packing, growth = map(texts, paths)
    assert "peft" in rivals and "FLOPs that any way must do" in rivals
    assert "% of the matrix rate" in rate
    assert "concat" in packing and "bytes that any way must move" in packing
    assert "ours: 2.00 [2.00]" in growth and "peft: 3.00 [3.00]" in growth and "ours: 1.00 [1.00]" in growth


def test_the_same_result_gives_the_same_plot(tmp_path):
    about = result(record("packing/x", flops=0, rivals={"concat": 1.0}))
    (one,), (two,) = write_plots(about, tmp_path / "one"), write_plots(about, tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()


def test_no_plots_of_nothing(tmp_path):
    assert write_plots(result(wrong(), job()), tmp_path) == []
