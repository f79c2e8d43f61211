"""Trainer: what it learns, what it leaves alone, and what it says of it."""

import math
import pickle

import peft
import pytest
import torch
from helpers import CONFIGS, paraphrases, save_backbone, translations
from runs import equal, run, summary, trainer, written
from simple_task import Classes

from fastprompt import tasks
from fastprompt.data.examples import Pair, Text
from fastprompt.models.load import load_backbone
from fastprompt.models.methods import METHODS
from fastprompt.models.prompt_model import PromptModel
from fastprompt.training import AlignmentConfig, load_learner
from fastprompt.training import run as run_files
from fastprompt.training import trainer as trainer_module
from fastprompt.training.streams import fresh


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_alignment_alone(backbone, tmp_path, monkeypatch, method):
    """It learns, and the backbone is left as it was."""
    monkeypatch.setattr(trainer_module, "draw_curves", run_files.draw_curves)
    before = load_backbone(backbone)[0].state_dict()
    pairs, out = translations(29), tmp_path / "run"
    made = trainer(backbone, out, pairs=pairs, eval_pairs=pairs, method=method, num_train_epochs=8, learning_rate=0.05)
    frozen = made.evaluate()
    made.train()
    learner = made.learner
    after = learner.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(learner.trained()) == {"adapted.prompted.prompt.weight", "alignment.weight"}
    records = written(out)
    assert [record["step"] for record in records] == list(range(1, 33)) and records[-1]["steps"] == 32
    assert records[-1]["epoch"] == 8 and set(records[0]) == {
        *("step", "steps", "epoch", "loss", "alignment", "gradient_norm", "seconds")
    }
    losses = [record["loss"] for record in records]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert [record["step"] for record in records if "validation" in record] == list(range(4, 33, 4))
    best = max(record.get("validation", 0) for record in records)
    scores = made.evaluate()
    assert scores["eval_r@1"] == best == summary(out)["best"] > frozen["eval_r@1"] + 0.1
    assert {name for name in scores if name != "epoch"} == {"eval_r@1", "eval_r@5", "eval_cosine"}
    about = summary(out)
    assert about["steps"] == 32 and about["loss"] == losses[-1] and about["metric"] == "r@1"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    names = {file.name for file in out.iterdir() if not file.name.startswith("checkpoint-")}
    assert names == {
        *("run.json", "metrics.jsonl", "summary.json", "curves.png", "trained.safetensors", "README.md"),
        *("adapter_config.json", "adapter_model.safetensors", "fastprompt_config.json"),
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_and_peft_reads_the_result(family, tmp_path):
    folder = str(save_backbone(family, tmp_path / "backbone", num_hidden_layers=2, layer_types=None))
    pooling = "last" if family in ("llama", "gemma3_text") else "mean"
    made = run(folder, tmp_path / "run", pairs=translations(9), max_steps=2, pooling=pooling)
    theirs = peft.PeftModel.from_pretrained(load_backbone(folder)[0], tmp_path / "run").eval()
    ids = torch.tensor([[0, 7, 30, 2]])
    ours = made.learner.adapted(input_ids=ids)
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_task_alone_and_its_evaluation(backbone, tmp_path):
    """A few examples are learned by heart; rows are examples; what is loaded again says the same."""
    examples = paraphrases(8)
    rows = [{"id": n, "text": each.text, "text_pair": each.text_pair, "label": each.label}
            for n, each in enumerate(examples)]  # fmt: skip
    settings = dict(task=Classes(), train_dataset=rows, eval_dataset=examples, max_steps=40, learning_rate=0.1)
    made = run(backbone, tmp_path / "run", **settings, head_learning_rate=2e-2)
    assert made.records[-1]["task"] == made.records[-1]["loss"] < 0.3 * made.records[0]["loss"]
    assert [record["step"] for record in made.records if "validation" in record] == [8, 16, 24, 32, 40]
    assert made.evaluate()["eval_accuracy"] == summary(tmp_path / "run")["best"] == 100.0
    again = load_learner(tmp_path / "run", device="cpu", task=Classes)
    assert again.predict(examples) == made.learner.predict(examples) == made.predict(rows)
    assert made.evaluate([each._replace(label="1") for each in examples], metric_key_prefix="x")["x_accuracy"] == 50


def test_retrieval(backbone, tmp_path):
    """By its name or without one: the alignment alone."""
    pairs, tests = translations(12), translations(6, 1)
    settings = dict(max_steps=4, eval_steps=2, metric_for_best_model="eval_cosine")
    named = run(backbone, tmp_path / "named", task="retrieval", train_dataset=pairs, eval_dataset=tests, **settings)
    plain = run(backbone, tmp_path / "plain", pairs=pairs, eval_pairs=tests, **settings)
    assert written(tmp_path / "named") == written(tmp_path / "plain") and named.records[-1]["validation"] > 0
    assert named.evaluate(pairs) == plain.evaluate(pairs)
    again = load_learner(tmp_path / "named", device="cpu")
    assert again.predict(tests) == named.predict(tests) and {"prediction", "cosine"} <= set(again.predict(tests)[0])
    with pytest.raises(ValueError, match="alignment weight must be 1.0 with nothing beside it, got 0.5"):
        trainer(backbone, tmp_path / "w", task="retrieval", train_dataset=pairs, alignment=AlignmentConfig(weight=0.5))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_all_it_should_and_nothing_else(backbone, tmp_path, method):
    made = trainer(backbone, tmp_path / "run", task=Classes(), train_dataset=paraphrases(8), method=method, max_steps=4)
    before = {name: tensor.clone() for name, tensor in made.learner.state_dict().items()}
    made.train()
    learner, trained = made.learner, made.learner.trained()
    changed = {name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, before[name])}
    ids = {id(parameter) for parameter in trained.values()}
    allowed = {name for name, p in learner.named_parameters(remove_duplicate=False) if id(p) in ids}
    assert changed <= allowed and all(name in changed for name in trained if "embeddings" not in name)
    assert "task.head.weight" in changed and (len(trained) == 2) == (method == "head")
    assert all(math.isfinite(record["loss"]) for record in made.records)
    again = load_learner(tmp_path / "run", device="cpu", task=Classes)
    assert again.predict(paraphrases(4, 1)) == learner.predict(paraphrases(4, 1))


