"""Several prompts in one model: mixed batches against the samples one by one, unused and frozen prompts, files."""

import json

import peft
import pytest
import torch
from helpers import CONFIGS, DECODERS, batch, build

from fastprompt import PromptConfig, PromptModel

P = 5
IDS = torch.tensor([2, 0, 2, 1])
NAMES = ["xho", "default", "xho", "task-b"]
KINDS = ["prefix", "prompt"]


def bank_of(family: str, kind: str, auto: str = "AutoModel", dtype=torch.float64, **config) -> PromptModel:
    model = PromptModel(build(family, auto, dtype), PromptConfig(kind, P, init_scale=1.0, **config)).eval()
    model.add_prompt("task-b")
    model.add_prompt("xho")
    assert model.prompt_names == ("default", "task-b", "xho")
    return model


def weights(model: PromptModel) -> list[torch.nn.Parameter]:
    return [prompt.weight for prompt in (model.prompt, *model.other_prompts.values())]


def gradients(model: PromptModel, loss: torch.Tensor) -> list[torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [weight.grad for weight in weights(model)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_mixed_batch_is_its_samples_with_their_own_prompts(family, kind):
    model = bank_of(family, kind)
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    weight = torch.randn(*mask.shape, 48, dtype=torch.float64)
    together = model(**inputs, prompt_ids=IDS).last_hidden_state
    assert torch.equal(model(**inputs, prompt_ids=NAMES).last_hidden_state, together)
    whole = gradients(model, (together * weight)[mask].sum())
    parts = [torch.zeros_like(gradient) for gradient in whole]
    for row, length in enumerate(mask.sum(1)):
        # A model that has this prompt alone.
        alone = PromptModel(model.backbone, model.prompt_config).eval()
        alone.prompt.weight.data.copy_(weights(model)[IDS[row]])
        hidden = alone(input_ids=inputs["input_ids"][row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(together[row, :length], hidden, rtol=1e-6, atol=1e-6)
        (hidden * weight[row, :length]).sum().backward()
        parts[IDS[row]] += alone.prompt.weight.grad
    for got, expected in zip(whole, parts, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("kind", "layers"), [("prefix", None), ("prefix", [1]), ("prompt", None)])
@pytest.mark.parametrize("family", DECODERS)
def test_causal_loss_and_shared_text(family, kind, layers):
    model = bank_of(family, kind, "AutoModelForCausalLM", prefix_in_window=True, layers=layers).train()
    inputs, text = batch(side="left"), torch.tensor([9, 33, 7])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for shared in (None, text):
        loss = model(**inputs, prompt_ids=IDS, shared_prefix_ids=shared, num_items_in_batch=7).loss
        whole = gradients(model, loss)
        total, parts = 0.0, [torch.zeros_like(w) for w in whole]
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            ids = inputs["input_ids"][row][mask]
            labels = ids
            if shared is not None:
                ids, labels = torch.cat([shared, ids]), torch.cat([torch.full_like(shared, -100), ids])
            sample = {"input_ids": ids[None], "labels": labels[None], "prompt_ids": IDS[row : row + 1]}
            part = model(**sample, num_items_in_batch=7).loss
            total += part.detach()
            alone = gradients(model, part)
            assert [g is not None for g in alone] == [i == IDS[row] for i in range(3)]
            parts[IDS[row]] += alone[IDS[row]]
        torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
        for got, expected in zip(whole, parts, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_unused_and_frozen_prompts_are_left_alone(kind):
    model = bank_of("bert", kind)
    inputs = batch()
    before = [weight.detach().clone() for weight in weights(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)  # its weight decay would move what has a zero gradient
    model.freeze_prompt("task-b")
    loss = model(**inputs, prompt_ids=["task-b", "xho", "xho", "task-b"]).last_hidden_state.square().sum()
    default, frozen, trained = gradients(model, loss)
    assert default is None and frozen is None and trained.abs().sum() > 0
    optimizer.step()
    moved = [not torch.equal(weight, old) for weight, old in zip(weights(model), before, strict=True)]
    assert moved == [False, False, True]
    assert model(**inputs, prompt_ids=["task-b"] * 4).last_hidden_state.grad_fn is None


def test_a_mixed_batch_where_some_layers_have_no_prefix():
    model = bank_of("bert", "prefix", layers=[1])
    inputs = batch()
    together = model(**inputs, prompt_ids=IDS).last_hidden_state
    for row in range(4):
        sample = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone = model(**sample, prompt_ids=IDS[row : row + 1]).last_hidden_state
        torch.testing.assert_close(together[row], alone[0])


def test_add_and_drop():
    model = bank_of("llama", "prefix")
    model.freeze_prompt("xho")
    model.add_prompt("zul", init_from="xho")
    xho, zul = (model.other_prompts[name].weight for name in ("xho", "zul"))
    assert torch.equal(xho, zul) and xho.data_ptr() != zul.data_ptr() and zul.requires_grad
    inputs = batch()
    expected = model(**inputs, prompt_ids=["zul"] * 4).last_hidden_state
    model.drop_prompt("task-b")
    assert model.prompt_names == ("default", "xho", "zul")
    assert torch.equal(model(**inputs, prompt_ids=torch.full((4,), 2)).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"prompt_ids must be a list of names in .*, got 'task-b'"):
        model(**inputs, prompt_ids=["task-b"] * 4)
    model.add_prompt("from-text")
    assert not torch.equal(model.other_prompts["from-text"].weight, model.prompt.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip_and_peft_reads_each(family, kind, tmp_path):
    model = bank_of(family, kind, dtype=torch.float32, prefix_in_window=True)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"task-b", "xho"}
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    expected = model(**inputs, prompt_ids=IDS).last_hidden_state
    again = PromptModel.from_pretrained(build(family, dtype=torch.float32), tmp_path).eval()
    assert again.prompt_names == model.prompt_names and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again(**inputs, prompt_ids=IDS).last_hidden_state, expected)
    trained = PromptModel.from_pretrained(build(family, dtype=torch.float32), tmp_path, trainable=True)
    assert all(weight.requires_grad for weight in weights(trained))

    theirs = peft.PeftModel.from_pretrained(build(family, dtype=torch.float32), tmp_path).eval()
    theirs.load_adapter(tmp_path / "xho", adapter_name="xho")
    for name in ("default", "xho"):
        theirs.set_adapter(name)
        stock = theirs(**inputs).last_hidden_state[:, -mask.shape[1] :]
        ours = model(**inputs, prompt_ids=[name] * 4).last_hidden_state
        torch.testing.assert_close(ours[mask], stock[mask], rtol=1e-4, atol=1e-5)


def test_single_prompts_go_from_model_to_model(tmp_path):
    model = bank_of("bert", "prefix")
    model.save_prompt("xho", tmp_path / "one")
    assert PromptModel.from_pretrained(build("bert"), tmp_path / "one").prompt_names == ("default",)
    other = PromptModel(build("bert"), PromptConfig("prefix", P))
    other.load_prompt("copy", tmp_path / "one")
    other.load_prompt("trained", tmp_path / "one", trainable=True)
    for name, trains in (("copy", False), ("trained", True)):
        assert torch.equal(other.other_prompts[name].weight, model.other_prompts["xho"].weight)
        assert other.other_prompts[name].weight.requires_grad == trains


def test_pefts_adapters_one_by_one(tmp_path):
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    theirs = peft.get_peft_model(build("bert"), config)
    theirs.add_adapter("xho", config)
    theirs.prompt_encoder["xho"].embedding.weight.data.normal_()
    theirs.save_pretrained(tmp_path)
    ours = PromptModel.from_pretrained(build("bert"), tmp_path)
    ours.load_prompt("xho", tmp_path / "xho")
    stored = theirs.prompt_encoder["xho"].embedding.weight
    assert torch.equal(ours.other_prompts["xho"].weight, stored.to(ours.prompt.weight))


def test_bad_names_and_ids():
    model = bank_of("bert", "prefix")
    for name in ("", "a/b", "a\\b", "..", 3):
        with pytest.raises(ValueError, match="name must be a string, not empty, without '.', '/'"):
            model.add_prompt(name)
    for name in ("default", "xho", "train"):
        with pytest.raises(ValueError, match=f"name must be new.* got {name!r}"):
            model.add_prompt(name)
    for call in (model.drop_prompt, model.freeze_prompt, lambda name: model.add_prompt("new", init_from=name)):
        with pytest.raises(ValueError, match=r"name must be one of \('default', 'task-b', 'xho'\), got 'zul'"):
            call("zul")
    with pytest.raises(ValueError, match="name must not be 'default'"):
        model.drop_prompt("default")
    inputs = batch()
    for ids, error, message in (
        (torch.tensor([0, 1]), ValueError, r"prompt_ids must be \(4,\), one a sentence, got \(2,\)"),
        (torch.zeros(4, 1, dtype=torch.long), ValueError, r"prompt_ids must be \(4,\), one a sentence, got \(4, 1\)"),
        (torch.zeros(4), TypeError, "prompt_ids must be torch.int32 or torch.int64, got torch.float32"),
        (torch.tensor([0, 1, 3, 2]), IndexError, r"prompt_ids must be in \[0, 3\), got 3"),
        (torch.tensor([0, -1, 0, 2]), IndexError, r"prompt_ids must be in \[0, 3\), got -1"),
        ("xho", ValueError, "prompt_ids must be a list of names in .* or a tensor, got 'xho'"),
    ):
        with pytest.raises(error, match=message):
            model(**inputs, prompt_ids=ids)


def test_bad_files(tmp_path):
    model = bank_of("bert", "prefix")
    with pytest.raises(FileNotFoundError, match="adapter_config.json, which is not in"):
        model.load_prompt("new", tmp_path / "nothing")
    for settings, message in (
        ({"kind": "prompt"}, "kind of the prompt in .* must be 'prefix', as the model's, got 'prompt'"),
        ({"position_offset": "none"}, "position_offset of the prompt in .* must be 'peft', as the model's, got 'none'"),
        ({"layers": [0]}, r"layers of the prompt in .* must be \[0, 1, 2\], as the model's, got \[0\]"),
        ({"num_virtual_tokens": 4}, r"prompt_embeddings in .* must be \(5, 288\) for this backbone, got \(4, 288\)"),
    ):
        PromptModel(model.backbone, PromptConfig(**({"num_virtual_tokens": P} | settings))).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            model.load_prompt("new", tmp_path)
    assert model.prompt_names == ("default", "task-b", "xho")
    model.save_pretrained(tmp_path)
    file = tmp_path / "fastprompt_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"other_prompts": ["../elsewhere"], "checksum": None}))
    with pytest.raises(ValueError, match="name must be a string, not empty"):
        PromptModel.from_pretrained(build("bert"), tmp_path)
