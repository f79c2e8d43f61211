"""Bottleneck adapters against a backbone with the same adapters built into it; what they leave alone; files."""

import copy

import peft
import pytest
import torch
from helpers import CONFIGS, DECODERS, batch, build, without_digests
from safetensors.torch import load_file, save_file

from fastprompt import PromptConfig, PromptModel

P, SIZE = 5, 4


def model_of(family: str, kind: str = "prefix", auto: str = "AutoModel", dtype=torch.float64, **config) -> PromptModel:
    model = PromptModel(build(family, auto, dtype), PromptConfig(kind, P, adapter_size=SIZE, **config)).eval()
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_adapters_built_in(model: PromptModel, family: str, auto: str) -> PromptModel:
    """A model without adapters over a backbone whose modules end in copies of them."""
    backbone = build(family, auto)
    twin = PromptModel(backbone, PromptConfig(model.prompt_config.kind, P)).eval()
    twin.prompt.load_state_dict(model.prompt.state_dict())
    layers = backbone.base_model.layers if family in DECODERS else backbone.encoder.layer
    for layer, adapters in zip(layers, model.adapters, strict=True):
        own = copy.deepcopy(adapters)
        if family in DECODERS:
            layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj, own.attention)
            layer.mlp = torch.nn.Sequential(layer.mlp, own.feed_forward)
        else:
            layer.attention.output.dropout = own.attention
            layer.output.dropout = own.feed_forward
    return twin


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_they_are_adapters_built_into_the_layers(family, checkpointing, kind):
    auto = "AutoModelForCausalLM" if family in DECODERS else "AutoModel"
    model = model_of(family, kind, auto)
    twin = with_adapters_built_in(model, family, auto)
    if checkpointing:
        model.backbone.gradient_checkpointing_enable()
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    if family in DECODERS:
        inputs["labels"] = inputs["input_ids"].masked_fill(~mask, -100)
        results = [each.train()(**inputs).loss for each in (model, twin)]
    else:
        weight = torch.randn(int(mask.sum()), 48, dtype=torch.float64)
        results = [(each.train()(**inputs).last_hidden_state[mask] * weight).sum() for each in (model, twin)]
    model.backbone(**batch())  # a call without them before layers are run again
    torch.testing.assert_close(*results)
    for result in results:
        result.backward()
    own = [model.prompt.weight, *model.adapters.parameters()]
    adapters = [p for name, p in twin.backbone.named_parameters() if p.requires_grad]
    assert len(own) == len(adapters) + 1 == 1 + 3 * 2 * 4
    for ours, theirs in zip(own, [twin.prompt.weight, *adapters], strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", CONFIGS)
def test_they_begin_at_nothing_and_the_backbones_own_calls_have_none(family):
    backbone, inputs = build(family), batch()
    other = PromptModel(backbone, PromptConfig("prefix", P)).eval()
    plain = backbone(**inputs).last_hidden_state  # of the fused layers
    with_prompt = other(**inputs).last_hidden_state
    model = PromptModel(backbone, PromptConfig("prefix", P, adapter_size=SIZE)).eval()
    model.prompt.load_state_dict(other.prompt.state_dict())
    assert torch.equal(model(**inputs).last_hidden_state, with_prompt)
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(model(**inputs).last_hidden_state, with_prompt, rtol=1e-2, atol=1e-2)
    assert torch.equal(backbone(**inputs).last_hidden_state, plain)  # the teacher
    assert torch.equal(other(**inputs).last_hidden_state, with_prompt)  # another prompt on the same backbone
    twice = copy.deepcopy(model)
    expected = model(**inputs).last_hidden_state
    for parameter in model.adapters.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(twice(**inputs).last_hidden_state, expected)  # a copy has adapters of its own
    assert torch.equal(model(**inputs).last_hidden_state, with_prompt)


def test_no_layer_is_a_constant():
    model = model_of("bert", layers=[2])
    assert model.first_layer == 0
    model(**batch()).last_hidden_state.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.adapters[0].parameters())
    with pytest.raises(ValueError, match="start must be at a layer above 0"):
        model(**batch(), lower_states=torch.zeros(25, 48, dtype=torch.float64))


@pytest.mark.parametrize("family", ["xlm-roberta", "gemma3_text"])
def test_files(family, tmp_path):
    model = model_of(family, dtype=torch.float32)
    model.add_prompt("xho")
    model.save_pretrained(tmp_path)
    inputs, ids = batch(), torch.tensor([0, 1, 1, 0])
    expected = model(**inputs, prompt_ids=ids).last_hidden_state
    for trainable in (False, True):
        again = PromptModel.from_pretrained(build(family, dtype=torch.float32), tmp_path, trainable=trainable).eval()
        assert torch.equal(again(**inputs, prompt_ids=ids).last_hidden_state, expected)
        assert all(p.requires_grad == trainable for p in again.adapters.parameters())
    with pytest.raises((KeyError, ValueError, TypeError)):  # PEFT must not leave them out
        peft.PeftModel.from_pretrained(build(family, dtype=torch.float32), tmp_path)
    file = tmp_path / "adapters.safetensors"
    save_file({name: tensor[:1].clone() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="adapters.safetensors in .* is not the one that fastprompt_config.json was"):
        PromptModel.from_pretrained(build(family, dtype=torch.float32), tmp_path)
    without_digests(tmp_path)
    with pytest.raises(ValueError, match="adapters.safetensors must hold .* got "):
        PromptModel.from_pretrained(build(family), tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="directory must hold adapters.safetensors, which is not in"):
        PromptModel.from_pretrained(build(family), tmp_path)


def test_a_bfloat16_backbone():
    model = model_of("llama", dtype=torch.bfloat16)
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32}
    exact = model_of("llama")
    exact.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("backbone.")}, strict=False)
    inputs = batch()
    got, expected = model(**inputs).last_hidden_state, exact(**inputs).last_hidden_state
    assert got.dtype == torch.bfloat16 and (got - expected).abs().max() < 0.1 * expected.abs().max()
