"""The command line: its options are those of the dataclasses, and one clear line for each thing that is wrong."""

import dataclasses
import subprocess
import sys
import types
import typing

import pytest
from typer.testing import CliRunner

from fastprompt import cli
from fastprompt._settings import check_fields
from fastprompt.cli import settings, train
from fastprompt.cli.settings import Places, from_run, options, plan, read_config, with_places


def call(*arguments, **more):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **more)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch):
    """What `train` would start with."""
    found = {}

    def start(given, device):
        found.update(given, device=device)
        raise ValueError("enough")

    monkeypatch.setattr(train, "start", start)
    return found


def test_options_are_the_fields():
    """What is read off the source is what the classes have."""
    from fastprompt.models.methods import AdapterConfig
    from fastprompt.tasks.base import InputConfig
    from fastprompt.training.alignment import AlignmentConfig
    from fastprompt.training.arguments import TrainingArguments

    found = {each.name: each for each in options()}
    assert len(found) == len(options())
    names = {field: option for field, option in settings.ALIGNMENT.items()}
    for kind in (Places, AdapterConfig, InputConfig, AlignmentConfig, TrainingArguments):
        for field in dataclasses.fields(kind):
            option = found.get(names[field.name] if kind is AlignmentConfig else field.name)
            if option is None:
                assert kind is TrainingArguments, field.name
                continue
            assert (option.panel == "Training") == (kind is TrainingArguments), field.name
            assert (option.field.default, option.field.metadata) == (field.default, field.metadata)
            hint = typing.get_type_hints(kind)[field.name]
            hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            (kind_of,) = set(hints) - {types.NoneType}
            name = str(kind_of) if typing.get_origin(kind_of) else kind_of.__name__
            assert option.type == name.removeprefix("collections.abc.")
    assert set(settings._TRAINING) <= {field.name for field in dataclasses.fields(TrainingArguments)}


def test_every_argument_of_transformers_has_a_type_that_is_checked():
    from fastprompt.training.arguments import TrainingArguments

    for field in dataclasses.fields(TrainingArguments):
        for value in ("x", 1, True, [1], {"a": 1}, None):
            try:
                check_fields(TrainingArguments, {field.name: value})
            except ValueError as error:
                assert str(error).startswith(f"{field.name} must be ")


def test_help_fits_a_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    short, whole = call("train", "--help").output, call("train", "--help-all").output
    assert len(short.splitlines()) <= 48 and max(map(len, short.splitlines())) <= 100
    for panel in ("Model and output", "Data", "What trains", "Inputs", "Training"):
        assert f"─ {panel} ─" in short
    assert "--learning-rate" in short and "--alignment-form" not in short
    for option in options():
        assert option.flag + " " in whole, option


def test_help_imports_no_torch():
    """It is there at once."""
    program = "import sys; from fastprompt import cli\ntry: cli.app(sys.argv[1:])\nexcept SystemExit: pass\n"
    program += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    for arguments in (["--help"], ["train", "--help-all"]):
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)


