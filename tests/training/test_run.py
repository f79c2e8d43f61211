"""A run's files: whatever happens to them is told, or changes nothing; and what was saved is on the disk."""

import json
import os
import random
import re
import stat

import pytest
import torch
from helpers import paraphrases, save_backbone, translations

from fastprompt._files import write_text
from fastprompt.training import TrainingConfig, encoding, train
from fastprompt.training.learner import Learner
from fastprompt.training.run import Run, read_run
from fastprompt.training.task_config import TaskConfig
from fastprompt.training.task_learner import TaskLearner
from fastprompt.training.task_loop import train_task

SMALL = dict(num_virtual_tokens=2, max_length=20, batch_size=4)
CONFIG = TrainingConfig(**SMALL, epochs=2)
TASK = TaskConfig(**SMALL, steps=2, evaluate_every=1, norms=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone("bert", tmp_path_factory.mktemp("backbone"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A run of each kind."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPROMPT_CACHE", str(out / "cache"))
        train(*encoding.load_backbone(str(folder)), translations(8), out / "language", CONFIG)
        train_task(*encoding.load_backbone(str(folder)), paraphrases(8), paraphrases(4, 1), TASK, out / "task")
    return out


def resumed(out, config):
    """What a run would go on from: its records and its state."""
    before = json.loads((out / "run.json").read_text())
    run = Run(out, config, before["content"], before["labels"], resume=True)
    return run.records, run.state


def same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def flips(file, count):
    """The file with one bit of it flipped, again and again; at the end as it was."""
    good = file.read_bytes()
    for place in random.sample(range(8 * len(good)), min(count, 8 * len(good))):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        yield
    file.write_bytes(good)


@pytest.mark.parametrize(("kind", "config"), [("language", CONFIG), ("task", TASK)])
@pytest.mark.parametrize("name", ["training_state.pt", "metrics.jsonl"])
def test_a_flipped_bit_in_what_is_resumed(runs, kind, config, name):
    file, expected, told = runs / kind / name, resumed(runs / kind, config), 0
    for _ in flips(file, 60):
        try:
            assert same(resumed(runs / kind, config), expected)
        except ValueError as error:
            assert re.search(rf"{name} is damaged", str(error))
            told += 1
    assert told > 30 and same(resumed(runs / kind, config), expected)


@pytest.mark.parametrize("kind", ["language", "task"])
def test_a_flipped_bit_in_the_settings(runs, kind):
    expected, told = read_run(runs / kind), 0
    for _ in flips(runs / kind / "run.json", 60):
        try:
            assert read_run(runs / kind) == expected
        except ValueError as error:
            assert "run.json is damaged" in str(error)
            told += 1
    assert told > 40


@pytest.mark.parametrize(
    ("kind", "name"),
    [("language", "alignment"), ("language", "adapter_model"), ("task", "trained")],
)
def test_a_flipped_bit_in_what_was_learned(folder, runs, kind, name):
    model, tokenizer = encoding.load_backbone(str(folder))
    backbone = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def load():
        model.load_state_dict(backbone)
        if kind == "language":
            return Learner.load(model, runs / kind, CONFIG, []).state_dict()
        learner.load(runs / kind)
        return learner.state_dict()

    if kind == "task":
        learner = TaskLearner(model, tokenizer, TASK)
        backbone = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, told = {name: tensor.clone() for name, tensor in load().items()}, 0
    for _ in flips(runs / kind / f"{name}.safetensors", 20):
        try:
            assert same(load(), expected)
        except ValueError as error:
            assert f"{name}.safetensors" in str(error)
            told += 1
    assert told > 10


def test_metrics_shorter_than_their_state(runs, tmp_path):
    for name in ("run.json", "training_state.pt", "metrics.jsonl"):
        (tmp_path / name).write_bytes((runs / "language" / name).read_bytes())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + "half a li")  # of a step that was never saved
    assert len(resumed(tmp_path, CONFIG)[0]) == 4
    for left in (lines[:-1], []):
        (tmp_path / "metrics.jsonl").write_text("".join(left))
        with pytest.raises(ValueError, match=rf"metrics.jsonl is damaged: it must have .*, got {len(left)}"):
            resumed(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: it must have the 4 steps .*, got 0"):
        resumed(tmp_path, CONFIG)


@pytest.mark.parametrize("bad", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
@pytest.mark.parametrize("name", ["training_state.pt", "run.json"])
def test_what_is_no_such_file_is_told_by_its_name(runs, tmp_path, bad, name):
    for each in ("run.json", "training_state.pt", "metrics.jsonl"):
        (tmp_path / each).write_bytes((runs / "language" / each).read_bytes())
    before = json.loads((tmp_path / "run.json").read_text())
    good = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(good[: len(good) // 2] if bad is None else bad)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Run(tmp_path, CONFIG, before["content"], before["labels"], resume=True)


def test_what_is_written_is_on_the_disk_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    write_text(tmp_path / "a", "text")
    assert done == ["file", "name", "folder"]
