"""A run's files: what they say comes back, whatever happens to them is told, and what is saved is on the disk."""

import json
import os
import random
import shutil
import stat

import peft
import pytest
import torch
from helpers import build, paraphrases, save_backbone, translations
from runs import run, trainer
from simple_task import Classes

import fastprompt
from fastprompt import PromptConfig, PromptModel
from fastprompt._files import write_text
from fastprompt.models.load import load_backbone
from fastprompt.models.methods import AdapterConfig
from fastprompt.tasks.base import InputConfig
from fastprompt.training import AlignmentConfig, RunInfo, load_learner, read_run
from fastprompt.training.run import draw_curves, read_records, write_run, write_summary

TEXTS = ["w1 w2", "w3", "w4 w25 w6"]


@pytest.fixture(scope="module")
def runs(backbone, tmp_path_factory):
    """A run of each kind."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPROMPT_CACHE", str(out / "cache"))
        settings = dict(num_virtual_tokens=2, max_steps=2, eval_steps=1)
        pairs = {"pairs": translations(8), "alignment": AlignmentConfig(layer=1)}
        run(backbone, out / "language", pairs=pairs["pairs"], data={"parallel": "a.tsv"}, language="cy", **settings)
        run(backbone, out / "task", task=Classes(), train_dataset=paraphrases(8), norms=True, **settings, **pairs)
    return out


@pytest.fixture
def copy(runs, tmp_path):
    """A run's folder to do something to."""
    return lambda kind: shutil.copytree(runs / kind, tmp_path / kind)


def test_what_it_says_comes_back(tmp_path):
    info = RunInfo(
        {"name": "somewhere", "dtype": "bfloat16", "quantization": "4bit"},
        AdapterConfig("prompt", 3, init_text="日本", adapter_size=4),
        InputConfig(prefix_text="query: ", max_length=7, pooling="last"),
        {"name": "classification", "settings": {"labels": ["a", "b"]}},
        AlignmentConfig(weight=0.25, layer=3),
        arguments={"learning_rate": 0.5, "max_tokens": None},
        data={"train": ["a.csv"]},
        content={"data": "0f"},
        counts={"given": 3},
        language="cy",
    )
    for each in (info, RunInfo(info.backbone, AdapterConfig(layers=[0, -1]), InputConfig())):
        write_run(tmp_path, each)
        assert read_run(tmp_path) == each
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["version"] == 2 and set(about) == {
        *("version", "fastprompt", "backbone", "adapter", "inputs", "task", "alignment", "arguments", "data"),
        *("content", "counts", "language", "checksum"),
    }


def test_what_a_run_said(runs, backbone):
    language, task = read_run(runs / "language"), read_run(str(runs / "task"))
    assert language.backbone == {"name": backbone, "dtype": "float32", "quantization": None}
    assert (language.task, language.data, language.language) == (None, {"parallel": "a.tsv"}, "cy")
    assert task.task == {"name": "classes", "settings": {"labels": ["0", "1"]}} and task.adapter.norms
    assert task.alignment.layer == 1 and task.arguments["max_steps"] == 2
    assert language.counts == {"given": 8, "pairs": 8} and task.counts["drawn"] == 8
    with pytest.raises(ValueError, match="task must be the class of the run's own task 'classes', got None"):
        fastprompt.load(runs / "task", device="cpu")


def same(a, b) -> bool:
    """What was loaded twice."""
    states = [learner.state_dict() | {"mean": learner.mean, "deviation": learner.deviation} for learner in (a, b)]
    return all(a is b or torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def flips(file, count):
    """The file with one bit of it flipped, again and again; at the end as it was."""
    good = file.read_bytes()
    for place in random.sample(range(8 * len(good)), min(count, 8 * len(good))):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        yield
    file.write_bytes(good)


@pytest.mark.parametrize(
    ("kind", "name", "count", "least"),
    [
        ("language", "run.json", 60, 40),
        ("language", "metrics.jsonl", 60, 30),
        ("task", "trained.safetensors", 15, 8),
    ],
)
def test_a_flipped_bit(copy, backbone, kind, name, count, least):
    """It is told, with the file's name, or what is read is what it was."""
    folder = copy(kind)

    def read():
        if name == "run.json":
            return read_run(folder)
        if name == "metrics.jsonl":
            return read_records(folder, 2)
        loaded.load(folder)
        return {name: p.detach().clone() for name, p in loaded.trained().items()} | {"mean": loaded.mean}

    loaded = load_learner(folder, device="cpu", task=Classes) if kind == "task" else None
    expected, told = read(), 0
    for _ in flips(folder / name, count):
        try:
            found = read()
            if kind == "task":
                assert all(torch.equal(found[each], expected[each]) for each in expected)
            elif name == "run.json":
                assert found == expected
            told += name == "metrics.jsonl" and found != expected
        except ValueError as error:
            assert name in str(error)
            told += 1
    assert told > least


def test_metrics_shorter_than_their_checkpoint(copy):
    folder = copy("language")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines) + "half a li")  # of a step that was never saved
    assert len(read_records(folder, 2)) == 2
    for left in (lines[:-1], [], None):
        (folder / "metrics.jsonl").write_text("".join(left or [])) if left is not None else (
            folder / "metrics.jsonl"
        ).unlink()
        message = rf"metrics.jsonl is damaged: it must have the 2 steps of the checkpoint, got {len(left or [])}"
        with pytest.raises(ValueError, match=message):
            read_records(folder, 2)


