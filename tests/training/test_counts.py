"""What of the data is not used is counted, and sentences of the same tokens are the same."""

import json

import pytest
from helpers import paraphrases, questions, save_backbone, translations

from fastprompt.tasks.parallel import Pair
from fastprompt.training import encoding
from fastprompt.training.task_config import TaskConfig
from fastprompt.training.task_loop import train_task, usable

SMALL = dict(num_virtual_tokens=3, max_length=40, stride=8, steps=2, batch_size=4, evaluate_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone("bert", tmp_path_factory.mktemp("backbone"), num_hidden_layers=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))


def run(folder, out=None, examples=(), validation=(), pairs=(), **settings):
    loaded = encoding.load_backbone(str(folder))
    return train_task(*loaded, examples, validation, TaskConfig(**(SMALL | settings)), out, pairs=pairs)


def moved(examples):
    """With answers that do not stand where they say."""
    return [each._replace(answers=[each.answers[0]._replace(start=each.answers[0].start + 1)]) for each in examples]


def test_examples_that_cannot_be_used_are_counted(folder, tmp_path, caplog):
    """They are not drawn, and told; where they are the greater part, or too few are left, nothing begins."""
    settings = dict(task="xquad", method="head", steps=2)
    mixed = questions(6) + moved(questions(3, seed=5))
    learner, _ = run(folder, tmp_path / "run", examples=mixed, **settings)
    assert "3 of 9 examples are left out: they have no answer that stands whole" in caplog.text
    for name in ("run.json", "summary.json"):
        counts = json.loads((tmp_path / "run" / name).read_text())["counts"]
        assert counts["given"] == 9 and counts["drawn"] == 6
    config = TaskConfig(**SMALL | settings, examples=6)
    chosen, items = usable(learner.task, mixed, 6, 0)
    assert sorted(each.id for each in chosen) == [f"q{n}" for n in range(6)]
    assert {item.example for item in items} == {*range(6)}
    with pytest.raises(ValueError, match="examples must be at most 6, got 7: 3 of 9 have no answer"):
        usable(learner.task, mixed, 7, 0)
    with pytest.raises(ValueError, match="usable for the greater part, got 7 of 13 that have no answer"):
        usable(learner.task, questions(6) + moved(questions(7, seed=5)), None, 0)
    train_task(*encoding.load_backbone(str(folder)), mixed, (), config, tmp_path / "six")
    assert json.loads((tmp_path / "six" / "run.json").read_text())["counts"]["drawn"] == 6


@pytest.mark.parametrize("task", ["xquad", "pawsx"])
def test_inputs_that_are_cut_are_counted(folder, tmp_path, task, caplog):
    examples = [
        each._replace(sentence1=each.sentence1 + " w1" * 50 * (n == 2)) for n, each in enumerate(paraphrases(8))
    ]
    if task == "xquad":
        examples = [
            each._replace(question=each.question + " w1" * 50 * (n == 2)) for n, each in enumerate(questions(6))
        ]
    pairs = [*translations(5), Pair("w1 " * 60, "w21")]
    run(folder, tmp_path / "run", examples=examples, pairs=pairs, alignment=1.0, task=task, steps=1)
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["counts"]
    assert counts["cut"] == 1 and counts["pairs"] == 6
    assert "1 of 6 sentences have more than max_length 40 tokens, and are cut" in caplog.text


def test_retrieval_tells_sentences_by_their_tokens(folder):
    tests = translations(6)
    both = tests + [pair._replace(source=pair.source + "  ") for pair in tests]
    settings = dict(task="retrieval", alignment=1.0, steps=1, evaluate_every=1)
    scores = [run(folder, examples=translations(8), validation=each, **settings)[1][-1]["validation"]
              for each in (tests, both)]  # fmt: skip
    assert scores[0] == pytest.approx(scores[1])