def test_version_and_info():
    from fastprompt import __version__

    done = subprocess.run([sys.executable, "-m", "fastprompt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastprompt {__version__}\n"
    assert "native libraries" in call("info").output


def test_without_the_extra():
    """A plain install has no typer: info works all the same, the rest says what to install."""
    program = "import sys, runpy; sys.modules['typer'] = None; sys.argv = ['fastprompt', *sys.argv[1:]]; "
    program += "runpy.run_module('fastprompt', run_name='__main__')"
    for command, code, said in (("info", 0, "native libraries"), ("train", 1, "pip install 'fastprompt[train]'")):
        done = subprocess.run([sys.executable, "-c", program, command], capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr


COMMON = ["train", "--backbone", "b", "--out", "run", "--parallel", "p.tsv"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--lr", 1, "--epochs=2", "--batch-size", 3, "--steps", 4, "--patience", 5],
         dict(learning_rate=1.0, num_train_epochs=2.0, per_device_train_batch_size=3, max_steps=4,
              early_stopping_patience=5)),
        (["--layers", "0,-1", "--no-train-head", "--norms"], dict(layers=[0, -1], train_head=False, norms=True)),
        (["--columns", "text=review, label=stars"], dict(columns={"text": "review", "label": "stars"})),
        (["--task-settings", "labels=[no, b],rate=1e-2"], dict(task_settings={"labels": ["no", "b"], "rate": 0.01})),
        (["--set", "adam_beta2=0.9", "--set", "fp16=true"], dict(set={"adam_beta2": 0.9, "fp16": True})),
        (["--alignment", 0.5, "--alignment-warmup-steps", 3], dict(alignment=0.5, alignment_warmup_steps=3)),
    ],
)  # fmt: skip
def test_values(place, started, arguments, found):
    done = call(*COMMON, *arguments)
    assert done.stderr == "fastprompt: error: enough\n"
    assert {name: started[name] for name in found} == found


def test_a_plan():
    """Each option reaches its own class."""
    found = plan(
        dict(out="run", backbone="b", parallel="p", layers=[1], max_length=9, alignment=0.5, distance="mse", seed=7)
        | {"set": {"adam_beta2": 0.9}, "learning_rate": 1}
    )
    assert (found.adapter.layers, found.inputs.max_length) == ([1], 9)
    assert (found.alignment.weight, found.alignment.distance) == (0.5, "mse")
    arguments = found.arguments
    assert (arguments.seed, arguments.adam_beta2, arguments.learning_rate) == (7, 0.9, 1)
    assert arguments.output_dir == "run"
    assert plan(dict(out="run", backbone="b", task="qa")).alignment is None


def write(place, text):
    (place / "a.yaml").write_text(text)
    return place / "a.yaml"


def test_a_file(place, started):
    text = "backbone: b\nout: run\ntask: qa\nlanguage: no\nlr: 1e-2\nnorms: yes\nlayers: [0, 1]\nset: {fp16: false}\n"
    text += "columns: {question: q}\ntrain: t.csv\ntask_settings: {labels: [a, b]}\nepochs: 3\nalignment: 1\n"
    call("train", "--config", write(place, text), "--epochs", 2, "--set", "fp16=true")
    assert started["language"] == "no" and started["learning_rate"] == 0.01 and started["norms"] is True
    assert started["layers"] == [0, 1] and started["num_train_epochs"] == 2 and started["set"] == {"fp16": True}
    assert started["columns"] == {"question": "q"} and started["task_settings"] == {"labels": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "no such setting: learning_rat; did you mean learning_rate?"),
        ("kind: prompt", "no such setting: kind; it is now method"),
        ("resume: true", "resume must be given on the command line"),
        ("lr: fast", "learning_rate must be a number, got 'fast'"),
        ("lr: 1\nlearning_rate: 1", "learning_rate must be given once, got it by two names"),
        ("norms: 1", "norms must be true or false, got 1"),
        ("alignment: high", "alignment must be a number, got 'high'"),
        ("layers: first", "layers must be numbers joined by commas, such as 0,1,-1, got 'first'"),
        ("layers: [0.5]", "layers must be a list, each of it an integer or nothing, got [0.5]"),
        ("train: 5", "train must be a string or nothing, got 5"),
        ("columns: review", "columns must be names and values such as name=value, got 'review'"),
        ("set: 5", "set must be names and values, got 5"),
    ],
)
def test_one_clear_error_of_a_file(place, text, message):
    with pytest.raises(ValueError) as error:
        read_config(write(place, text))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--kind", "prefix"], "no such option: --kind; it is now --method", 2),
        (["--evaluate-every=3"], "no such option: --evaluate-every; it is now --eval-steps", 2),
        (["--nothing", "1"], "No such option: --nothing", 2),
        (["--lr", "1", "--learning-rate=2"], "--learning-rate must be given once, got it 2 times", 2),
        (["--lr", "fast"], "learning_rate must be a number, got 'fast'", 1),
        (["--max-length", "1.5"], "max_length must be an integer, got '1.5'", 1),
        (["--columns", "a=b,a=c"], "columns must have each name once, got 'a' twice", 1),
        (["--set", "lr"], "set must be a name and a value such as adam_beta2=0.99, got 'lr'", 1),
        (["--set", "seed=1"], "set must not have seed: it is an option of its own, --seed", 1),
        (["--set", "output_dir=a"], "set must not have output_dir: --out says where", 1),
        (["--set", "adam_beat2=1"], "got 'adam_beat2'; did you mean adam_beta2?", 1),
        (["--method", "prefx"], "method must be one of", 1),
        (["--device", "cuda:99"], "device must be one that is here, such as 'cpu', got 'cuda:99'", 1),
        (["--device", "abacus"], "device must be one that is here, such as 'cpu', got 'abacus'", 1),
        (["--config", "none.yaml"], "error: none.yaml: no such file", 1),
        (["--resume"], "out run holds no run to resume", 1),
    ],
)
def test_one_clear_error(place, arguments, message, code):
    done = call(*COMMON, *arguments)
    assert done.exit_code == code and message in done.stderr, done.output
    assert done.stderr.startswith("fastprompt: error: ") and done.stderr.count("\n") == 1
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "task or parallel must be given"),
        ({"parallel": "p", "train": "t"}, "train must not be given without a task"),
        ({"task": "qa"}, "train must be given for the task qa"),
        ({"task": "qa", "train": "t", "data": "d"}, "data is for xquad, mlqa, pawsx"),
        ({"task": "qa", "train": "t", "validation_parallel": "p"}, "validation_parallel must not be given without"),
        ({"task": "qa", "train": "t", "alignment_form": "task"}, "alignment_form must not be given without parallel"),
        ({"task": "qa", "train": "t", "third_column": "label"}, "third_column must not be given without parallel"),
    ],
)
def test_settings_that_go_together(given, message):
    from fastprompt.cli.data import read_data

    with pytest.raises(ValueError, match=message):
        read_data(plan(given | {"out": "run", "backbone": "b"}).places, given.get("task"))


