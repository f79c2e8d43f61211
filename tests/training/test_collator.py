"""PackingCollator: what a batch of it holds, and that its packing says what its tensors say."""

import pickle

import pytest
import torch
import transformers
from helpers import CONFIGS, VOCABULARY, build

from fastprompt import PromptConfig, PromptModel
from fastprompt.models.packed.layout import Packing
from fastprompt.training import PackingCollator

LENGTHS = 4, 1, 6, 3


def features(**more) -> list[dict]:
    rows = [torch.randint(5, VOCABULARY, (length,)).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": row} | {name: x[n] for name, x in more.items()} for n, row in enumerate(rows)]


def test_it_is_transformers_flattening_with_a_packing():
    given = features()
    got = PackingCollator()(given)
    expected = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(given)
    packing = pickle.loads(pickle.dumps(got.pop("packing")))  # as from a loader's worker
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == value if isinstance(value, int) else torch.equal(got[name], value)
        assert isinstance(value, int) or got[name].dtype == value.dtype
    told = Packing.of_batch((1, sum(LENGTHS)), cu_seqlens=got["cu_seq_lens_q"].numpy())
    for name in ("index", "cu_seqlens", "positions"):
        assert (getattr(packing, name) == getattr(told, name)).all()
    assert packing.labelled.tolist() == (got["labels"][0] != -100).nonzero().squeeze(1).tolist()


def test_masks_and_labels_of_first_tokens():
    masks = [[0, 1, 1, 0], [1], [1] * 6, [0, 0, 0]]
    got = PackingCollator(separator_id=None)(features(attention_mask=masks, prompt_ids=[0, "cy", 1, 0]))
    assert got["cu_seq_lens_q"].tolist() == [0, 2, 3, 9, 9] and got["prompt_ids"] == [0, "cy", 1, 0]
    assert torch.equal(got["labels"], got["input_ids"]) and "attention_mask" not in got


def test_batches_of_one_shape():
    collate = PackingCollator(max_tokens=[32, 16, 64], max_samples=6, max_labels=20)
    shapes = set()
    for lengths in ((4, 1, 6, 3), (9, 7), (1,), (16,), (2, 2, 3, 1, 1, 2)):
        given = [{"input_ids": [5] * n, "labels": [7] * n, "prompt_ids": "cy"} for n in lengths]
        got = collate(given)
        packing, bounds, tokens = got["packing"], got["cu_seq_lens_q"], sum(lengths)
        shapes.add(tuple(x.shape if isinstance(x, torch.Tensor) else type(x) for x in got.values()))
        assert got["input_ids"].shape == (1, 16) == packing.shape and got["max_length_q"] == 16
        assert got["labels"][0, tokens:].tolist() == [-100] * (16 - tokens)
        lengths_of = bounds.diff().tolist()
        assert lengths_of[: len(lengths)] == list(lengths) and len(lengths_of) == 7 == len(got["prompt_ids"])
        spread = lengths_of[len(lengths) :]
        assert sum(spread) == 16 - tokens and max(spread) - min(spread) <= 1
        assert packing.labelled.tolist() == (got["labels"][0] != -100).nonzero().squeeze(1).tolist()
        assert packing.max_labels == 16 and not packing.positions[tokens:].any()
    assert len(shapes) == 1
    assert collate([{"input_ids": [5] * 17}])["packing"].max_labels == 20  # of 32 tokens


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((20, 13), "features must fit into max_tokens, 32, got 33: make the batches smaller"),
        ((1, 1, 1), "features must fit into max_samples, 2, got 3: make the batches smaller"),
        ((10, 9), "features must fit into max_labels, 16, got 17: make the batches smaller"),
    ],
)
def test_a_batch_that_does_not_fit(lengths, message):
    collate = PackingCollator(max_tokens=[32, 8], max_samples=2, max_labels=16)
    with pytest.raises(ValueError, match=message):
        collate([{"input_ids": [5] * n, "labels": [7] * n} for n in lengths])


