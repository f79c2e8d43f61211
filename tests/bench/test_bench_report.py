import math
import random
import statistics

import pytest
from results import interval, job, record, result, wrong

from fastprompt.bench.report import markdown


def rows(text, *start):
    """Cells of the rows of all tables, without Markdown's escapes; of those whose first cell is in `start`."""
    found = [[cell.strip() for cell in row.replace("\\", "").strip("|").split("|")] for row in text.splitlines()]
    return [cells for cells in found if len(cells) > 1 and cells[0] in start]


def table(text, first):
    """column -> cell of the case named `first`."""
    ((head, cells),) = zip(rows(text, "case"), rows(text, first), strict=True)
    return dict(zip(head, cells, strict=True))


def test_a_case():
    found = record(ours=2e-3, rivals={"merge (ours)": 1.2e-3, "concat": 3.2e-3}, wrong={"peft": 0.3})
    found["ways"]["ours"]["peak_bytes"], found["ways"]["concat"]["peak_bytes"] = 3 * 2**20, 2**19
    assert table(markdown(result(found)), "small") == {
        "case": "small",
        "ours": "2.00 ms [1.98, 2.02]",
        "of the floor": "75 %",
        "GFLOP/s": "180",
        "of the matrix rate": "75 %",
        "concat": "1.60 [1.58, 1.62]",
        "peft": "wrong: error 3e-01",
        "merge (ours)": "0.600 [0.594, 0.606]",
        "peak memory": "ours 3.00 MiB, concat 0.500 MiB",
    }


def test_on_a_gpu_also_launch_and_graph():
    found = record(ours=2e-4)
    found["ways"]["ours"] |= {"launch_seconds": 25e-6, "graph_seconds": interval(15e-5, 0.1)}
    cells = table(markdown(result(found, device="cuda")), "small")
    assert (cells["ours"], cells["launch"]) == ("200 us [198, 202]", "25.0 us")
    assert cells["in a graph"] == "150 us [135, 165]"
    found["ways"]["ours"]["graph"] = "reads a number back"
    del found["ways"]["ours"]["graph_seconds"]
    assert table(markdown(result(found)), "small")["in a graph"] == "reads a number back"


def test_columns_without_anything_are_left_out():
    cells = table(markdown(result(record("packing/small", flops=0))), "small")
    assert list(cells) == ["case", "ours", "of the floor"]


@pytest.mark.parametrize(("error", "text"), [(1e-2, "1e-02"), (math.nan, "nan")])
def test_a_wrong_case_has_no_time(error, text):
    report = markdown(result(wrong("attention/bad", error), record(rivals={"concat": 3e-3})))
    assert rows(report, "bad")[0][1:] == [f"wrong: error {text}"] + ["–"] * 4
    assert f"- attention/bad: ours wrong: error {text}" in report


def test_summary_is_of_rivals_alone():
    factors = [(random.uniform(0.5, 4), random.uniform(0.5, 4)) for _ in range(5)]
    records = [
        record(f"attention/{n}", 1e-3, rivals={"concat": 1e-3 * a, "peft": 1e-3 * b, "merge (ours)": 1e-6})
        for n, (a, b) in enumerate(factors)
    ]
    report = markdown(result(*records, record("packing/x", rivals={"concat": 1.0})))

    def line(name, values):
        mean = statistics.geometric_mean(values)
        least, most = min(values), max(values)
        texts = (f"{value:#.3g}" for value in (mean, least, most))
        return "- {} over ours: geometric mean {}, least {}, most {}, of 5 cases".format(name, *texts)

    assert line("best rival", list(map(min, factors))) in report
    assert line("concat", [a for a, _ in factors]) in report
    assert line("peft", [b for _, b in factors]) in report
    assert "merge (ours) over ours" not in report


def test_every_loss_is_told():
    lost = record("attention/lost", 2e-3, rivals={"concat": 1.6e-3, "peft": 3e-3, "merge (ours)": 1e-3})
    close = record("attention/close", 2e-3, 0.05, rivals={"peft": 1.96e-3})
    report = markdown(result(lost, close))
    section = report.split("## Where a rival is faster")[1].replace("\\", "")
    assert section.strip().splitlines() == [
        "- attention/lost: concat takes 0.800 [0.792, 0.808] of our time, 1.60 ms [1.58, 1.62] against "
        "2.00 ms [1.98, 2.02]",
        "- attention/close: peft takes 0.980 [0.931, 1.03] of our time, 1.96 ms [1.86, 2.06] against "
        "2.00 ms [1.90, 2.10], which may be noise",
    ]
    assert rows(report, "lost")[0].count("**0.800 [0.792, 0.808]**") == 1
    assert "**3.00" not in report.replace("\\", "") and "**0.500" not in report


def test_no_loss_is_told_too():
    assert "Nowhere, of 1 case with a rival." in markdown(result(record(rivals={"concat": 3e-3}), wrong("attention/b")))


def test_missing_rivals():
    why = {"flex": "no backward on the CPU"}
    records = [record("attention/a", missing=why), record("attention/b", missing=why | {"peft": "no P"})]
    report = markdown(result(*records, record("packing/c")))
    assert "- flex, attention: no backward on the CPU\n- peft, attention/b: no P" in report
    assert "Missing" not in markdown(result(record()))


def test_growth():
    records = [
        record(f"attention/{n}", 1e-6 * n**2, sizes={"B": 8, "L": n}, sweep="L", rivals={"peft": 1e-6 * n**3})
        for n in (16, 32, 64)
    ]
    for one in records:
        one["ways"]["ours"]["peak_bytes"] = 100 * one["sizes"]["L"]
    report = markdown(result(*records))
    assert rows(report, "attention B8, ours") == [["attention B8, ours", "L 16 to 64", "2.00 [2.00]", "1.00 [1.00]"]]
    assert rows(report, "attention B8, peft") == [["attention B8, peft", "L 16 to 64", "3.00 [3.00]", "–"]]
    assert "Growth" not in markdown(result(record()))


def test_heading_tells_where_and_how():
    text = markdown(result(record())).replace("\\", "")
    assert text.startswith("# Benchmark on Some CPU, 2 cores, AVX2\n\n- 2 threads, float32, on cpu\n")
    assert "180 GFLOP/s; copy: 12.3 GB/s" in text
    assert "fastprompt 0.1.0, torch 2.10.0, peft 0.20.0\n" in text
    assert "before load 1.5, 2400 to 2500 MHz; after load 2.5\n" in text


def test_whole_trainings():
    report = markdown(result(job(0.2, 0.4)))
    ours, peft = rows(report, "retrieval, ours", "retrieval, peft")
    assert ours[1:] == [
        "200 ms [198, 202]", "–", "800", "10.0", "50.0", "R@1 0.40: 12.5 s", "1024 MiB", "before 0.100, after 0.500"
    ]  # fmt: skip
    assert peft[1:3] == ["400 ms [396, 404]", "2.00 [1.96, 2.04]"] and peft[6] == "R@1 0.40: –"
    assert "peft over ours: geometric mean 2.00" in report
    assert "end-to-end/retrieval: peft takes 0.500" in markdown(result(job(0.4, 0.2)))


def test_a_wrong_training():
    report = markdown(result(job() | {"ways": {}, "wrong": {"ours": 0.02}}))
    assert rows(report, "retrieval, ours")[0][1] == "wrong: error 2e-02"