def test_nothing_is_missing_or_overwritten(place):
    for arguments, message in (
        (["--out", "run"], "backbone must be given, with --backbone or in the file of --config"),
        (["--backbone", "b"], "out must be given, with --out or in the file of --config"),
        (["--resume"], "out must be given, with --out or in the file of --config"),
    ):
        assert message in call("train", "--parallel", "p.tsv", *arguments).stderr
    (place / "run").mkdir()
    (place / "run" / "run.json").write_text("{}")
    assert "out run holds a run already: go on with it by --resume" in call(*COMMON).stderr


def test_resume(place, monkeypatch):
    """Nothing need be given again; what is given must be as it was, but a run may be longer."""
    from fastprompt.training import run

    (place / "run").mkdir()
    (place / "run" / "run.json").write_text("{}")
    (place / "t.csv").write_text("")
    recorded = with_places({"backbone": "b", "task": "qa", "train": "t.csv", "learning_rate": 0.1})
    assert recorded["train"] == str(place / "t.csv")
    monkeypatch.setattr(run, "read_run", lambda folder: type("Info", (), {"data": recorded}))
    for given in ({}, with_places({"train": "./t.csv"}), {"language": "en"}, {"learning_rate": 0.1}):
        assert from_run(place / "run", given) == recorded | {"out": str(place / "run")}
    assert from_run(place / "run", {"max_steps": 9})["max_steps"] == 9
    for given in ({"learning_rate": 0.2}, {"train": "u.csv"}, {"norms": True}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must be as in the run in .*, or not given"):
            from_run(place / "run", given)
    recorded = None
    with pytest.raises(ValueError, match="holds a run that was started from Python"):
        from_run(place / "run", {})


def test_what_is_not_expected(monkeypatch):
    """A fault of ours, Ctrl-C, and the traceback for who asks for it."""

    def fails(error):
        def start(*_):
            raise error

        monkeypatch.setattr(train, "start", start)

    fails(RuntimeError("many\nlines"))
    done = call(*COMMON)
    assert (done.exit_code, done.stderr) == (1, "fastprompt: error: RuntimeError: many lines (--debug shows where)\n")
    for arguments in (["--debug", *COMMON], [*COMMON, "--debug"]):
        assert "Traceback" in call(*arguments).stderr
    assert "Traceback" not in call(*COMMON).stderr
    fails(KeyboardInterrupt())
    done = call(*COMMON)
    assert (done.exit_code, done.stderr) == (130, "fastprompt: stopped\n")
    done = call("evaluate", "--adapter", "run", "--data", "a.csv", "--test", "b.csv")
    assert done.exit_code == 2 and "--data must be given once, got it 2 times" in done.stderr
    done = call("tain")
    assert done.exit_code == 2 and done.stderr == "fastprompt: error: No such command 'tain'. Did you mean 'train'?\n"


def test_stopped_in_training(place, monkeypatch):
    class Stopped:
        stopped = True

        def add_callback(self, callback):
            pass

        def train(self, **_):
            pass

    monkeypatch.setattr(train, "start", lambda *_: Stopped())
    done = call(*COMMON)
    assert done.exit_code == 130 and done.output.endswith("Go on: fastprompt train --resume --out run\n")
    monkeypatch.setenv("RANK", "1")
    assert call(*COMMON).output == ""


def test_a_best_score_of_nothing(tmp_path):
    """The first of equal evaluations is kept, and where all are 0 that is next to no training."""
    adapter = types.SimpleNamespace(method="head", num_virtual_tokens=2, lora_rank=2)
    task = types.SimpleNamespace(name="tagging")
    learner = types.SimpleNamespace(adapter=adapter, task=task, alignment=None, trained=dict)
    summary = {"steps": 5, "loss": 1.0, "seconds_per_step": 0.1, "peak_memory_mb": 1.0}
    for best in (0.0, 50.0):
        state = types.SimpleNamespace(best_metric=best, best_global_step=1)
        args = types.SimpleNamespace(metric_for_best_model="f1")
        told = train.done(types.SimpleNamespace(learner=learner, state=state, args=args), summary, tmp_path)
        assert f"Best f1 on the validation data: {best:.4g}, at step 1." in told
        assert ("keep the last with --no-load-best-model-at-end" in told) == (best == 0)


def test_study(place, monkeypatch):
    """Each run is told when it begins and when it is done."""
    from fastprompt.experiments import config, report, study

    def run_study(settings, out, device, on_run):
        run = type("Run", (), {"method": "head", "variant": "", "examples": 4, "seed": 0})
        on_run(1, 1, run, None)
        on_run(1, 1, run, {"scores": {"en": {"accuracy": 50.0}, "de": {"accuracy": 60.0}}, "seconds": 2.0})

    monkeypatch.setattr(config, "read_study", lambda path, study: None)
    monkeypatch.setattr(study, "run_study", run_study)
    monkeypatch.setattr(report, "write_report", lambda out: (out / "report.html", out / "report.md"))
    done = call("study", "scarcity", "--config", "a.yaml", "--out", "out", "--device", "cpu")
    assert done.stdout.splitlines()[0] == "1/1 head 4 examples, seed 0: accuracy 55.00 (2 s)"
    assert done.stdout.splitlines()[1:] == ["out/report.html", "out/report.md"]
