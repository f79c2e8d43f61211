"""Training: what it learns, what it leaves alone, what it writes, and that nothing is lost on the way."""

import json
import os
import random
import shutil
import signal

import peft
import pytest
import torch
from helpers import CONFIGS, WORDS, save_backbone
from safetensors.torch import load_file, save_file

from fastprompt.models import PromptModel
from fastprompt.tasks.parallel import Pair
from fastprompt.training import TrainingConfig, encoding, evaluate, train
from fastprompt.training.learner import Learner
from fastprompt.training.metrics import Metrics

SETTINGS = dict(num_virtual_tokens=4, max_length=30, batch_size=8, epochs=3, lr=3e-2, projection_lr=1e-2)


def make_pairs(count: int, labelled: bool = False, seed: int = 0) -> list[Pair]:
    """Sentences of the first words, "translated" word by word into the last."""
    random.seed(seed)
    pairs = []
    for _ in range(count):
        words = random.choices(range(20), k=random.randint(2, 9))
        label = ("even", "odd")[words[0] % 2] if labelled else None
        pairs.append(Pair(" ".join(WORDS[n] for n in words), " ".join(WORDS[n + 20] for n in words), label))
    return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone("bert", tmp_path_factory.mktemp("backbone"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "training"


def run(folder, out, pairs=None, on_step=None, resume=False, **settings):
    pairs = make_pairs(29) if pairs is None else pairs
    config = TrainingConfig(**(SETTINGS | settings))
    return train(*encoding.load_backbone(str(folder)), pairs, out, config, resume=resume, on_step=on_step)


def states(*learners):
    return zip(*(learner.state_dict().items() for learner in learners), strict=True)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_it_learns_and_leaves_the_backbone_alone(folder, tmp_path, kind):
    before = encoding.load_backbone(str(folder))[0].state_dict()
    learner = run(folder, tmp_path / "run", kind=kind, epochs=8)
    after = learner.prompted.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(learner.trained()) == {"prompted.prompt.weight", "alignment.weight"}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 33))
    losses = [record["loss"] for record in records]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 32 and summary["loss"] == losses[-1]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]

    model, tokenizer = encoding.load_backbone(str(folder))
    scores = evaluate(model, tokenizer, make_pairs(29), tmp_path / "run")
    assert scores["with"]["r@1"] > scores["without"]["r@1"] + 0.3
    assert {key for part in scores.values() for key in part} == {"r@1", "r@5", "cosine"}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_and_peft_reads_the_result(family, tmp_path):
    folder = save_backbone(family, tmp_path / "backbone")
    pooling = "last" if family in ("llama", "gemma3_text") else "mean"
    learner = run(folder, tmp_path / "run", epochs=1, pooling=pooling)
    model, _ = encoding.load_backbone(str(folder))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "run").eval()
    ids = torch.tensor([[0, 7, 30, 2]])
    ours = learner.prompted(input_ids=ids).last_hidden_state
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_labels_train_a_head(folder, tmp_path):
    pairs = make_pairs(120, labelled=True)
    learner = run(folder, tmp_path / "run", pairs, epochs=12)
    assert "head.weight" in learner.trained() and learner.labels == ["even", "odd"]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx(record["alignment"] + record["task"])
    assert record["task"] == pytest.approx(0.6931, abs=1e-3)  # a head begun at zero knows nothing
    loaded = encoding.load_backbone(str(folder))
    assert evaluate(*loaded, pairs, tmp_path / "run")["with"]["accuracy"] > 0.7
    assert "accuracy" not in evaluate(*loaded, make_pairs(5), tmp_path / "run")["with"]
    with pytest.raises(ValueError, match=r"label must be one of those in training, \['even', 'odd'\], got \['both'\]"):
        evaluate(*loaded, [Pair("w1", "w2", "both")], tmp_path / "run")


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 6, 8], ids=["first epoch", "within an epoch", "end of an epoch"])
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_resume_gives_what_an_unbroken_run_gives(folder, tmp_path, at, how):
    handler = signal.getsignal(signal.SIGINT)  # a job in the background ignores it
    whole = run(folder, tmp_path / "whole")

    def stop(record):
        if record["step"] == at:
            if how == "killed":  # nothing of this process is run any more
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "broken"
    if how == "killed":
        with pytest.raises(Killed):
            run(folder, out, on_step=stop)
    else:
        stopped = run(folder, out, on_step=stop)
        saved = PromptModel.from_pretrained(encoding.load_backbone(str(folder))[0], out)
        assert torch.equal(saved.prompt.weight, stopped.prompted.prompt.weight)
        assert json.loads((out / "summary.json").read_text())["steps"] == at
    assert signal.getsignal(signal.SIGINT) is handler
    steps = []
    resumed = run(folder, out, resume=True, on_step=lambda record: steps.append(record["step"]))
    assert steps[0] == (at + 1 if how == "interrupted" else at // 4 * 4 + 1 if at < 8 else 5)
    for (name, a), (_, b) in states(whole, resumed):
        assert torch.equal(a, b), name
    lines = [[json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "metrics.jsonl").open()]
             for name in ("whole", "broken")]  # fmt: skip
    assert lines[0] == lines[1]
    assert run(folder, out, resume=True, epochs=4) is not None  # and a longer one goes on from there
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize("settings", [{"max_tokens": 60}, {"layers": [1, 2], "cache_layers": True}, {"kind": "prompt"}])
def test_resume_with_token_budget_and_cached_layers(folder, tmp_path, cache, settings):
    settings = {"max_tokens": 90} | settings
    whole = run(folder, tmp_path / "whole", **settings)
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    steps = json.loads((tmp_path / "whole" / "summary.json").read_text())["planned_steps"]
    assert steps == len(records) and records[-1]["epoch"] == 3
    at = next(record["step"] for record in records if record["epoch"] == 2) + 1

    def stop(record):
        if record["step"] == at:
            raise Killed

    with pytest.raises(Killed):
        run(folder, tmp_path / "broken", on_step=stop, **settings)
    for file in cache.iterdir():
        file.unlink()
    resumed = run(folder, tmp_path / "broken", resume=True, **settings)
    for (name, a), (_, b) in states(whole, resumed):
        assert torch.equal(a, b), name


