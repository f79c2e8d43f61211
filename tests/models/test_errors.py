"""Bad input to PromptModel and PromptConfig: one clear error, before any work."""

import peft
import pytest
import torch
import transformers
from helpers import batch, build
from transformers.modeling_outputs import CausalLMOutputWithPast

import fastprompt
from fastprompt import PromptConfig, PromptModel


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lora"}, r"kind must be one of \('prefix', 'prompt'\), got 'lora'"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, got 0"),
        ({"num_virtual_tokens": 2.5}, "num_virtual_tokens must be a positive integer, got 2.5"),
        ({"init": "zeros"}, "init must be one of"),
        ({"init": "text"}, "init 'text' and init_ids go together"),
        ({"init_ids": [1]}, "init 'text' and init_ids go together"),
        ({"init": "text", "init_ids": []}, "init_ids must hold at least one"),
        ({"init_scale": -1.0}, "init_scale must not be negative"),
        ({"kind": "prompt", "layers": [0]}, "layers is for kind 'prefix'"),
        ({"kind": "prompt", "position_offset": "none"}, "position_offset 'none' is for kind 'prefix'"),
        ({"encoder": "gru"}, r"encoder must be one of \(None, 'mlp', 'lstm'\), got 'gru'"),
        ({"encoder": "lstm"}, "encoder 'lstm' is for kind 'prompt'"),
        ({"encoder": "mlp", "init": "vocabulary"}, "init must be 'random' with an encoder.* got 'vocabulary'"),
        ({"encoder": "mlp", "encoder_hidden_size": 0}, "encoder_hidden_size must be a positive integer, got 0"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size is for an encoder, got 8 without one"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"adapter_size": 0}, "adapter_size must be a positive integer, got 0"),
        ({"position_offset": "some"}, "position_offset must be one of"),
    ],
)
def test_config(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptConfig(**settings)


def test_unknown_layers():
    backbone = build("bert")
    for layers, got in (([0, 7], "7"), ([-4], "-4"), (["first"], "'first'")):
        with pytest.raises(ValueError, match=f"layers must be indices of the backbone's 3 layers, got {got}"):
            PromptModel(backbone, PromptConfig(layers=layers))
    with pytest.raises(ValueError, match="layers must be different"):
        PromptModel(backbone, PromptConfig(layers=[0, -3]))
    assert all(p.requires_grad for p in backbone.parameters()), "a refused backbone is left as it was"


def test_families_that_are_not_supported():
    t5 = transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=10)
    with pytest.raises(ValueError, match="sequence-to-sequence language model with its head, got T5Model"):
        PromptModel(transformers.T5Model(t5), PromptConfig())
    with pytest.raises(TypeError, match="backbone must be a transformers model, got Linear"):
        PromptModel(torch.nn.Linear(2, 2), PromptConfig())
    with pytest.raises(ValueError, match="must be an encoder, got is_decoder"):
        PromptModel(build("bert", is_decoder=True), PromptConfig())


@pytest.mark.parametrize(("family", "table"), [("bert", 64), ("xlm-roberta", 64)])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_longer_than_the_position_table(family, table, kind):
    backbone = build(family)
    with pytest.raises(ValueError, match=f"num_virtual_tokens must leave room .* {table} rows, got {table}"):
        PromptModel(backbone, PromptConfig(kind, table))
    model = PromptModel(backbone, PromptConfig(kind, 60))
    model(**batch(lengths=(4,)))
    with pytest.raises(ValueError, match="input_ids must have at most 4 tokens a sentence.* got 5"):
        model(**batch(lengths=(5, 2)))


def test_inputs():
    model = PromptModel(build("llama", "AutoModelForCausalLM"), PromptConfig())
    inputs = batch()
    for extra, message in (
        ({"inputs_embeds": torch.zeros(4, 12, 48)}, "exactly one of input_ids and inputs_embeds"),
        ({"use_cache": True}, "past_key_values and use_cache must not be given"),
        ({"output_attentions": True}, "output_attentions must not be set"),
        ({"logits_to_keep": 1}, "logits_to_keep must not be given"),
        ({"attention_mask": torch.ones(4, 3)}, r"attention_mask must be \(4, 12\), as the batch, got \(4, 3\)"),
        ({"labels": torch.zeros(4, 3)}, r"labels must be \(4, 12\), as the batch, got \(4, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**(inputs | extra))
    with pytest.raises(ValueError, match=r"init_ids must be in \[0, 61\)"):
        PromptModel(model.backbone, PromptConfig(init="text", init_ids=[3, 61]))


@pytest.mark.parametrize("fused", [False, True])
def test_a_forward_put_in_place_of_the_models(fused):
    """One that goes on to the base model, as Liger's and accelerate's do, is called; another is told."""
    backbone, config = build("llama", "AutoModelForCausalLM"), peft.PrefixTuningConfig(num_virtual_tokens=3)
    config.task_type = "CAUSAL_LM"
    if fused:
        model = fastprompt.fuse(peft.get_peft_model(backbone, config).double()).eval()
    else:
        model = PromptModel(backbone, PromptConfig("prefix", 3)).eval()
    inputs, own, calls = batch(), backbone.forward, []
    expected = model(**inputs).logits
    backbone.forward = lambda *args, **kwargs: calls.append(kwargs) or own(*args, **kwargs)
    assert torch.equal(model(**inputs).logits, expected) and len(calls) == 1
    backbone.forward = lambda *args, **kwargs: CausalLMOutputWithPast(logits=torch.zeros(4, 12, 61))
    message = r"forward of LlamaForCausalLM must call its base model, .* and test_errors.*<lambda>, .* did not"
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    del backbone.forward
    assert torch.equal(model(**inputs).logits, expected)
