"""Whole training jobs, both ways, with a small random encoder; and what is counted of them."""

import json
import math

import pytest
import torch
from helpers import save_backbone, translations

from fastprompt import _native
from fastprompt.bench import end_to_end
from fastprompt.bench.end_to_end import measure_jobs, record_of, seconds_to
from fastprompt.bench.flops import count_flops
from fastprompt.bench.jobs import JOBS, Settings, _examples, distinct, run_job
from fastprompt.data.examples import Pair
from fastprompt.ops import alignment_loss, prefix_attention

WAY_KEYS = {
    *("seconds_per_step", "tokens_per_second", "flops_per_step", "seconds_to", "seconds_in_all"),
    *("resident_bytes", "scores", "curve"),
}
compiled = pytest.mark.skipif(not _native.available("cpu"), reason="FLOPs are counted with the native library")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[str, str]:
    """A backbone's folder and a file of pairs."""
    folder = tmp_path_factory.mktemp("end_to_end")
    backbone = save_backbone("bert", folder / "backbone", max_position_embeddings=300)
    pairs = folder / "pairs.tsv"
    pairs.write_text("".join(f"{pair.source}\t{pair.target}\n" for pair in translations(120)))
    return str(backbone), str(pairs)


def settings(places, **changes) -> Settings:
    values = {"steps": 5, "train": 40, "test": 21, "evaluate_every": 2, "threads": None} | changes
    return Settings(*places, **values)


# The jobs


@compiled
@pytest.mark.parametrize("job", JOBS)
def test_both_ways_have_the_same_losses_and_tokens(places, job):
    ours, peft = (run_job(job, way, settings(places)) for way in ("ours", "peft"))
    assert len(ours["losses"]) == 6  # two epochs of three
    assert ours["losses"] == pytest.approx(peft["losses"], rel=1e-4)
    assert ours["tokens"] == peft["tokens"] and min(ours["tokens"]) > 0
    for run in (ours, peft):
        assert [step for step, _, _ in run["curve"]] == [0, 2, 4, 6]
        assert run["curve"][-1][1] == pytest.approx(sum(run["seconds"]))
        assert len(set(run["losses"])) == 6
    assert [score for _, _, score in ours["curve"]] == pytest.approx([score for _, _, score in peft["curve"]])
    assert 0 < ours["flops_per_step"] < peft["flops_per_step"]  # no padding, and the prefix is no part of the batch


@compiled
def test_in_processes_of_their_own(places):
    calls = measure_jobs(*places, jobs=["accuracy"], steps=4, train=32, test=16, evaluate_every=2, threads=1)
    (record,) = calls
    assert json.loads(json.dumps(record)) == record
    assert {name: record[name] for name in ("name", "group", "sweep", "missing", "wrong")} == {
        **{"name": "end-to-end/accuracy", "group": "end-to-end", "sweep": None},
        **{"missing": {}, "wrong": {}},
    }
    assert record["sizes"] == {"batch": 16, "P": 16, "steps": 4, "train": 32, "test": 16}
    ours, peft = record["ways"]["ours"], record["ways"]["peft"]
    assert ours.keys() == WAY_KEYS | {"error"} and peft.keys() == WAY_KEYS | {"over_ours"}
    assert 0 <= ours["error"] < 1e-4
    for way in (ours, peft):
        assert 100e6 < way["resident_bytes"] < 20e9
        assert way["scores"] == {"before": way["curve"][0][2], "after": way["curve"][-1][2]}


def test_examples_are_one_sentence_of_each_pair():
    pairs = [Pair(f"english {n}", f"other {n}") for n in range(9)]
    examples = _examples(pairs, 7)
    assert len(examples) == 7
    assert len({text.split()[1] for text, _ in examples}) == 7
    assert all(label == text.startswith("other") for text, label in examples)
    assert {label for _, label in examples} == {0, 1}


def test_pairs_that_share_a_side_are_dropped():
    pairs = [Pair("a", "x"), Pair("b", "y"), Pair("a", "z"), Pair("c", "y")]
    assert distinct(pairs) == [Pair("a", "z"), Pair("c", "y")]


# The record


def synthetic(scores, seconds=2.0, loss=1.0) -> dict:
    """A run of five steps with a score after each."""
    times = [9.0, 9.0, 9.0, seconds, 3 * seconds]
    curve = [[step, sum(times[:step]), score] for step, score in enumerate(scores)]
    return {
        **{"seconds": times, "losses": [loss, 0.5, 0.4, 0.3, 0.2], "tokens": [7, 7, 7, 100, 60]},
        **{"curve": curve, "resident_bytes": 10, "flops_per_step": 11},
    }


def test_seconds_to():
    curve = [[0, 0.0, 0.5], [10, 3.0, 0.7], [20, 6.0, 0.6], [30, 9.0, 0.8]]
    assert [seconds_to(target, curve) for target in (0.4, 0.7, 0.75, 0.81)] == [0.0, 3.0, 9.0, None]


def test_default_target_lies_halfway_to_what_both_reach(places):
    runs = {"ours": [synthetic([0.2, 0.3, 0.5, 0.7, 0.9, 0.8])], "peft": [synthetic([0.2, 0.2, 0.3, 0.3, 0.61, 0.6])]}
    record = record_of("retrieval", settings(places), runs, ())
    assert record["ways"]["ours"]["seconds_to"] == {"R@1 0.40": 18.0}
    assert record["ways"]["peft"]["seconds_to"] == {"R@1 0.40": 29.0}
    record = record_of("retrieval", settings(places), runs, [0.65, 0.9])
    assert record["ways"]["ours"]["seconds_to"] == {"R@1 0.65": 27.0, "R@1 0.90": 29.0}
    assert record["ways"]["peft"]["seconds_to"] == {"R@1 0.65": None, "R@1 0.90": None}
    runs["peft"] = [synthetic([0.2, 0.1, 0.1, 0.1, 0.1, 0.1])]
    assert record_of("retrieval", settings(places), runs, ())["ways"]["peft"]["seconds_to"] == {}


