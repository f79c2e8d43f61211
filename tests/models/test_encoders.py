"""Encoders of prompts against PEFT's with the same weights, their files, and dropout on prompts."""

import peft
import pytest
import torch
from helpers import CONFIGS, batch, build, without_digests
from safetensors.torch import load_file, save_file

from fastprompt import PromptConfig, PromptModel

P, HIDDEN = 5, 24
CASES = [("prompt", "mlp"), ("prompt", "lstm"), ("prefix", "mlp")]


def model_of(family: str, kind: str, encoder: str, dtype=torch.float64, **config) -> PromptModel:
    torch.manual_seed(3)
    settings = PromptConfig(kind, P, encoder=encoder, encoder_hidden_size=HIDDEN, **config)
    return PromptModel(build(family, dtype=dtype), settings).train()


def peft_twin(model: PromptModel, family: str) -> peft.PeftModel:
    """PEFT's model with the same weights: its names beside ours, in the order of their parameters."""
    kind, encoder = model.prompt_config.kind, model.prompt_config.encoder
    common = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": P, "encoder_hidden_size": HIDDEN}
    if kind == "prefix":
        config = peft.PrefixTuningConfig(**common, prefix_projection=True)
    else:
        config = peft.PromptEncoderConfig(**common, encoder_reparameterization_type=encoder.upper())
    twin = peft.get_peft_model(build(family), config).to(torch.float64).train()
    theirs, ours = list(twin.prompt_encoder["default"].parameters()), list(model.prompt.parameters())
    for their, own in zip(theirs, ours, strict=True):
        assert their.shape == own.shape
        their.data.copy_(own)
    return twin


@pytest.mark.parametrize(("kind", "encoder"), CASES)
@pytest.mark.parametrize("family", CONFIGS)
def test_they_are_pefts(family, kind, encoder):
    model = model_of(family, kind, encoder, prefix_in_window=True)
    twin = peft_twin(model, family)
    rows = twin.get_prompt_embedding_to_save("default")
    torch.testing.assert_close(model.prompt.rows(), rows.to(torch.float64))
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    weight = torch.randn(int(mask.sum()), 48, dtype=torch.float64)
    calls = []
    model.prompt.encoder.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    ours = model(**inputs).last_hidden_state[mask]
    theirs = twin(**inputs).last_hidden_state[:, -mask.shape[1] :][mask]
    assert calls == [rows.shape]  # once, not for each sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for output in (ours, theirs):
        (output * weight).sum().backward()
    for own, their in zip(model.prompt.parameters(), twin.prompt_encoder["default"].parameters(), strict=True):
        torch.testing.assert_close(own.grad, their.grad, rtol=0, atol=2e-6 * float(their.grad.abs().max()))


@pytest.mark.parametrize(("kind", "encoder"), CASES)
def test_files(kind, encoder, tmp_path):
    model = model_of("bert", kind, encoder, torch.float32).eval()
    model.add_prompt("xho")
    model.save_pretrained(tmp_path)
    inputs, ids = batch(), torch.tensor([1, 0, 0, 1])
    mask = inputs["attention_mask"].bool()
    expected = model(**inputs, prompt_ids=ids).last_hidden_state
    fixed = PromptModel.from_pretrained(build("bert", dtype=torch.float32), tmp_path).eval()
    assert fixed.prompt.encoder is None and not any(p.requires_grad for p in fixed.parameters())
    assert torch.equal(fixed(**inputs, prompt_ids=ids).last_hidden_state, expected)
    again = PromptModel.from_pretrained(build("bert", dtype=torch.float32), tmp_path, trainable=True).eval()
    assert torch.equal(again(**inputs, prompt_ids=ids).last_hidden_state, expected)
    own, loaded = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, again))
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    theirs = peft.PeftModel.from_pretrained(build("bert", dtype=torch.float32), tmp_path).eval()
    stock = theirs(**inputs).last_hidden_state[:, -mask.shape[1] :]
    torch.testing.assert_close(model(**inputs).last_hidden_state[mask], stock[mask], rtol=1e-4, atol=1e-5)

    tensors = load_file(tmp_path / "encoder.safetensors")
    save_file(tensors | {"weight": tensors["weight"] + 3}, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="encoder.safetensors in .* is not the one that fastprompt_config.json was"):
        PromptModel.from_pretrained(build("bert", dtype=torch.float32), tmp_path, trainable=True)
    without_digests(tmp_path)
    with pytest.raises(ValueError, match="makes another prompt"):
        PromptModel.from_pretrained(build("bert"), tmp_path, trainable=True)
    save_file(tensors | {"weight": tensors["weight"][1:]}, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="encoder.safetensors must hold .* got "):
        PromptModel.from_pretrained(build("bert"), tmp_path, trainable=True)