def test_cached_layers_change_nothing(folder, tmp_path, cache, monkeypatch):
    plain = run(folder, tmp_path / "plain", layers=[2])
    with_cache = run(folder, tmp_path / "cached", layers=[2], cache_layers=True)
    torch.testing.assert_close(with_cache.prompted.prompt.weight, plain.prompted.prompt.weight, rtol=1e-3, atol=1e-4)
    assert len(list(cache.iterdir())) == 2
    with pytest.raises(ValueError, match="cache_layers must be as in the run"):
        run(folder, tmp_path / "plain", layers=[2], cache_layers=True, resume=True)
    run(folder, tmp_path / "everywhere", cache_layers=True, epochs=1)  # nothing to leave out
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(PromptModel, "lower_states", lambda *_: pytest.fail("computed again"))
    run(folder, tmp_path / "again", layers=[2], cache_layers=True, seed=1)


def test_a_run_is_not_overwritten_and_only_the_same_is_resumed(folder, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        run(folder, out, resume=True)
    run(folder, out, epochs=1)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(folder, out, epochs=1)
    with pytest.raises(ValueError, match=r"lr must be as in the run to resume .*: 0.03, got 0.5"):
        run(folder, out, resume=True, lr=0.5)
    with pytest.raises(ValueError, match="pairs must be as in the run"):
        run(folder, out, make_pairs(29, seed=1), resume=True)
    other = save_backbone("bert", tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="backbone must be as in the run"):
        run(other, out, resume=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_mixed_files_are_refused(folder, tmp_path):
    run(folder, tmp_path / "a", epochs=1)
    run(folder, tmp_path / "b", epochs=1, seed=1)
    os.replace(tmp_path / "a" / "alignment.safetensors", tmp_path / "b" / "alignment.safetensors")
    loaded = encoding.load_backbone(str(folder))
    with pytest.raises(ValueError, match="belongs to another prompt"):
        evaluate(*loaded, make_pairs(3), tmp_path / "b")
    run(folder, tmp_path / "b", epochs=1, seed=1, resume=True)
    evaluate(*loaded, make_pairs(3), tmp_path / "b")


def test_peft_saved_the_same_prompt_over_a_run(folder, tmp_path):
    """As it reads it, at other positions, the projection is not of it."""
    run(folder, tmp_path / "run", epochs=1, position_offset="none")
    loaded, file = encoding.load_backbone(str(folder)), tmp_path / "run" / "adapter_config.json"
    # As an older version of ours wrote it, which PEFT did not refuse.
    file.write_text(file.read_text().replace("FASTPROMPT_WITHOUT_POSITION_OFFSET", "PREFIX_TUNING"))
    peft.PeftModel.from_pretrained(loaded[0], tmp_path / "run").save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="alignment.safetensors belongs to another prompt .* PEFT saved over this one"):
        evaluate(*encoding.load_backbone(str(folder)), make_pairs(3), tmp_path / "run")


def read_in_threes(monkeypatch):
    """As on a GPU: metrics of several steps at a time."""
    monkeypatch.setattr(Metrics, "due", property(lambda metrics: len(metrics._waiting) == 3))


def test_metrics_of_several_steps_read_at_a_time(folder, tmp_path, monkeypatch):
    def stop(record):
        if record["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)  # after step 7, when it is told of this one

    whole, reads, read = run(folder, tmp_path / "whole"), [], Metrics.read
    read_in_threes(monkeypatch)
    monkeypatch.setattr(Metrics, "read", lambda metrics: reads.append(read(metrics)) or reads[-1])
    run(folder, tmp_path / "late", on_step=stop)
    assert [len(records) for records in reads if records] == [3, 1, 3]
    late = run(folder, tmp_path / "late", resume=True)
    for (name, a), (_, b) in states(whole, late):
        assert torch.equal(a, b), name
    lines = [[json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "metrics.jsonl").open()]
             for name in ("whole", "late")]  # fmt: skip
    assert lines[0] == lines[1]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", [3, 6])
def test_loss_that_is_no_number(folder, tmp_path, monkeypatch, at, late):
    """It stops before the step that would spoil all; a whole epoch before it is kept."""
    if late:
        read_in_threes(monkeypatch)
    loss, calls = Learner.loss, []

    def spoilt(*args):
        calls.append(None)
        return {"alignment": loss(*args)["alignment"] * (float("nan") if len(calls) == at else 1.0)}

    message = f"the loss is nan at step {at}: try a smaller lr" + (".*run holds epoch 1$" if at > 4 else "$")
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=message):
        patch.setattr(Learner, "loss", spoilt)
        run(folder, tmp_path / "run")
    if at > 4:
        whole = run(folder, tmp_path / "whole", epochs=1)
        kept = PromptModel.from_pretrained(encoding.load_backbone(str(folder))[0], tmp_path / "run")
        assert torch.equal(kept.prompt.weight, whole.prompted.prompt.weight)