def test_a_head_that_does_not_train_is_kept(backbone, tmp_path):
    """It may have begun at random."""
    settings = dict(task=Classes(), train_dataset=paraphrases(8), max_steps=1, train_head=False)
    made = run(backbone, tmp_path / "run", **settings)
    assert set(made.learner.trained()) == {"adapted.prompted.prompt.weight"}
    again = load_learner(tmp_path / "run", device="cpu", task=Classes)
    assert again.predict(paraphrases(4, 1)) == made.learner.predict(paraphrases(4, 1))


def test_the_loss_is_the_sum_of_its_weighted_parts(backbone, tmp_path):
    alignment = AlignmentConfig(weight=0.5, schedule="linear", warmup_steps=3, batch_size=5)
    settings = dict(task=Classes(), train_dataset=paraphrases(8), pairs=translations(9), max_steps=10)
    records = run(backbone, tmp_path / "run", alignment=alignment, **settings).records
    assert [record["step"] for record in records] == list(range(1, 14))
    for step, record in enumerate(records):
        assert ("task" in record) == (step >= 3)
        weight = 0.5 * (1.0 if step < 3 else 1 - (step - 3) / 10)
        assert record["loss"] == pytest.approx(record.get("task", 0.0) + weight * record["alignment"], rel=1e-5)


@pytest.mark.parametrize("form", ["sentence", "task"])
def test_alignment_beside_a_task_lowers_both(backbone, tmp_path, form):
    settings = dict(task=Classes(), train_dataset=paraphrases(8), pairs=translations(16), max_steps=30)
    records = run(backbone, tmp_path / "run", alignment=AlignmentConfig(form=form), **settings).records
    for part in ("task", "alignment"):
        losses = [record[part] for record in records]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), part


def test_the_best_has_a_checkpoint(backbone, tmp_path):
    """Whatever save_steps says: what is loaded at the end must have been kept."""
    settings = dict(task=Classes(), train_dataset=paraphrases(8), eval_dataset=paraphrases(6, 1), max_steps=3)
    steps = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2, learning_rate=0.0)
    made = run(backbone, tmp_path / "run", head_learning_rate=0.0, **settings, **steps)  # no later one is better
    assert (made.state.best_global_step, summary(tmp_path / "run")["best_step"]) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "f2"}, "metric_for_best_model must be one of .'accuracy'., got 'f2'"),
        (
            {"metric_for_best_model": "accuracy", "greater_is_better": False},
            "greater_is_better must be True or None, as for all scores here, got False",
        ),
    ],
)
def test_a_score_that_there_is_not(backbone, tmp_path, settings, message):
    """Told before any step, not at the first evaluation."""
    with pytest.raises(ValueError, match=message):
        data = dict(task=Classes(), train_dataset=paraphrases(8), eval_dataset=paraphrases(2, 1))
        trainer(backbone, tmp_path / "run", **data, **settings)
    assert not (tmp_path / "run").exists()


