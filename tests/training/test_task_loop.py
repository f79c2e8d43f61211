"""Training on a task: what it learns, when it stops, what it keeps, and that nothing is lost on the way."""

import json
import math
import os
import signal

import pytest
import torch
from helpers import paraphrases, questions, save_backbone, translations, write_examples, write_questions
from typer.testing import CliRunner

from fastprompt import cli
from fastprompt.models.methods import METHODS
from fastprompt.tasks.parallel import Pair
from fastprompt.training import encoding
from fastprompt.training.metrics import Metrics
from fastprompt.training.run import Run
from fastprompt.training.task_config import TaskConfig
from fastprompt.training.task_evaluation import evaluate_task, write_predictions
from fastprompt.training.task_learner import TaskLearner
from fastprompt.training.task_loop import draw, train_task
from fastprompt.training.tasks import PairClassification

SMALL = dict(num_virtual_tokens=3, max_length=40, stride=8, steps=6, batch_size=4, evaluate_every=2, lr=3e-2)
SMALL |= dict(head_lr=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone("bert", tmp_path_factory.mktemp("backbone"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "training"


def run(folder, out=None, examples=None, validation=(), pairs=(), on_step=None, resume=False, **settings):
    config = TaskConfig(**(SMALL | settings))
    if examples is None:
        examples = questions(6) if config.task == "xquad" else paraphrases(8)
    loaded = encoding.load_backbone(str(folder), causal_head=config.task != "retrieval")
    return train_task(*loaded, examples, validation, config, out, pairs=pairs, resume=resume, on_step=on_step)


def equal(one: TaskLearner, two: TaskLearner) -> bool:
    states = (learner.state_dict() for learner in (one, two))
    return all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


@pytest.mark.parametrize(("task", "steps"), [("pawsx", 60), ("xquad", 50)])
def test_a_prefix_learns_a_few_examples_by_heart(folder, task, steps):
    examples = questions(6) if task == "xquad" else paraphrases(8)
    learner, records = run(folder, task=task, steps=steps, batch_size=8, lr=0.1, head_lr=2e-2, evaluate_every=steps)
    losses = [record["task"] for record in records]
    assert losses[-1] < 0.3 * losses[0]
    scores = learner.task.scores(examples, learner.predict(examples), "en")
    assert scores[learner.task.metric] == 100.0
    for name, tensor in encoding.load_backbone(str(folder))[0].state_dict().items():
        assert torch.equal(learner.adapted.backbone.state_dict()[name], tensor), name


@pytest.mark.parametrize("task", ["pawsx", "xquad"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_all_it_should_and_nothing_else(folder, task, method):
    torch.manual_seed(0)
    before = TaskLearner(*encoding.load_backbone(str(folder)), TaskConfig(**SMALL, task=task, method=method))
    learner, records = run(folder, task=task, method=method, steps=4)
    trained = learner.trained()
    assert len(records) == 4 and all(math.isfinite(record["loss"]) for record in records)
    old = before.state_dict()
    changed = {name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, old[name])}
    ids = {id(parameter) for parameter in trained.values()}
    allowed = {name for name, p in learner.named_parameters(remove_duplicate=False) if id(p) in ids}
    assert changed <= allowed and all(name in changed for name in trained if "embeddings" not in name)


def test_the_loss_is_the_sum_of_its_weighted_parts(folder):
    settings = dict(alignment=0.5, alignment_schedule="linear", steps=10, alignment_first=3)
    _, records = run(folder, pairs=translations(9), **settings)
    assert len(records) == 13 and [record["step"] for record in records] == list(range(1, 14))
    for step, record in enumerate(records):
        assert ("task" in record) == (step >= 3)
        weight = 0.5 * (1.0 if step < 3 else 1 - (step - 3) / 10)
        expected = record.get("task", 0.0) + weight * record["alignment"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert [record["step"] for record in records if "validation" in record] == []


@pytest.mark.parametrize("form", ["sentence", "task"])
def test_alignment_beside_the_task_lowers_both(folder, form):
    settings = dict(alignment=1.0, alignment_form=form, steps=40, projection_lr=1e-2, batch_size=8)
    _, records = run(folder, pairs=translations(16), **settings)
    for part in ("task", "alignment"):
        losses = [record[part] for record in records]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), part


def test_no_pair_is_its_own_rival(folder, monkeypatch):
    sizes = []
    loss = TaskLearner.loss
    monkeypatch.setattr(
        TaskLearner,
        "loss",
        lambda self, items, aligned, teacher: (
            sizes.append(sorted(each.parts[0][2] for each in aligned)) or loss(self, items, aligned, teacher)
        ),
    )
    run(folder, pairs=translations(5), alignment=1.0, alignment_batch_size=16, steps=2)
    run(folder, pairs=translations(5), alignment=1.0, alignment_batch_size=3, steps=5)
    assert sizes[:2] == [[0, 1, 2, 3, 4]] * 2
    assert all(len(set(each)) == len(each) for each in sizes) and {n for each in sizes[2:] for n in each} == {*range(5)}


def scores_of(monkeypatch, values):
    """The validation score of each evaluation, instead of what it would be."""
    left = iter(values)
    monkeypatch.setattr(TaskLearner, "predict", lambda self, examples: {})
    monkeypatch.setattr(PairClassification, "scores", lambda self, *_: {"accuracy": next(left)})


def test_early_stopping_and_the_best_weights(folder, tmp_path, monkeypatch):
    kept = {}

    def keep(record):
        kept[record["step"]] = {name: p.detach().clone() for name, p in seen[-1].trained().items()}

    seen = []
    make = TaskLearner.__init__
    monkeypatch.setattr(TaskLearner, "__init__", lambda self, *args: (make(self, *args), seen.append(self))[0])
    scores_of(monkeypatch, [30.0, 60.0, 60.0, 50.0, 40.0, 90.0])
    settings = dict(steps=20, patience=3, validation=paraphrases(4, 1))
    learner, records = run(folder, tmp_path / "run", on_step=keep, **settings)
    assert [record.get("validation") for record in records[1::2]] == [30.0, 60.0, 60.0, 50.0, 40.0]
    assert len(records) == 10
    for name, parameter in learner.trained().items():
        assert torch.equal(parameter, kept[4][name]), name
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["planned_steps"], summary["stopped"]) == (10, 20, False)
    again, records = run(folder, tmp_path / "run", resume=True, **settings)  # it had stopped: no step more
    assert len(records) == 10 and equal(again, learner)


def test_without_validation_the_last_step_counts(folder):
    learner, records = run(folder, steps=5, patience=1)
    longer, _ = run(folder, steps=5, evaluate_every=5)
    assert len(records) == 5 and equal(learner, longer)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("at", "how", "settings"),
    [
        (1, "killed", {}),
        (1, "interrupted", {}),
        (5, "killed", {"alignment_form": "task"}),
        (5, "interrupted", {"alignment_form": "task"}),
        (6, "killed", {"method": "lora"}),
        (5, "killed", {"alignment_layer": 1}),
        (6, "interrupted", {"method": "full"}),
    ],
)
def test_resume_gives_what_an_unbroken_run_gives(folder, tmp_path, at, how, settings):
    settings = settings | dict(alignment=1.0, pairs=translations(7), validation=paraphrases(6, 1), steps=8)
    whole, records = run(folder, tmp_path / "whole", **settings)

    def stop(record):
        if record["step"] == at:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)

    out, steps = tmp_path / "broken", []
    if how == "killed":
        with pytest.raises(Killed):
            run(folder, out, on_step=stop, **settings)
    else:
        run(folder, out, on_step=stop, **settings)
        summary = json.loads((out / "summary.json").read_text())
        assert summary["steps"] == at and summary["stopped"]
        assert (out / "trained.safetensors").is_file()
    resumed, again = run(folder, out, resume=True, on_step=lambda record: steps.append(record["step"]), **settings)
    assert steps[0] == (at + 1 if how == "interrupted" else (at - 1) // 2 * 2 + 1)
    assert equal(whole, resumed)
    lines = [[json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "metrics.jsonl").open()]
             for name in ("whole", "broken")]  # fmt: skip
    assert lines[0] == lines[1] == [record | {"seconds": 0} for record in records]
    assert len(again) == len(records)


def test_killed_between_the_two_files_of_a_state(folder, tmp_path, monkeypatch):
    whole, _ = run(folder, tmp_path / "whole")
    calls = []

    def dies(write):
        def wrapped(*args, **more):
            write(*args, **more)
            calls.append(None)
            if len(calls) == 4:  # one at the beginning, two of the first evaluation, and the first of the second
                raise Killed

        return wrapped

    with monkeypatch.context() as patch, pytest.raises(Killed):
        for name in ("save_state", "write_records"):
            patch.setattr(Run, name, dies(getattr(Run, name)))
        run(folder, tmp_path / "broken")
    resumed, records = run(folder, tmp_path / "broken", resume=True)
    assert equal(whole, resumed) and [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_learning_rates(folder, monkeypatch):
    """Up over the first tenth of the steps and down to 0 at the end, each from its own height."""
    rates, step = [], torch.optim.AdamW.step

    def watched(optimizer, *args):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    settings = dict(lr=0.5, head_lr=0.25, projection_lr=0.125, weights_lr=1.0, norms=True)
    run(folder, steps=18, alignment=1.0, alignment_first=2, pairs=translations(3), **settings)
    rise = [0.5, 1.0]
    fall = [1 - n / 18 for n in range(18)]
    assert [group[0] / 0.5 for group in rates] == pytest.approx(rise + fall)
    assert rates[1] == [0.5, 1.0, 0.25, 0.125]


def test_the_folder_of_a_run(folder, tmp_path):
    out = tmp_path / "run"
    _, records = run(folder, out, validation=paraphrases(6, 1), alignment=1.0, alignment_first=2, pairs=translations(5))
    assert {file.name for file in out.iterdir()} == {
        *("run.json", "metrics.jsonl", "summary.json", "curves.png", "training_state.pt", "trained.safetensors"),
        *("adapter_config.json", "adapter_model.safetensors", "fastprompt_config.json"),
    }
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line) for line in (out / "metrics.jsonl").open()] == records
    assert {"step", "loss", "alignment", "task", "gradient_norm", "seconds", "validation"} == set(records[-1])
    assert [record["step"] for record in records if "validation" in record] == [4, 6, 8]
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(folder, out)
    bare = tmp_path / "bare"
    run(folder, bare, method="head")
    assert "adapter_config.json" not in {file.name for file in bare.iterdir()}