@pytest.mark.parametrize("pooling", encoding.POOLINGS)
def test_vectors_are_those_of_the_sentences_one_by_one(folder, pooling):
    model, _ = encoding.load_backbone(str(folder))
    sentences = [[0, *torch.randint(5, 48, (length,)).tolist(), 2] for length in (1, 9, 4, 0, 20)]
    together = encoding.encode_all(encoding.plain(model), sentences, pooling, "cpu", batch_size=3)
    for vector, tokens in zip(together, sentences, strict=True):
        hidden = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(vector, expected.detach(), rtol=1e-4, atol=1e-5)


def test_teacher_is_computed_once_for_the_same_content(folder, cache, monkeypatch):
    model, _ = encoding.load_backbone(str(folder))
    sentences = [[0, 5, 6, 2], [0, 7, 2]]

    def vectors(sentences, pooling="mean"):
        return encoding.teacher_vectors(encoding.Digest(model), sentences, pooling, "cpu")

    first = vectors(sentences)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_all", lambda *_: pytest.fail("computed again"))
        assert torch.equal(vectors(sentences), first)
    file.write_bytes(file.read_bytes()[:-3])  # damaged
    assert torch.equal(vectors(sentences), first)

    vectors(sentences, "first")
    vectors([[0, 5, 6, 2], [0, 8, 2]])
    table = model.get_input_embeddings().weight.data
    table[40] += 1.0  # a word of none of the sentences
    vectors(sentences)
    assert len(list(cache.iterdir())) == 3
    model.encoder.layer[2].output.dense.bias.data[3] += 1e-3
    changed = vectors(sentences)
    table[7] += 1e-3
    vectors(sentences)
    assert len(list(cache.iterdir())) == 5
    assert not torch.equal(changed, first)


