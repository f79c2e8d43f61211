"""A run that is stopped or killed goes on to the same bytes; only the same run does, and none is overwritten."""

import os
import shutil
import signal

import pytest
import torch
from helpers import paraphrases, save_backbone, translations
from runs import equal, run, summary, trainer, written
from simple_task import Classes
from transformers import trainer_utils

from fastprompt._files import read_tensors
from fastprompt.models.load import load_backbone
from fastprompt.training import AlignmentConfig, load_learner
from fastprompt.training.callbacks import Metrics
from fastprompt.training.checkpoints import KeepsCheckpoints
from fastprompt.training.run import last_checkpoint


class Killed(Exception):
    """Nothing of the process is run any more."""


def stops(at: int, how):
    """What is called after each step, and ends the run at one."""

    def stop(record):
        if record["step"] == at:
            if how is Killed:
                raise Killed
            os.kill(os.getpid(), how)

    return stop


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory):
    """Unbroken runs by their settings, each made once."""
    made = {}

    def get(**settings):
        key = repr(sorted(settings.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("whole")
            made[key] = run(backbone, out / "run", **given(**settings)), out / "run"
        return made[key]

    return get


def given(task=True, pairs=True, **settings):
    """Three epochs of four steps."""
    data = {"pairs": translations(7 if task else 29)} if pairs else {}
    if task:
        data |= {"task": Classes(), "train_dataset": paraphrases(8), "eval_dataset": paraphrases(6, 1)}
        data |= {"per_device_train_batch_size": 2}
    return data | settings


ALONE = {"task": False}


@pytest.mark.parametrize(
    ("at", "how", "settings", "first"),
    [
        (1, signal.SIGINT, ALONE, 2),
        (6, Killed, ALONE, 5),
        (6, signal.SIGTERM, ALONE, 7),
        (8, signal.SIGINT, ALONE, 9),
        (7, signal.SIGINT, ALONE | {"max_tokens": 60, "method": "prompt"}, 8),
        (7, Killed, ALONE | {"max_tokens": 60, "layers": [1], "cache_layers": True}, None),
        (5, signal.SIGINT, {"alignment": AlignmentConfig(form="task", warmup_steps=3)}, 6),
        (6, Killed, {"alignment": AlignmentConfig(layer=1)}, 5),
        (6, Killed, {"method": "lora"}, 5),
        (7, signal.SIGINT, {"method": "full"}, 8),
        (5, signal.SIGTERM, {"max_steps": 8, "eval_steps": 2}, 6),
        (4, signal.SIGINT, {"max_steps": 8, "eval_steps": 2}, 5),
        (3, signal.SIGINT, {"gradient_accumulation_steps": 3, "pairs": False}, 4),
        (5, Killed, {"max_steps": 6, "eval_steps": 1, "save_total_limit": 1, "dataloader_num_workers": 1}, 5),
    ],
)
def test_it_goes_on_to_the_same_bytes(backbone, tmp_path, whole, at, how, settings, first):
    unbroken, folder = whole(**settings)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    settings, out = given(**settings), tmp_path / "run"
    broken = trainer(backbone, out, on_step=stops(at, how), **settings)
    if how is Killed:
        with pytest.raises(Killed):
            broken.train()
        assert not (out / "summary.json").exists()
    else:
        broken.train()
        assert broken.stopped and len(broken.records) == at
        assert (summary(out)["steps"], summary(out)["stopped"]) == (at, True)
        assert last_checkpoint(out).name == f"checkpoint-{at}" and (out / "trained.safetensors").is_file()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    steps = []
    resumed = run(backbone, out, resume=True, on_step=lambda record: steps.append(record["step"]), **settings)
    assert first is None or steps[0] == first
    assert equal(unbroken, resumed) and not resumed.stopped
    assert written(folder) == written(out) == [record | {"seconds": 0} for record in resumed.records]
    assert len({read_tensors(each / "trained.safetensors").digest for each in (out, folder)}) == 1
    assert summary(out)["steps"] == summary(folder)["steps"] and not list(out.glob(".*"))


def test_a_longer_run_goes_on(backbone, tmp_path):
    settings = given(task=False)
    run(backbone, tmp_path / "run", **settings)
    again = run(backbone, tmp_path / "run", resume=True, **settings)
    assert len(again.records) == 12
    longer = run(backbone, tmp_path / "run", resume=True, **settings | {"num_train_epochs": 4})
    assert len(longer.records) == len(written(tmp_path / "run")) == 16 and summary(tmp_path / "run")["steps"] == 16


def killed(backbone, out):
    torch.set_num_threads(1)  # OpenMP's do not live on in a fork
    run(backbone, out, on_step=stops(6, signal.SIGKILL), **given(task=False))


def test_a_real_kill(backbone, tmp_path, whole, processes):
    """kill -9, after the second step of the second epoch."""
    out = tmp_path / "run"
    process = processes.Process(target=killed, args=(backbone, out))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(written(out)) == 6 and last_checkpoint(out).name == "checkpoint-4"
    unbroken, folder = whole(task=False)
    resumed = run(backbone, out, resume=True, **given(task=False))
    assert equal(unbroken, resumed) and written(out) == written(folder)


@pytest.mark.parametrize("file", ["optimizer.pt", "renamed"])
def test_killed_while_a_checkpoint_is_written(backbone, tmp_path, whole, monkeypatch, file):
    """It is aside until it is whole: the one before it counts."""
    whole_file = file == "renamed"
    owner, name = (trainer_utils, "rotate_checkpoints") if whole_file else (KeepsCheckpoints, "_keep_callbacks")
    settings, out, calls, write = given(task=False), tmp_path / "run", [], getattr(owner, name)

    def dies(*args, **more):
        write(*args, **more)
        calls.append(None)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dies)
        run(backbone, out, **settings)
    assert last_checkpoint(out).name == ("checkpoint-8" if whole_file else "checkpoint-4")
    assert (out / ".checkpoint-8" / "optimizer.pt").exists() != whole_file
    resumed = run(backbone, out, resume=True, **settings)
    assert equal(whole(task=False)[0], resumed) and not list(out.glob(".*"))


def test_a_folder_that_moved(backbone, tmp_path, whole, monkeypatch):
    """The run's, with the best checkpoint in it, and the backbone's."""
    settings = given(max_steps=8, eval_steps=2)
    with pytest.raises(Killed):
        run(backbone, tmp_path / "run", on_step=stops(7, Killed), **settings)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    moved = shutil.copytree(backbone, tmp_path / "backbone")
    resumed = run(str(moved), tmp_path / "elsewhere", resume=True, **settings)
    unbroken, folder = whole(max_steps=8, eval_steps=2)
    assert equal(unbroken, resumed) and written(folder) == written(tmp_path / "elsewhere")
    assert not (tmp_path / "run").exists()


def test_the_patience_that_is_left(backbone, tmp_path, monkeypatch):
    """Four evaluations without a better one: two before it was killed, two after."""
    values = [60.0, 50.0, 50.0, 40.0, 50.0, 90.0]
    left = []
    monkeypatch.setattr(Classes, "scores", lambda *_: {"accuracy": left.pop(0)})
    settings = given(pairs=False, max_steps=6, eval_steps=1, early_stopping_patience=4)
    left[:] = values
    whole = run(backbone, tmp_path / "whole", **settings)
    assert len(whole.records) == 5
    left[:] = values
    with pytest.raises(Killed):
        run(backbone, tmp_path / "run", on_step=stops(4, Killed), **settings)
    left[:] = values[3:]
    resumed = run(backbone, tmp_path / "run", resume=True, **settings)
    assert written(tmp_path / "whole") == written(tmp_path / "run") and equal(whole, resumed)
    with pytest.raises(ValueError, match="early_stopping_patience must be as in the run to resume .*: 4, got 2"):
        run(backbone, tmp_path / "run", resume=True, **settings | {"early_stopping_patience": 2})


def test_metrics_of_several_steps_read_at_a_time(backbone, tmp_path, whole, monkeypatch):
    """As on a GPU."""
    unbroken, folder = whole(task=False)
    reads, read = [], Metrics.read
    monkeypatch.setattr(Metrics, "due", property(lambda metrics: len(metrics._waiting) == 3))
    monkeypatch.setattr(Metrics, "read", lambda metrics: reads.append(read(metrics)) or reads[-1])
    settings, out = given(task=False), tmp_path / "run"
    run(backbone, out, on_step=stops(6, signal.SIGINT), **settings)  # after step 7, when it is told of the sixth
    assert [len(records) for records in reads if records] == [3, 1, 3]
    resumed = run(backbone, out, resume=True, **settings)
    assert equal(unbroken, resumed) and written(folder) == written(out)


def test_a_run_is_not_overwritten_and_only_the_same_is_resumed(backbone, tmp_path):
    out, settings = tmp_path / "run", given(max_steps=2)
    with pytest.raises(FileNotFoundError, match=r"run must be the folder of a run, run\.json is not there"):
        run(backbone, out, resume=True, **settings)
    run(backbone, out, **settings)
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match="output_dir .*run holds a run already: resume it, or choose another"):
        run(backbone, out, **settings)
    model, tokenizer = load_backbone(backbone, "cpu")
    word = tokenizer(paraphrases(1)[0].text)["input_ids"][1]
    model.get_input_embeddings().weight.data[word] += 1
    for change, message in (
        ({"head_learning_rate": 0.5}, "head_learning_rate must be as in the run to resume in .*run: 0.01, got 0.5"),
        ({"cache_layers": True}, "cache_layers must be as in the run"),
        ({"adam_beta2": 0.9}, "adam_beta2 must be as in the run"),
        ({"num_virtual_tokens": 5}, "num_virtual_tokens must be as in the run to resume in .*: 4, got 5"),
        ({"max_length": 29}, "max_length must be as in the run"),
        ({"alignment": AlignmentConfig(weight=2.0)}, r"alignment weight must be as in the run .*: 1.0, got 2.0"),
        ({"task": Classes(["1", "0"])}, r"task settings must be as in the run .*\['0', '1'\].*, got .*\['1', '0'\]"),
        ({"train_dataset": paraphrases(8, seed=1)}, "^data must be as in the run"),
        ({"pairs": translations(7, seed=1)}, "data must be as in the run"),
        ({"eval_dataset": paraphrases(5, seed=1)}, "eval_data must be as in the run"),
        ({"pairs": None}, "alignment .*must be as in the run .* got None"),
        ({"dtype": "bfloat16"}, "backbone dtype must be as in the run .*: 'float32', got 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(backbone, out, resume=True, **settings | change)
    for other in (model, save_backbone("bert", tmp_path / "other", num_hidden_layers=2, seed=1)):
        more = {"processing_class": tokenizer} if other is model else {}
        with pytest.raises(ValueError, match="backbone must be as in the run"):
            run(other if other is model else str(other), out, resume=True, **settings, **more)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == files


def test_killed_before_the_first_checkpoint(backbone, tmp_path, whole):
    with pytest.raises(Killed):
        run(backbone, tmp_path / "run", on_step=stops(2, Killed), **given(task=False))
    with pytest.raises(FileNotFoundError, match="holds nothing that was trained: the run ended before its first"):
        load_learner(tmp_path / "run", device="cpu")
    assert equal(whole(task=False)[0], run(backbone, tmp_path / "run", resume=True, **given(task=False)))


def test_resume_as_an_argument(backbone, tmp_path, whole):
    """Where transformers' own has it."""
    settings, out = given(task=False), tmp_path / "run"
    with pytest.raises(Killed):
        run(backbone, out, on_step=stops(6, Killed), **settings)
    for checkpoint in ("True", str(out)):
        made = trainer(backbone, out, resume_from_checkpoint=checkpoint, **settings)
        with pytest.raises(
            FileNotFoundError, match=f"resume_from_checkpoint must be .* of a checkpoint, got {checkpoint}"
        ):
            made.train()
    made = trainer(backbone, out, resume_from_checkpoint=str(out / "checkpoint-4"), **settings)
    made.train()
    assert equal(whole(task=False)[0], made)