def test_only_the_same_run_is_resumed(folder, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        run(folder, out, resume=True)
    run(folder, out)
    with pytest.raises(ValueError, match=r"head_lr must be as in the run to resume .*: 0.01, got 0.5"):
        run(folder, out, resume=True, head_lr=0.5)
    with pytest.raises(ValueError, match="data must be as in the run"):
        run(folder, out, examples=paraphrases(8, seed=1), resume=True)
    with pytest.raises(ValueError, match="data must be as in the run"):
        run(folder, out, validation=paraphrases(2), resume=True)
    with pytest.raises(ValueError, match="backbone must be as in the run"):
        run(save_backbone("bert", tmp_path / "other", seed=1), out, resume=True)


def test_the_backbone_is_told_by_the_words_of_the_examples(folder, tmp_path):
    run(folder, tmp_path / "run")
    changed, tokenizer = encoding.load_backbone(str(folder))
    ids = tokenizer(paraphrases(8)[0].sentence1)["input_ids"]
    changed.get_input_embeddings().weight.data[ids[1]] += 1
    with pytest.raises(ValueError, match="backbone must be as in the run"):
        train_task(changed, tokenizer, paraphrases(8), (), TaskConfig(**SMALL), tmp_path / "run", resume=True)


@pytest.mark.parametrize("task", ["xquad", "mlqa"])
def test_without_the_head(folder, task):
    learner, _ = run(folder, task=task, examples=questions(5), train_head=False)
    assert set(learner.trained()) == {"adapted.prompted.prompt.weight"}
    assert torch.equal(learner.task.match, torch.eye(48).repeat(2, 1, 1)) and not learner.task.head.weight.any()


def test_first_layers_only(folder, tmp_path):
    learner, _ = run(folder, tmp_path / "run", num_layers=2, pairs=translations(4), alignment=1.0)
    assert len(learner.adapted.layers) == 2 and learner.adapted.prompted.prompt.layers == [0, 1]
    evaluated = evaluate_with(folder, tmp_path, paraphrases(5, 3))
    assert evaluated == learner.predict(paraphrases(5, 3))


def evaluate_with(folder, tmp_path, examples) -> dict:
    """Predictions of the run in tmp_path/run, for a test set written as PAWS-X's."""
    write_examples(tmp_path / "test-de.tsv", examples)
    loaded = encoding.load_backbone(str(folder), causal_head=True)
    _, predictions = evaluate_task(*loaded, tmp_path / "run", tmp_path, ["de"], "test")
    return dict(zip((example.id for example in examples), predictions["de"].values(), strict=True))


@pytest.mark.parametrize("task", ["pawsx", "xquad"])
def test_evaluation_gives_what_training_saw(folder, tmp_path, task):
    """And `fastprompt score` gives the same of the written predictions."""
    examples = paraphrases(12, 5) if task == "pawsx" else questions(6, seed=5)
    data = tmp_path / ("test-de.tsv" if task == "pawsx" else "xquad.de.json")
    (write_examples if task == "pawsx" else write_questions)(data, examples)
    learner, records = run(folder, tmp_path / "run", task=task, validation=examples, steps=20, evaluate_every=4)
    loaded = encoding.load_backbone(str(folder), causal_head=True)
    scores, predictions = evaluate_task(*loaded, tmp_path / "run", tmp_path, ["de"], "test")
    best = max(record["validation"] for record in records if "validation" in record)
    assert scores["de"][learner.task.metric] == pytest.approx(best)
    assert list(predictions["de"].values()) == list(learner.predict(examples).values())
    write_predictions(tmp_path / "deep" / "predictions", predictions)
    (written,) = (tmp_path / "deep" / "predictions").iterdir()
    assert written.name == ("de.txt" if task == "pawsx" else "de.json")
    arguments = ["score", task, "--data", data, "--predictions", written, "--json", tmp_path / "scores.json"]
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "scores.json").read_text()) == pytest.approx(scores["de"])