def test_evaluate_takes_what_peft_wrote(folder, tmp_path):
    model, tokenizer = encoding.load_backbone(str(folder))
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    scores = evaluate(*encoding.load_backbone(str(folder)), make_pairs(9), tmp_path / "adapter", prefix_text="w1 ")
    assert scores["with"] != scores["without"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lora"}, "kind must be one of"),
        ({"distance": "cosine+l3"}, "distance must be one of .* got 'cosine.l3'"),
        ({"temperature": 0.0}, "temperature must be at least 1e-06 and finite, got 0.0"),
        ({"pooling": "max"}, "pooling must be one of .* got 'max'"),
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer, got 1.5"),
        ({"max_tokens": 0}, "max_tokens must be a positive integer, got 0"),
        ({"max_tokens": 10}, "max_tokens must have room for the longest sentence, 11 tokens and 0 prompt rows, got 10"),
        ({"lr": -1.0}, "lr must be a finite number, 0 or more, got -1.0"),
        ({"projection_lr": float("nan")}, "projection_lr must be a finite number"),
        ({"layers": [3]}, "layers must be indices of the backbone's 3 layers, got 3"),
        ({"num_virtual_tokens": 64}, "num_virtual_tokens must leave room"),
        ({"max_length": 61}, "max_length must be at most 60: .* a prompt of 4, got 61"),
    ],
)
def test_bad_settings(folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists(), "an error came after work had begun"


def test_sentences_are_told_by_their_tokens(folder, tmp_path):
    """ "w1  w2" is "w1 w2" for the tokenizer: neither a wrong answer to the other, nor its rival in training."""
    pairs = make_pairs(9)
    again = [Pair(pair.source.replace(" ", "  "), pair.target) for pair in pairs]
    settings = dict(batch_size=18, epochs=2)
    one = run(folder, tmp_path / "one", pairs, **settings)
    both = run(folder, tmp_path / "both", pairs + again, **settings)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
              for name in ("one", "both")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(one.prompted.prompt.weight, both.prompted.prompt.weight, rtol=1e-3, atol=1e-4)
    loaded = encoding.load_backbone(str(folder))
    scores = [evaluate(*loaded, each, tmp_path / "one") for each in (pairs, pairs + again)]
    for name in ("without", "with"):
        assert scores[0][name]["r@1"] == scores[1][name]["r@1"]


BIAS = "encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("encoder.layer.1.output.dense.weight"),
            "lacks weights .*: encoder.layer.1.output.dense",
        ),
        (lambda w: w.update({"encoder.layer.7.extra": torch.ones(1)}), "without a place: encoder.layer.7.extra$"),
        (
            lambda w: w.update({"encoder.layer.1.output.dense.bias": torch.ones(3)}),
            r"another shape .*dense.bias is \(3,\), not \(48,\)$",
        ),
        (lambda w: w.update({"cls.predictions.bias": torch.ones(3), "embeddings.position_ids": torch.ones(1)}), None),
    ],
)
def test_a_backbone_must_be_whole(folder, tmp_path, change, message):
    """What a head left behind is not asked for."""
    shutil.copytree(folder, tmp_path / "backbone")
    file = tmp_path / "backbone" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    if message is None:
        return encoding.load_backbone(str(tmp_path / "backbone"))
    with pytest.raises(ValueError, match=f"backbone '.*backbone' .*{message}"):
        encoding.load_backbone(str(tmp_path / "backbone"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_backbone_must_have_its_head(tmp_path, tied):
    folder = save_backbone("llama", tmp_path, "AutoModelForCausalLM", tie_word_embeddings=tied)
    encoding.load_backbone(str(folder), causal_head=True)
    weights = load_file(folder / "model.safetensors")
    if weights.pop("lm_head.weight", None) is not None:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="lacks weights of its configuration: lm_head.weight"):
            encoding.load_backbone(str(folder), causal_head=True)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is damaged: "):
        encoding.load_backbone(str(folder))