@pytest.mark.parametrize(
    "bad", [b"", b"version https://git-lfs.github.com/spec/v1\n", None], ids=["empty", "lfs", "half"]
)
@pytest.mark.parametrize("name", ["trained.safetensors", "run.json"])
def test_what_is_no_such_file_is_told_by_its_name(copy, bad, name):
    file = copy("language") / name
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2] if bad is None else bad)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_learner(file.parent, device="cpu")


def test_versions_before_and_after(copy):
    folder = copy("language")
    about = json.loads((folder / "run.json").read_text())
    del about["checksum"]
    for change, message in (
        ({"version": 1}, "run.json must be of version 2, got 1: train it again"),
        ({"version": None}, "run.json must be of version 2"),
        ({"version": 3}, "run.json must be of version 2, got 3"),
        ({"merged": True}, "run.json has merged, which this version of fastprompt does not know: a newer one wrote it"),
        ({"adapter": about["adapter"] | {"gates": 2}}, "run.json has gates, which this version of fastprompt does not"),
    ):
        (folder / "run.json").write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match=message):
            read_run(folder)
    # What the version before wrote: settings at the top, and no version.
    (folder / "run.json").write_text(json.dumps({"config": {"kind": "prefix"}, "content": {}, "labels": []}))
    with pytest.raises(ValueError, match="run.json must be of version 2, got 1: train it again"):
        load_learner(folder, device="cpu")


def test_what_was_trained_is_what_is_loaded(runs, backbone, tmp_path):
    """From the run, and from a checkpoint of it; also with another backbone's folder."""
    whole = load_learner(runs / "language", device="cpu")
    moved = shutil.copytree(backbone, tmp_path / "moved")
    assert same(whole, load_learner(runs / "language", device="cpu", backbone=str(moved)))
    assert not any(p.requires_grad for p in whole.backbone.parameters()) and not whole.training
    last, first = (load_learner(runs / "language" / f"checkpoint-{n}", device="cpu") for n in (2, 1))
    assert same(whole, last) and not same(whole, first)
    task = load_learner(runs / "task", device="cpu", task=Classes)
    assert task.mean is not None and len(task.predict(paraphrases(3))) == 3
    adapter = fastprompt.load(runs / "task", device="cpu", task=Classes)
    assert isinstance(adapter.learner.task, Classes) and adapter.predict(paraphrases(3)) == task.predict(paraphrases(3))
    other = str(save_backbone("bert", tmp_path / "other", num_hidden_layers=2, hidden_size=32, num_attention_heads=2))
    with pytest.raises(ValueError, match="trained.safetensors does not fit the backbone and configuration"):
        load_learner(runs / "language", device="cpu", backbone=other)
    with pytest.raises(FileNotFoundError, match="must be the folder of a run, run.json is not there"):
        load_learner(tmp_path, device="cpu")


def test_a_run_that_was_not_finished(copy, caplog):
    folder = copy("language")
    (folder / "trained.safetensors").unlink()
    last = load_learner(folder / "checkpoint-2", device="cpu")
    assert same(last, load_learner(folder, device="cpu"))
    assert "was not finished: what checkpoint-2 holds is taken" in caplog.text
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(FileNotFoundError, match="holds nothing that was trained"):
        load_learner(folder, device="cpu")


def test_a_checkpoint_elsewhere(runs, tmp_path):
    """It says by itself what it is; what lost its run.json is not taken for a prompt of PEFT's, without its task."""
    found = shutil.copytree(next((runs / "task").glob("checkpoint-*")), tmp_path / "taken")
    expected = load_learner(runs / "task" / next((runs / "task").glob("checkpoint-*")).name, device="cpu", task=Classes)
    again = load_learner(found, device="cpu", task=Classes)
    assert again.predict(paraphrases(4)) == expected.predict(paraphrases(4))
    (found / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="taken must hold run.json, of the run that wrote its trained.safeten"):
        load_learner(found, device="cpu")


