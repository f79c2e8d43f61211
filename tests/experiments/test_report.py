import copy
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from fastprompt.experiments.aggregate import (
    AHEAD,
    BEHIND,
    UNJUDGED,
    WITHIN,
    Spread,
    block_means,
    by_task,
    compare,
    gradient_spread,
    loss_variance,
    spread,
)
from fastprompt.experiments.comparisons import compare_methods, compare_variants, sentences
from fastprompt.experiments.plots import _look
from fastprompt.experiments.records import read_results
from fastprompt.experiments.report import write_report

STUDY = {
    "study": "scarcity",
    "title": "A small study",
    "config": {"model": "tiny", "note": "``` <b>"},
    "versions": {"torch": "2.10"},
    "machine": {"cores": 2},
}


def run(method="prefix", examples=64, seed=0, f1=(20.0, 10.0), **fields):
    """A run of "xquad" with F1 `f1` in English and German, and half of it as exact match."""
    scores = {
        language: {"exact_match": value / 2, "f1": value} for language, value in zip(("en", "de"), f1, strict=True)
    }
    return {
        "task": "xquad",
        "method": method,
        "examples": examples,
        "seed": seed,
        "variant": "",
        "scores": scores,
        "source": "en",
        "validation": 21.3,
        "seconds": 60.0 + seed,
        "steps": 8,
        "trained_parameters": 147456,
        "peak_memory_mb": 1100.2,
        "losses": [5.0, 4.0, 3.0, 2.0, 1.0, 2.0, 1.0, 3.0],
        "gradient_norms": [1.0, 2.0, 3.0],
    } | fields


def write(folder, runs, end="\n", **study):
    (folder / "study.json").write_text(json.dumps(STUDY | study), encoding="utf-8")
    lines = [run if isinstance(run, str) else json.dumps(run) for run in runs]
    (folder / "results.jsonl").write_text("\n".join(lines) + (end if lines else ""), encoding="utf-8")
    return folder


def report(folder, runs, **study):
    html, markdown = write_report(write(folder, runs, **study))
    assert (html.name, markdown.name) == ("report.html", "report.md")
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def rows(markdown, caption):
    """The rows, header first, of the table whose caption begins with `caption`."""
    block = re.search(rf"^{re.escape(caption)}[^\n]*\n\n((?:\|.*\n)+)", markdown, re.MULTILINE)
    lines = [line.strip("| ").split(" | ") for line in block[1].splitlines()]
    return [lines[0], *lines[2:]]


def results(folder, runs):
    (task,) = by_task(read_results(write(folder, runs))[1])
    return task


FIVE = [  # mean over languages: prefix 10, 12, 14 with 64 and 30 with 128; prefix+alignment 16, 18
    run(seed=0, f1=(12.0, 8.0)),
    run(seed=1, f1=(14.0, 10.0)),
    run(seed=2, f1=(16.0, 12.0)),
    run("prefix+alignment", seed=0, f1=(20.0, 12.0)),
    run("prefix+alignment", seed=1, f1=(20.0, 16.0)),
    run("prefix", 128, f1=(40.0, 20.0)),
]


def test_spread():
    assert spread([1.0, 3.0]) == Spread(2.0, math.sqrt(2), 2)
    assert spread([1.0]) == Spread(1.0, None, 1)
    assert spread([]) is None
    assert math.isnan(spread([math.inf, -math.inf]).sd)


def test_loss_variance():
    # second half 1, 2, 1, 3: differences 1, -1, 2, with mean 2/3 and variance (1/9 + 25/9 + 16/9) / 2
    assert loss_variance([9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 1.0, 3.0]) == pytest.approx(21 / 9)
    assert loss_variance([1.0, 2.0, 3.0, 4.0]) is None
    assert math.isnan(loss_variance([1.0, math.nan, math.nan, 1.0, 1.0, 1.0][::-1]))


def test_gradient_spread():
    assert gradient_spread([1.0, 2.0, 3.0]) == pytest.approx(2.8 / 1.2)  # interpolated between the norms
    assert gradient_spread([1.0]) is None
    assert math.isnan(gradient_spread([0.0, 0.0]))
    assert math.isnan(gradient_spread([1.0, math.inf]))