def test_more_labels_than_were_announced():
    model = PromptModel(build("llama", "AutoModelForCausalLM"), PromptConfig("prefix", 3))
    batch = PackingCollator(max_tokens=8, max_samples=2, max_labels=3)([{"input_ids": [5] * 6}])
    with pytest.raises(ValueError, match="labels must be at most 3, as max_labels says, got 5"):
        model(**batch, labels=batch["input_ids"].where(torch.arange(8) < 6, -100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 8}, "max_tokens and max_samples must be given together, .* got 8, None and None"),
        ({"max_labels": 8}, "max_tokens and max_samples must be given together, .* got None, None and 8"),
        ({"max_tokens": [8, 0], "max_samples": 1}, "max_tokens must be a positive integer, got 0"),
        ({"max_tokens": [], "max_samples": 1}, r"max_tokens must be a positive integer, got \[\]"),
        ({"max_tokens": 8, "max_samples": True}, "max_samples must be a positive integer, got True"),
        ({"max_tokens": 8, "max_samples": 1, "max_labels": 1.5}, "max_labels must be a positive integer, got 1.5"),
    ],
)
def test_bad_shapes(options, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(**options)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_results_are_those_without_the_packing(family, kind):
    causal = family in ("llama", "gemma3_text")
    auto = "AutoModelForCausalLM" if causal else "AutoModelForTokenClassification"
    model = PromptModel(build(family, auto), PromptConfig(kind, 3, init_scale=1.0)).train()
    model.add_prompt("cy")
    batch = PackingCollator()(features(prompt_ids=[1, 0, 0, 1]))
    batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % (VOCABULARY if causal else 2))
    results = []
    for dropped in ((), ("packing",), ("packing", "cu_seq_lens_q", "cu_seq_lens_k")):
        model.zero_grad()
        loss = model(**{name: x for name, x in batch.items() if name not in dropped}).loss
        loss.backward()
        results.append([loss, model.prompt.weight.grad, model.other_prompts["cy"].weight.grad])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("shape", "segments"),
    [({}, [2, 2, 2, 2, 4]), ({"max_tokens": [8, 16], "max_samples": 4, "max_labels": 12}, [5] * 5)],
)
def test_through_a_trainer(shape, segments, tmp_path):
    data, model = (
        features(),
        PromptModel(build("llama", "AutoModelForCausalLM", torch.float32), PromptConfig("prompt", 3), cuda_graphs=True),
    )
    arguments = transformers.TrainingArguments(
        *(str(tmp_path),), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True,
        report_to="none", use_cpu=True, save_strategy="no", dataloader_num_workers=1,
    )  # fmt: skip
    seen, forward = [], model.forward
    model.forward = lambda **inputs: seen.append(inputs["packing"].segments) or forward(**inputs)
    model.forward.__wrapped__ = forward  # the Trainer looks at its signature
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=PackingCollator(**shape)
    )
    assert trainer.train().training_loss > 0 and trainer.evaluate()["eval_loss"] > 0
    assert seen == segments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "features must hold at least one sample, got none"),
        ([{"labels": [1]}], r"features must have input_ids and may have .*, got \['labels'\]"),
        ([{"input_ids": [1], "id": 3}], r"features must have input_ids and may have .*, got \['input_ids', 'id'\]"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], "features must all have .* in feature 1"),
        ([{"input_ids": [1, 2], "labels": [1]}], "labels must have 2 entries in feature 0, as input_ids, got 1"),
        (
            [{"input_ids": [[1, 2]]}],
            r"input_ids must be a list of integers in each feature, got int64 of shape \(1, 2\)",
        ),
    ],
)
def test_bad_features(given, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator()(given)


def test_a_packing_that_does_not_fit():
    model = PromptModel(build("llama"), PromptConfig("prompt", 3))
    batch = PackingCollator()([{"input_ids": row["input_ids"]} for row in features()])
    assert model(**batch).last_hidden_state.shape == (1, 14, 48)
    for changed, error, message in (
        ({"input_ids": batch["input_ids"][:, :5]}, ValueError, r"position_ids must be \(1, 5\)"),
        (
            {"input_ids": batch["input_ids"][:, :5], "position_ids": None},
            ValueError,
            r"packing must be of a batch \(1, 5\)",
        ),
        ({"attention_mask": torch.ones(1, 14)}, ValueError, "attention_mask must not be given with packing"),
        ({"packing": [4, 10]}, TypeError, "packing must be a Packing, as PackingCollator makes it, got list"),
    ):
        with pytest.raises(error, match=message):
            model(**batch | changed)
    with pytest.raises(TypeError, match="separator_id must be None or an integer, got 'a'"):
        PackingCollator("a")