def test_a_task_of_two_trainers(backbone, tmp_path):
    """Each makes its own of it."""
    task, tests = Classes(), paraphrases(4, 2)
    settings = dict(task=task, train_dataset=paraphrases(8), max_steps=2)
    one = run(backbone, tmp_path / "one", **settings)
    before = one.predict(tests)
    run(backbone, tmp_path / "two", seed=7, **settings)
    assert one.predict(tests) == before and not hasattr(task, "head")
    for name in tasks.NAMES:
        known = tasks.get(name)
        again = fresh(known)
        assert again is not known and (again.name, again.settings()) == (name, known.settings())


@pytest.mark.parametrize("form", ["sentence", "task"])
def test_batches_of_spawned_processes(backbone, tmp_path, form):
    """They are told what they need, and nothing of the backbone; the same are made."""
    alignment = AlignmentConfig(form=form, layer=1)
    settings = dict(task=Classes(), train_dataset=paraphrases(8), pairs=translations(5), alignment=alignment)
    made = trainer(backbone, tmp_path / "run", **settings, max_steps=2)
    collate = pickle.loads(pickle.dumps(made._collate))
    assert collate.func.__self__.learner is None
    for step in range(2):
        ours, theirs = (each([made.steps[step]]) for each in (made._collate, collate))
        assert ours.items == theirs.items and torch.equal(ours.teacher, theirs.teacher) and ours.share == theirs.share
        assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])
    assert made.get_train_dataloader().collate_fn is made._collate


def test_learning_rates(backbone, tmp_path, monkeypatch):
    """Up over the first tenth of the steps and down to 0 at the end, each from its own height."""
    rates, step = [], torch.optim.AdamW.step

    def watched(optimizer, *args):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    settings = dict(learning_rate=0.5, head_learning_rate=0.25, projection_learning_rate=0.125, norms=True)
    settings |= dict(weights_learning_rate=1.0, max_steps=18, alignment=AlignmentConfig(warmup_steps=2))
    run(backbone, tmp_path / "run", task=Classes(), train_dataset=paraphrases(8), pairs=translations(3), **settings)
    rise, fall = [0, 0.5], [1 - n / 18 for n in range(18)]
    assert [group[0] / 0.5 for group in rates] == pytest.approx(rise + fall)
    assert rates[2] == [0.5, 1.0, 0.25, 0.125]


def scores_of(monkeypatch, values):
    """The score of each evaluation, instead of what it would be."""
    left = iter(values)
    monkeypatch.setattr(Classes, "scores", lambda *_: {"accuracy": next(left)})


def test_early_stopping_and_the_best_weights(backbone, tmp_path, monkeypatch):
    kept = {}

    def keep(record):
        kept[record["step"]] = {name: p.detach().clone() for name, p in made.learner.trained().items()}

    scores_of(monkeypatch, [30.0, 60.0, 60.0, 50.0, 40.0, 90.0])
    settings = dict(task=Classes(), train_dataset=paraphrases(8), eval_dataset=paraphrases(4, 1), max_steps=20)
    settings |= dict(eval_steps=2, early_stopping_patience=3)
    made = trainer(backbone, tmp_path / "run", on_step=keep, **settings)
    made.train()
    assert [record.get("validation") for record in made.records[1::2]] == [30.0, 60.0, 60.0, 50.0, 40.0]
    assert len(made.records) == 10
    for name, parameter in made.learner.trained().items():
        assert torch.equal(parameter, kept[4][name]), name
    about = summary(tmp_path / "run")
    assert (about["steps"], about["planned_steps"], about["stopped"]) == (10, 20, False)
    assert (about["best"], about["best_step"]) == (60.0, 4)
    again = run(backbone, tmp_path / "run", resume=True, **settings)  # it had stopped: no step more
    assert len(again.records) == 10 and equal(again, made)