@pytest.mark.parametrize("name", ["README.md", "checkpoint-9", "trained.safetensors"])
def test_what_is_there_already_is_not_written_over(backbone, tmp_path, name):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")  # which no run would touch
    (out / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"run holds {name}, and no run: choose another folder"):
        run(backbone, out, pairs=translations(4), max_steps=1)
    assert {file.name: file.read_text() for file in out.iterdir()} == {"notes.txt": "mine", name: "mine"}
    (out / name).unlink()
    run(backbone, out, pairs=translations(4), max_steps=1)


def test_two_runs_in_one_folder(backbone, tmp_path):
    """While one goes on, another does not write there."""
    settings, told = dict(pairs=translations(8), max_steps=3), []
    other = trainer(backbone, tmp_path / "run", **settings)

    def meanwhile(record):
        with pytest.raises(FileExistsError, match="run is being written by a run that goes on now") as error:
            other.train(resume_from_checkpoint=True)
        told.append(error)

    run(backbone, tmp_path / "run", on_step=meanwhile, **settings)
    assert len(told) == 3 and not list((tmp_path / "run").glob(".*"))
    other.train(resume_from_checkpoint=True)  # now it may


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_what_peft_wrote(backbone, tmp_path, kind):
    """No task and no projection; the backbone is the one that it names."""
    model, tokenizer = load_backbone(backbone, "cpu")
    configs = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    theirs = peft.get_peft_model(model, configs[kind](task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    learner = load_learner(tmp_path / "adapter", device="cpu")
    assert learner.task is None and learner.alignment is None and learner.adapter.method == kind
    found = learner.vectors(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        inputs = {name: torch.tensor([row]) for name, row in tokenizer(text).items() if name != "token_type_ids"}
        hidden = theirs(**inputs).last_hidden_state[0, -inputs["input_ids"].shape[1] :]
        torch.testing.assert_close(vector, hidden.mean(0).detach(), rtol=1e-4, atol=1e-5)
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match="backbone must be given for .*adapter, whose adapter_config.json does not name"
    ):
        load_learner(tmp_path / "adapter", device="cpu")
    assert torch.equal(load_learner(tmp_path / "adapter", device="cpu", backbone=backbone).vectors(TEXTS), found)


def test_a_prompt_of_ours_alone(backbone, tmp_path):
    """A folder of `PromptModel.save_pretrained` has all that the prompt is."""
    model = PromptModel(build("bert", dtype=torch.float32, num_hidden_layers=2), PromptConfig("prefix", 3, layers=[1]))
    model.save_pretrained(tmp_path)
    learner = load_learner(tmp_path, device="cpu", backbone=backbone)
    assert torch.equal(learner.adapted.prompted.prompt.weight, model.prompt.weight)
    assert learner.adapted.prompted.prompt.layers == [1]


def test_curves_and_summary(tmp_path):
    """Alignment may come before the task; a run may have one step."""
    record = {"step": 1, "loss": 1.0, "alignment": 1.0, "seconds": 0.1}
    records = [record, record | {"step": 2, "task": 0.5}]
    for part in (records, records[1:]):
        draw_curves(tmp_path, part)
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    about = write_summary(tmp_path, records, 5, True, {"counts": {}})
    assert json.loads((tmp_path / "summary.json").read_text()) == about
    assert (about["steps"], about["planned_steps"], about["stopped"], about["loss"]) == (2, 5, True, 1.0)


def test_what_is_written_is_on_the_disk_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    write_text(tmp_path / "a", "text")
    assert done == ["file", "name", "folder"]


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(backbone, tmp_path, monkeypatch):
    """And the metrics that lead to it."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda d: (done.append(os.path.basename(os.readlink(f"/proc/self/fd/{d}"))), fsync(d))
    )
    monkeypatch.setattr(os, "replace", lambda *names: (done.append(("name", str(names[1]))), replace(*names)))
    run(backbone, tmp_path / "run", pairs=translations(4), max_steps=1)
    named = done.index(("name", str(tmp_path / "run" / "checkpoint-1")))
    files = {path.name for path in (tmp_path / "run" / "checkpoint-1").iterdir()} | {"metrics.jsonl"}
    assert files <= set(done[:named]) and done[named + 1] == "run"