def test_only_runs_on_a_task_are_evaluated(folder, tmp_path):
    loaded = encoding.load_backbone(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="adapter .*empty must be the folder of a run on a task"):
        evaluate_task(*loaded, tmp_path / "empty", tmp_path, ["de"], "test")


def test_retrieval(folder):
    pairs, tests = translations(24), translations(12, seed=1)
    settings = dict(task="retrieval", alignment=1.0, steps=60, evaluate_every=60, projection_lr=1e-2)
    learner, records = run(folder, examples=pairs, validation=tests, **settings)
    frozen, before = run(folder, examples=pairs, validation=tests, **settings | dict(steps=1, lr=0, projection_lr=0))
    assert records[-1]["validation"] > before[-1]["validation"] + 0.3
    assert records[-1]["loss"] == records[-1]["alignment"] and records[-1]["loss"] < 0.5 * records[0]["loss"]
    # The English vectors are those of the backbone as it came.
    same = [pair._replace(target=pair.source) for pair in tests]
    assert frozen.task.scores(same, frozen.predict(same), "cy")["cosine"] < 1 - 1e-4  # the prefix acts
    head, _ = run(folder, examples=pairs, validation=tests, **settings | dict(method="head", steps=1, projection_lr=0))
    assert head.task.scores(same, head.predict(same), "cy")["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_examples_are_drawn(folder):
    examples = paraphrases(20)
    few, more = draw(examples, 4, 3), draw(examples, 9, 3)
    assert few == more[:4] and len(set(more)) == 9 and draw(examples, 9, 4) != more
    assert draw(examples, None, 3) == examples
    with pytest.raises(ValueError, match="examples must be at most 20, as many as there are, got 21"):
        draw(examples, 21, 0)
    one, _ = run(folder, examples=examples, **{"steps": 2})
    other, _ = run(folder, examples=draw(examples, 4, 0), steps=2)
    drawn, _ = train_task(
        *encoding.load_backbone(str(folder)), examples, (), TaskConfig(**SMALL | dict(steps=2), examples=4)
    )
    assert equal(other, drawn) and not equal(one, drawn)


def test_metrics_of_several_steps_read_at_a_time(folder, tmp_path, monkeypatch):
    settings = dict(alignment=1.0, pairs=translations(7), validation=paraphrases(6, 1), steps=8)
    whole, records = run(folder, **settings)

    def stop(record):
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Metrics, "due", property(lambda metrics: len(metrics._waiting) == 3))
    run(folder, tmp_path / "late", on_step=stop, **settings)
    late, again = run(folder, tmp_path / "late", resume=True, **settings)
    assert equal(whole, late)
    assert [record | {"seconds": 0} for record in again] == [record | {"seconds": 0} for record in records]