def test_block_means():
    assert block_means([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.5, 4.0]
    assert block_means([1.0, 2.0], 5) == [1.0, 2.0]
    assert block_means([], 5) == []


def test_compare():
    assert compare(Spread(3.0, 1.0, 2), Spread(1.0, 1.5, 2)) == AHEAD
    assert compare(Spread(3.0, 1.0, 2), Spread(1.0, 2.0, 2)) == WITHIN  # exactly one: not more than one
    assert compare(Spread(1.0, 1.0, 2), Spread(3.0, 1.5, 2)) == BEHIND
    assert compare(Spread(3.0, None, 1), Spread(1.0, 2.0, 2)) == UNJUDGED


def test_scores(tmp_path):
    _, markdown = report(tmp_path, FIVE)
    assert rows(markdown, "Mean F1 (%) over all languages") == [
        ["method", "64 examples", "128 examples"],
        ["prefix", "12.0 ± 2.0", "30.0 (n=1)"],
        ["prefix+alignment", "**17.0 ± 1.4 (n=2)**", "–"],
    ]
    assert rows(markdown, "Mean exact match (%) over all languages")[1] == ["prefix", "6.0 ± 1.0", "15.0 (n=1)"]
    assert rows(markdown, "Transfer: mean F1 (%)")[1:] == [
        ["prefix", "10.0 ± 2.0", "20.0 (n=1)"],
        ["prefix+alignment", "**14.0 ± 2.8 (n=2)**", "–"],
    ]
    assert rows(markdown, "F1 (%) by language, 64 examples") == [
        ["method", "en", "de", "mean"],
        ["prefix", "14.0 ± 2.0", "10.0 ± 2.0", "12.0 ± 2.0"],
        ["prefix+alignment", "**20.0 ± 0.0 (n=2)**", "**14.0 ± 2.8 (n=2)**", "**17.0 ± 1.4 (n=2)**"],
    ]
    assert "over 3 seeds" in markdown and "fewer seeds are finished. –: no finished run." in markdown


def test_cost(tmp_path):
    _, markdown = report(tmp_path, FIVE)
    assert rows(markdown, "Cost of one run") == [
        ["method", "examples", "trained parameters", "seconds", "steps", "peak memory (MB)", "seeds"],
        ["prefix", "64", "147,456", "61.0", "8", "1,100", "3"],
        ["prefix+alignment", "64", "147,456", "60.5", "8", "1,100", "2"],
        ["prefix", "128", "147,456", "60.0", "8", "1,100", "1"],
    ]


def test_html_has_the_same_tables(tmp_path):
    page, markdown = report(tmp_path, FIVE)
    assert "<td><b>17.0 ± 1.4 (n=2)</b></td>" in page
    in_page = [re.findall(r"<t[hd][^>]*>(?:<b>)?([^<]*)", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    in_markdown = [
        line.replace("**", "").strip("| ").split(" | ")
        for line in markdown.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]
    assert in_page == in_markdown


def test_the_summary(tmp_path):
    _, markdown = report(tmp_path, [*FIVE, run("prompt", f1=(1.0, 1.0)), run("head", 128)])
    assert (
        "By mean F1 over 2 languages, each method with alignment against itself without, prompt, head and frozen: of 2 "
        "comparisons, ahead by more than one standard deviation in 1, within one in 0, behind by more than one in 0, "
        "not judged for want of a second seed in 1."
    ) in markdown
    assert "- 64 examples, prefix+alignment: ahead of prefix (+5.0); not judged against prompt (+16.0)." in markdown
    (row, unjudged) = rows(markdown, "Difference of mean F1")[1:]
    assert row == ["prefix+alignment against prefix", "64", "+5.0", "2.0", "+6.0 ± 0.0 (n=2)", "ahead", "2", *"–––"]
    assert unjudged[2:] == ["+16.0", "–", "+15.0 (n=1)", "not judged", "–", "–", "–", "2"]


def test_behind_and_not_apart(tmp_path):
    runs = [
        run(method, seed=seed, f1=(value + seed, value + seed))
        for method, value in (("head", 20.2), ("prompt", 25.0), ("lora", 10.0), ("lora+alignment", 20.0))
        for seed in (0, 1)
    ]
    task = results(tmp_path, runs)
    assert sentences(task, compare_methods(task)) == [
        "64 examples, lora+alignment: ahead of lora (+10.0); not apart from head (-0.2); behind prompt (-5.0)."
    ]


def test_nothing_to_compare(tmp_path):
    _, markdown = report(tmp_path, [run("prefix+alignment")])
    assert "\nEach method with alignment against itself without, prompt, head and frozen: no finished runs" in markdown


def test_one_seed(tmp_path):
    page, markdown = report(tmp_path, [run(), run("head", f1=(4.0, 2.0))])
    assert rows(markdown, "Mean F1 (%)")[1:] == [["head", "3.0"], ["prefix", "**15.0**"]]
    assert "1 seed, so no standard deviation" in markdown and "with alignment" not in markdown
    assert "±" not in "".join(line for line in markdown.splitlines() if line.startswith("|"))
    assert page.count("<svg") == 2  # the seeds and the losses: nothing to draw over the number of examples


def test_no_run_is_finished(tmp_path):
    _, markdown = report(tmp_path, [])
    assert "no run is finished" in markdown
    (tmp_path / "results.jsonl").unlink()
    assert write_report(tmp_path)[1].read_text(encoding="utf-8") == markdown


def test_order_and_look_of_methods(tmp_path):
    ordered = (
        "frozen head full lora lora+alignment prompt prefix+alignment prefix+alignment+adapters zeta alpha".split()
    )
    runs = [run(ordered[n]) for n in (8, 7, 3, 9, 5, 0, 4, 2, 1, 6)]
    _, markdown = report(tmp_path, runs)
    assert [row[0] for row in rows(markdown, "Mean F1")[1:]] == ordered
    (task,) = by_task(read_results(tmp_path)[1])
    assert len({_look(task, series) for series in task.series}) == len(ordered)


def test_accuracy_and_majority(tmp_path):
    def pawsx(seed, accuracy):
        scores = {language: {"accuracy": accuracy} for language in ("en", "de")}
        baseline = {"majority": {"en": 54.0, "de": 56.0}}
        return run("head", seed=seed, task="pawsx", scores=scores, baseline=baseline)

    _, markdown = report(tmp_path, [pawsx(0, 52.0), pawsx(1, 54.0)])
    assert rows(markdown, "accuracy (%) by language, 64 examples") == [
        ["method", "en", "de", "mean"],
        ["head", "53.0 ± 1.4", "53.0 ± 1.4", "53.0 ± 1.4"],
        ["majority class", "54.0", "56.0", "55.0"],
    ]
    assert "- 64 examples (majority class 55.0): head (53.0)." in markdown


def test_retrieval_and_several_tasks(tmp_path):
    def found(method, seed, r1):
        return run(method, seed=seed, task="retrieval", scores={"de": {"r@1": r1, "cosine": 0.5}})

    runs = [found("frozen", 0, 0.3), found("frozen", 1, 0.3), found("head", 0, 0.42), found("head", 1, 0.44)]
    _, markdown = report(tmp_path, [run(), *runs])
    assert "xquad (1 run) and retrieval (4 runs)" in markdown
    assert rows(markdown, "Mean R@1 (0 to 1)")[2] == ["head", "**0.430 ± 0.014**"]
    assert "- 64 examples, head: ahead of frozen (+0.130)." in markdown
    assert "each method against the frozen backbone: of 1 comparison, ahead" in markdown
    assert markdown.count("\nTransfer: mean") == 2  # xquad's: for retrieval it would be the same as the mean


def test_pairs_of_languages(tmp_path):
    scores = {pair: {"f1": value} for pair, value in (("ar-de", 1.0), ("ar-en", 2.0), ("en-en", 6.0), ("en-ar", 3.0))}
    page, markdown = report(tmp_path, [run(examples=count, scores=scores) for count in (0, 64)])
    assert rows(markdown, "F1 (%) by language, 64")[0] == ["method", "en-en", "ar-de", "ar-en", "en-ar", "mean"]
    assert rows(markdown, "Transfer: mean F1")[1] == ["prefix", "2.0", "2.0"]
    assert ">ar-*</text>" in page and ">en-*</text>" in page


def test_stability(tmp_path):
    page, markdown = report(tmp_path, [*FIVE[:5], run("head")], study="stability")
    columns, head, prefix, _ = rows(markdown, "Stability with 64 examples")
    assert columns[1:] == ["mean", "sd", "worst seed", "loss-curve variance", "gradient-norm spread", "seeds"]
    assert prefix == ["prefix", "12.0", "2.00", "10.0 (seed 0)", "2.33", "2.33", "3"]
    assert head[2] == "–"
    assert "64 examples: smallest for prefix+alignment (1.41), largest for prefix (2.00)" in markdown
    assert "F1 (%) of each seed" in page


def test_pseudo(tmp_path):
    runs = [
        run(seed=seed, variant=variant, f1=(value + seed, value + seed))
        for variant, value in (("real", 20.0), ("pseudo", 10.0), ("pseudo+real", 30.0))
        for seed in (0, 1)
    ]
    _, markdown = report(tmp_path, runs, study="pseudo")
    assert rows(markdown, "Mean F1")[1:] == [
        ["prefix (real)", "20.5 ± 0.7"],
        ["prefix (pseudo)", "10.5 ± 0.7"],
        ["prefix (pseudo+real)", "**30.5 ± 0.7**"],
    ]
    assert "- 64 examples, prefix (pseudo): behind prefix (real) (-10.0)." in markdown
    assert [one.verdict for one in compare_variants(results(tmp_path, runs))] == [BEHIND, AHEAD]


def test_losses(tmp_path):
    runs = [run(losses=[*map(float, range(10))]), run("head", losses=[]), run("lora", losses=[1.0, math.nan, math.inf])]
    page, markdown = report(tmp_path, runs)
    assert rows(markdown, "Training loss with 64 examples")[1:] == [
        ["head", "–", "–", "–", "–", "–"],
        ["lora", "1", "not finite", "not finite", "–", "–"],
        ["prefix", "0.5", "2.5", "4.5", "6.5", "8.5"],
    ]
    assert "training step" in page


def test_names_are_escaped(tmp_path):
    name = '<script>alert("x")</script>|$a_b$'
    page, markdown = report(
        tmp_path, [run(name, task=name, variant=name, examples=count) for count in (1, 2)], title=name
    )
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(?<!\\)<script", markdown)
    assert all(len(row) == 3 for row in rows(markdown, "Mean F1"))
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        text = "".join(ET.fromstring(svg).itertext())
        assert f"{name} ({name})" in text


def test_the_page_stands_alone(tmp_path):
    page, _ = report(tmp_path, FIVE)
    assert page.count("<svg") == 3  # scores, languages, losses
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"<link|<script|<img|@import|url\((?!#)", page)
    assert not re.findall(r"https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink)\b)", page)  # the names of SVG itself
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_the_same_study_gives_the_same_bytes(tmp_path):
    first = [path.read_bytes() for path in write_report(write(tmp_path, FIVE))]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "report.md",
        "results.jsonl",
        "study.json",
    ]


def test_the_configuration_is_in_the_report(tmp_path):
    page, markdown = report(tmp_path, FIVE)
    assert "<summary>configuration</summary>" in page and "``` &lt;b&gt;" in page
    assert '````\n{\n  "model": "tiny",\n  "note": "``` <b>"\n}\n````' in markdown


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_that_was_cut_off(tmp_path, end):
    whole = json.dumps(run(seed=1))
    write(tmp_path, [run(), whole[: len(whole) // 2]], end="")
    assert [record.seed for record in read_results(tmp_path)[1]] == [0]
    write(tmp_path, [run(), whole], end=end)
    assert [record.seed for record in read_results(tmp_path)[1]] == [0, 1]


def test_a_character_that_was_cut_off(tmp_path):
    write(tmp_path, [run(), '{"task": "'], end="")
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write("–".encode()[:1])
    assert len(read_results(tmp_path)[1]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": ', "must be one JSON object, got"),
        ("[]", r"the line must be one JSON object, got \[\]"),
        ({"examples": "64"}, "examples must be an integer of 0 or more, got '64'"),
        ({"steps": True}, "steps must be an integer of 0 or more, got True"),
        ({"validation": math.nan}, "validation must be a finite number, got nan"),
        ({"losses": [1.0, None]}, r"losses must be a list of numbers, one a step, got \[1.0, None\]"),
        ({"scores": {}}, "scores must be an object of language -> metric -> finite number"),
        ({"scores": {"en": {"bleu": 1.0}, "de": {"bleu": 1.0}}}, r"scores must be by one of \('f1', .*got \['bleu'\]"),
        ({"scores": {"en": {"f1": 1.0}, "de": {}}}, "scores must be"),
        ({"scores": {"en": {"f1": 1.0}, "de": {"accuracy": 1.0}}}, r"scores\['de'\] must be by \['f1'\], as 'en'"),
        ({"scores": {"en": {"f1": 1.0, "exact_match": 1.0}}}, "scores must have the languages of line 1"),
        ({"scores": {"en": {"f1": 1.0}, "de": {"f1": 1.0}}}, "scores must have the metrics of line 1"),
        ({"baseline": {}}, "baseline: majority is missing"),
        ({"baseline": {"majority": {"en": 1.0}}}, "baseline must be for the languages"),
        ({"seed": 0}, "got the run of line 1 again"),
    ],
)
def test_a_malformed_line(tmp_path, line, message):
    write(tmp_path, [run(), line if isinstance(line, str) else run(**{"seed": 1} | line), run(seed=2)])
    with pytest.raises(ValueError, match=rf"results\.jsonl, line 2.*{message}"):
        read_results(tmp_path)


def test_a_missing_field(tmp_path):
    short = copy.deepcopy(run())
    del short["seconds"]
    write(tmp_path, [short])
    with pytest.raises(ValueError, match=r"line 1: seconds is missing; it must be a finite number"):
        read_results(tmp_path)


def test_a_malformed_study(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no study\.json"):
        read_results(tmp_path)
    write(tmp_path, [], study="speed")
    with pytest.raises(ValueError, match=r"study\.json: study must be one of .*got 'speed'"):
        read_results(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study\.json: must be JSON"):
        read_results(tmp_path)