def test_rounds_are_pooled_without_their_first_steps(places):
    scores = [0.5] * 6
    runs = {"ours": [synthetic(scores, 1.0), synthetic(scores, 2.0)], "peft": [synthetic(scores, 4.0)] * 2}
    ways = record_of("accuracy", settings(places), runs, ())["ways"]
    assert ways["ours"]["seconds_per_step"] == {"median": 2.5, "low": 1.0, "high": 6.0}
    assert ways["ours"]["tokens_per_second"] == pytest.approx(320 / 12)
    assert ways["ours"]["seconds_in_all"] == (31 + 35) / 2
    assert ways["ours"]["curve"][4] == [4, 27 + 1.5, 0.5]
    assert ways["peft"]["over_ours"] == {"median": 8 / 2.5, "low": 4 / 6, "high": 12.0}


@pytest.mark.parametrize("loss", [1.01, math.nan])
def test_another_loss_leaves_no_times(places, loss):
    runs = {"ours": [synthetic([0.5] * 6, loss=loss)], "peft": [synthetic([0.5] * 6)]}
    record = record_of("accuracy", settings(places), runs, ())
    assert record["ways"] == {}
    assert record["wrong"]["ours"] == pytest.approx(loss - 1, nan_ok=True)


# FLOPs

LENGTHS, HEADS, FEATURES, PREFIX = (7, 1, 12, 5), 3, 16, 9
ROWS = sum(LENGTHS)
OWN, READ = (2 * pairs * HEADS * FEATURES for pairs in (sum(n * n for n in LENGTHS), ROWS * PREFIX))  # of a product


@compiled
@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("qkvpr", 7 * (OWN + READ)),
        ("pr", 2 * (OWN + READ) + 4 * READ),  # the lowest layer of a frozen encoder
        ("r", 2 * (OWN + READ) + 2 * READ),
        ("q", 2 * (OWN + READ) + 3 * (OWN + READ)),
        ("", 2 * (OWN + READ)),
    ],
)
def test_flops_of_our_attention(trained, expected):
    query, key, value = torch.randn(3, ROWS, HEADS, FEATURES)
    prefix_key, prefix_value = torch.randn(2, 1, HEADS, PREFIX, FEATURES)
    tensors = dict(zip("qkvpr", (query, key, value, prefix_key, prefix_value), strict=True))
    for name in trained:
        tensors[name] = tensors[name].detach().requires_grad_()
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)

    def run() -> None:
        output = prefix_attention(*tensors.values(), bounds)
        if trained:
            output.sum().backward()

    assert count_flops(run) == expected


@compiled
def test_flops_of_attention_that_has_no_formula():
    query = torch.randn(6, 2, 8)
    nothing = torch.empty(1, 2, 0, 8)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="causal"):
        count_flops(lambda: prefix_attention(query, query, query, nothing, nothing, bounds, is_causal=True))


@compiled
def test_flops_of_pytorchs_attention():
    query, key, value = (torch.randn(4, HEADS, rows, FEATURES, requires_grad=True) for rows in (12, 21, 21))
    mask = torch.zeros(4, 1, 12, 21)
    attention = torch.nn.functional.scaled_dot_product_attention
    flops = count_flops(lambda: attention(query, key, value, attn_mask=mask).sum().backward())
    assert flops == 14 * 4 * 12 * 21 * HEADS * FEATURES


@compiled
@pytest.mark.parametrize("distance", ["cosine", "infonce", "infonce+cosine"])
@pytest.mark.parametrize("trained", [(True, False, True), (True, True, True), (False, False, True)])
def test_flops_of_the_alignment_loss(distance, trained):
    rows, student_size, size = 10, 24, 40
    shapes = (rows, student_size), (rows, size), (size, student_size)
    inputs = [torch.randn(shape, requires_grad=each) for shape, each in zip(shapes, trained, strict=True)]
    flops = {
        backend: count_flops(
            lambda backend=backend: alignment_loss(*inputs, distance=distance, backend=backend).backward()
        )
        for backend in ("native", "reference")
    }
    of_student, of_teacher, _ = trained
    expected = 2 * rows * student_size * size * (2 + of_student)
    expected += ("infonce" in distance) * 2 * rows * rows * size * (2 + of_teacher)
    assert flops == {"native": expected, "reference": expected}


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "nowhere"}, "backbone must be a folder with a model and its tokenizer, got 'nowhere'"),
        ({"parallel": "nowhere.tsv"}, "parallel must be a file of sentence pairs, got 'nowhere.tsv'"),
        ({"jobs": ["retrieval", "poetry"]}, r"jobs must be of .*, got \['poetry'\]"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"train": 3}, "train must be at least 4, got 3"),
        ({"train": 900}, r"train and test must be at most the \d+ different pairs of .*, got 1100"),
    ],
)
def test_arguments_that_do_not_fit(places, monkeypatch, changes, message):
    monkeypatch.setattr(end_to_end, "_in_process", lambda *_: pytest.fail("it ran"))
    given = dict(zip(("backbone", "parallel"), places, strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        measure_jobs(**given)


def test_a_process_that_fails_says_why(places, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho the reason >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(end_to_end.sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="end-to-end/accuracy, ours: the reason"):
        next(measure_jobs(*places, jobs=["accuracy"], train=32, test=16))