def test_without_the_encoders_file(tmp_path):
    model_of("bert", "prompt", "mlp").save_pretrained(tmp_path)
    (tmp_path / "encoder.safetensors").unlink()
    PromptModel.from_pretrained(build("bert"), tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold encoder.safetensors to go on training"):
        PromptModel.from_pretrained(build("bert"), tmp_path, trainable=True)


def test_prompts_with_and_without_an_encoder_in_one_model(tmp_path):
    """Loaded for use, a prompt is its rows alone, and stays so; one added to it has an encoder of its own."""
    model_of("bert", "prompt", "lstm").save_pretrained(tmp_path / "first")
    model = PromptModel.from_pretrained(build("bert"), tmp_path / "first").eval()
    model.add_prompt("xho")
    model.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "encoder.safetensors").exists()
    again = PromptModel.from_pretrained(build("bert"), tmp_path / "second", trainable=True).eval()
    assert again.prompt.encoder is None and again.other_prompts["xho"].encoder.hidden_size == HIDDEN
    inputs, ids = batch(), torch.tensor([0, 1, 1, 0])
    expected = model(**inputs, prompt_ids=ids).last_hidden_state
    assert torch.equal(again(**inputs, prompt_ids=ids).last_hidden_state, expected)
    again.save_pretrained(tmp_path / "third")
    third = PromptModel.from_pretrained(build("bert"), tmp_path / "third", trainable=True).eval()
    assert torch.equal(third(**inputs, prompt_ids=ids).last_hidden_state, expected)
    assert third.other_prompts["xho"].encoder is not None


def test_a_prompt_with_an_encoder_goes_into_a_model_without(tmp_path):
    model = model_of("llama", "prompt", "mlp")
    model.save_prompt("default", tmp_path)
    other = PromptModel(build("llama"), PromptConfig("prompt", P))
    other.load_prompt("rows", tmp_path)
    other.load_prompt("encoder", tmp_path, trainable=True)
    inputs = batch()
    rows, encoder = (other(**inputs, prompt_ids=[name] * 4).last_hidden_state for name in ("rows", "encoder"))
    torch.testing.assert_close(rows, encoder)
    encoder.square().sum().backward()
    assert all(p.grad is not None for p in other.other_prompts["encoder"].parameters())
    assert other.prompt.weight.grad is None


def test_a_prefix_in_some_layers_and_the_default_width():
    model = PromptModel(build("llama"), PromptConfig("prefix", P, encoder="mlp", layers=[1, 2]))
    assert model.prompt.weight.shape == (P, 16) and model.prompt.encoder[0].weight.shape == (16, 16)
    assert model.prompt.rows().shape == (P, 2 * 2 * 16) and model.prompt.rows().dtype == torch.float64
    assert list(model.prompt()) == [1, 2]


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_dropout(family, kind):
    model = PromptModel(build(family), PromptConfig(kind, P, init_scale=1.0, dropout=0.5))
    plain = PromptModel(build(family), PromptConfig(kind, P))
    inputs = batch()
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(torch.ones_like(model.prompt.weight), 0.5)
    assert 0.3 < (kept == 0).double().mean() < 0.7
    plain.prompt.weight.data.copy_(model.prompt.weight * kept)
    torch.manual_seed(1)
    got = model.train()(**inputs).last_hidden_state
    torch.testing.assert_close(got, plain(**inputs).last_hidden_state)
    got.square().sum().backward()
    assert (model.prompt.weight.grad[kept == 0] == 0).all()
    plain.prompt.weight.data.copy_(model.prompt.weight)
    torch.testing.assert_close(model.eval()(**inputs).last_hidden_state, plain(**inputs).last_hidden_state)


def test_dropout_is_not_saved(tmp_path):
    model = PromptModel(build("bert"), PromptConfig("prefix", P, dropout=0.5)).train()
    model.save_pretrained(tmp_path)
    again = PromptModel.from_pretrained(build("bert"), tmp_path, trainable=True)
    assert torch.equal(again.prompt.weight, model.prompt.weight) and again.prompt.dropout == 0.5