def test_without_an_evaluation_the_last_step_counts(backbone, tmp_path):
    settings = dict(task=Classes(), train_dataset=paraphrases(8), max_steps=5)
    one = run(backbone, tmp_path / "one", early_stopping_patience=1, **settings)
    other = run(backbone, tmp_path / "other", save_strategy="no", **settings)
    assert len(one.records) == 5 and equal(one, other)
    assert not list((tmp_path / "other").glob("checkpoint-*"))
    third = run(backbone, tmp_path / "third", eval_dataset=paraphrases(4), eval_strategy="no", **settings)
    assert equal(one, third)


@pytest.mark.parametrize(
    "settings",
    [{"static_shapes": True}, {"activation_checkpointing": True}, {"dataloader_num_workers": 1}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_changes_nothing(backbone, tmp_path, settings):
    common = dict(task=Classes(), train_dataset=paraphrases(11), pairs=translations(7), max_steps=4)
    plain = run(backbone, tmp_path / "plain", **common)
    other = run(backbone, tmp_path / "other", **common, **settings)
    for (name, a), b in zip(plain.learner.trained().items(), other.learner.trained().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_cached_layers_change_nothing(backbone, tmp_path, cache, monkeypatch):
    common = dict(task=Classes(), train_dataset=paraphrases(8), pairs=translations(9), max_steps=4)
    plain = run(backbone, tmp_path / "plain", layers=[1], **common)
    assert len(list(cache.iterdir())) == 1  # the teacher's vectors
    run(backbone, tmp_path / "everywhere", cache_layers=True, **common)  # nothing to leave out
    assert len(list(cache.iterdir())) == 1
    other = run(backbone, tmp_path / "cached", layers=[1], cache_layers=True, **common)
    assert len(list(cache.iterdir())) == 2
    for a, b in zip(plain.learner.trained().values(), other.learner.trained().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(PromptModel, "lower_states", lambda *_: pytest.fail("computed again"))
    run(backbone, tmp_path / "again", layers=[1], cache_layers=True, seed=1, **common)


@pytest.mark.parametrize("ragged", [False, True])
def test_accumulated_steps_are_those_of_a_larger_batch(backbone, tmp_path, ragged):
    """The mean over all examples, however they are dealt out: here ten, in steps of 4, 4 and 2."""
    common = dict(task=Classes(), train_dataset=paraphrases(10 if ragged else 8), num_train_epochs=2)
    whole = run(backbone, tmp_path / "whole", per_device_train_batch_size=12 if ragged else 8, **common)
    parts = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3 if ragged else 2)
    apart = run(backbone, tmp_path / "apart", **parts, **common)
    assert len(apart.records) == len(whole.records) == 2
    for a, b in zip(apart.records, whole.records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


def test_clipping(backbone, tmp_path):
    common = dict(pairs=translations(8), max_steps=2, optim="sgd", learning_rate=1.0, warmup_steps=0, warmup_ratio=0.0)
    free = run(backbone, tmp_path / "free", **common)
    made = trainer(backbone, tmp_path / "run", max_grad_norm=0.5, **common)
    before = made.learner.trained()["adapted.prompted.prompt.weight"].detach().clone()
    made.train()
    assert made.records[0]["gradient_norm"] == pytest.approx(free.records[0]["gradient_norm"]) and free.records[0][
        "gradient_norm"] > 0.5  # fmt: skip
    moved = (made.learner.trained()["adapted.prompted.prompt.weight"] - before).norm()
    assert moved < 0.5 * (1 + 0.5) + 1e-3


@pytest.mark.parametrize("at", [3, 6])
def test_loss_that_is_no_number(backbone, tmp_path, monkeypatch, at):
    """It stops before the step spoils what is kept; the epoch before it is kept."""
    loss, calls = Classes.loss, []

    def spoilt(*args):
        calls.append(None)
        return loss(*args) * (math.nan if len(calls) == at else 1.0)

    monkeypatch.setattr(Classes, "loss", spoilt)
    settings = dict(task=Classes(), train_dataset=paraphrases(8), per_device_train_batch_size=2)
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {at}: try a smaller learning_rate"):
        run(backbone, tmp_path / "run", **settings)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"] * (at > 4)
    assert len(written(tmp_path / "run")) == at - 1


def test_what_is_not_used_is_counted(backbone, tmp_path, caplog):
    good, bad = paraphrases(8), [each._replace(text="") for each in paraphrases(3, 5)]
    good[2] = good[2]._replace(text=good[2].text + " w1" * 50)
    settings = dict(task=Classes(), pairs=[*translations(5), Pair("w1 " * 60, "w21")], max_steps=1)
    made = run(backbone, tmp_path / "run", train_dataset=good + bad, **settings)
    expected = {"given": 11, "drawn": 8, "inputs": 8, "cut": 1, "pairs": 6}
    assert summary(tmp_path / "run")["counts"] == made.info.counts == expected
    assert "3 of 11 examples are left out: they give the task 'classes' nothing to learn from" in caplog.text
    assert "1 of 6 sentences have more than max_length 30 tokens, and are cut" in caplog.text
    six = run(backbone, tmp_path / "six", train_dataset=good + bad, num_examples=6, **settings)
    assert six.info.counts["drawn"] == 6 and {item.example for item in six.streams.items} == {*range(6)}
    for wanted, given, message in (
        (9, good + bad, "examples must be at most 8, got 9: 3 of 11 give"),
        (None, good[:2] + bad, "examples must be usable for the greater part, got 3 of 5"),
        (None, bad, "examples must be usable, but all 3 give"),
        (12, good + bad, "examples must be at most|examples must be at most 11"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(backbone, tmp_path / "none", train_dataset=given, num_examples=wanted, **settings)


def test_fewer_examples_are_the_first_of_more(backbone, tmp_path):
    examples = paraphrases(20)
    made = [trainer(backbone, tmp_path / str(n), task=Classes(), train_dataset=examples, num_examples=n)
            for n in (4, 9)]  # fmt: skip
    few, more = ([item.ids for item in each.streams.items] for each in made)
    assert few == more[:4] and len(more) == 9
    pairs = [trainer(backbone, tmp_path / f"p{n}", pairs=translations(20), num_examples=n).streams.pairs
             for n in (4, 9)]  # fmt: skip
    assert pairs[0] == pairs[1][:4]


def test_sentences_are_told_by_their_tokens(backbone, tmp_path):
    """ "w1  w2" is "w1 w2" for the tokenizer: neither a wrong answer to the other, nor its rival in training."""
    pairs = translations(9)
    both = pairs + [Pair(pair.source.replace(" ", "  "), pair.target) for pair in pairs]
    settings = dict(per_device_train_batch_size=18, num_train_epochs=2)
    made = [run(backbone, tmp_path / str(len(each)), pairs=each, **settings) for each in (pairs, both)]
    losses = [[record["loss"] for record in each.records] for each in made]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert made[0].evaluate(pairs)["eval_r@1"] == made[0].evaluate(both)["eval_r@1"]


def test_few_pairs_and_one(backbone, tmp_path):
    common = dict(task=Classes(), train_dataset=[Text(0, "w1", "w2", "a"), Text(1, "w3", "w4", "b")], max_steps=2)
    alignment = AlignmentConfig(batch_size=2, distance="cosine")
    one = run(backbone, tmp_path / "one", pairs=[Pair("w1 w2", "w21")], alignment=alignment, **common)
    assert all(math.isfinite(record["alignment"]) for record in one.records)
    form = run(backbone, tmp_path / "form", pairs=translations(1), alignment=AlignmentConfig(form="task"), **common)
    assert all("alignment" not in record for record in form.records)  # no two texts to stand beside each other


def test_a_model_that_is_given(backbone, tmp_path):
    """Changed in place; it needs its tokenizer, and its run, where it has no name, its backbone."""
    model, tokenizer = load_backbone(backbone, "cpu")
    common = dict(pairs=translations(8), max_steps=2)
    with pytest.raises(ValueError, match="processing_class must be the tokenizer of a model .* got None"):
        trainer(model, tmp_path / "none", **common)
    model.config._name_or_path = ""
    made = run(model, tmp_path / "run", processing_class=tokenizer, **common)
    assert made.learner.backbone is model and equal(made, run(backbone, tmp_path / "named", **common))
    with pytest.raises(ValueError, match="backbone must be given for .*run, which was trained on a model without a"):
        load_learner(tmp_path / "run", device="cpu")
    load_learner(tmp_path / "run", device="cpu", backbone=backbone)


def test_lower_precision(backbone, tmp_path):
    made = run(backbone, tmp_path / "run", pairs=translations(8), max_steps=2, bf16=True)
    assert all(math.isfinite(record["loss"]) for record in made.records)
    pairs = translations(8)
    half = run(backbone, tmp_path / "half", pairs=pairs, eval_pairs=pairs, max_steps=2, dtype="bfloat16")
    assert half.learner.backbone.dtype == torch.bfloat16 and math.isfinite(half.records[-1]["loss"])
    assert load_learner(tmp_path / "half", device="cpu").backbone.dtype == torch.bfloat16