def test_loss_that_is_no_number(folder, monkeypatch):
    loss = TaskLearner.loss
    spoilt = lambda *args: {name: part * math.nan for name, part in loss(*args).items()}  # noqa: E731
    monkeypatch.setattr(TaskLearner, "loss", spoilt)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1: try a smaller lr"):
        run(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"examples": []}, "examples must hold at least one example, got none"),
        ({"examples": 9}, "examples must be at most 8, as many as there are, got 9"),
        ({"pairs": translations(3)}, "pairs and an alignment above 0 go together, got 3 and 0.0"),
        ({"alignment": 1.0}, "pairs and an alignment above 0 go together, got 0 and 1.0"),
        ({"max_length": 62}, "max_length must be at most 61"),
        ({"top_layers": 4}, r"top_layers must be in \[0, 3\]"),
        ({"layers": [5]}, "layers must be indices of the backbone's 3 layers, got 5"),
        ({"task": "xquad", "stride": 37}, "stride must be from 0 to below 3"),
        (
            {"task": "xquad", "answers": "elsewhere"},
            "examples must have answers that stand in their contexts, got none",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(folder, tmp_path, given, message):
    given = dict(given)
    if given.pop("answers", None):
        given["examples"] = [each._replace(answers=[each.answers[0]._replace(text="no")]) for each in questions(3)]
    if isinstance(given.get("examples"), int):
        config = TaskConfig(**SMALL, examples=given.pop("examples"))
        with pytest.raises(ValueError, match=message):
            train_task(*encoding.load_backbone(str(folder)), paraphrases(8), (), config, tmp_path / "run")
    else:
        with pytest.raises(ValueError, match=message):
            run(folder, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_pair_alone(folder):
    _, records = run(folder, pairs=[Pair("w1 w2", "w21")], alignment=1.0, alignment_batch_size=2, distance="cosine")
    assert all(math.isfinite(record["alignment"]) for record in records)
