"""Every family against PEFT in float64 or, where PEFT has no prefix for it, against the formula; and those refused.

`python tests/compat/family_table.py` runs all kinds of prompt with all heads, and writes docs/families.md.
"""

import copy

import pytest
import torch
import transformers
from families import FAMILIES, KINDS, REFUSED, compared, heads
from helpers import batch, build

from fastprompt import PromptConfig, PromptModel


def limit(family: str) -> float:
    """RMS norms, and losses of decoders, are taken in float32 whatever the dtype; ours of float64 are not."""
    return 1e-5 if family == "eurobert" or "AutoModelForCausalLM" in heads(family) else 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_peft(family):
    auto = heads(family)[1]  # of a decoder the language model, of an encoder the classifier
    for kind in KINDS:
        assert max(compared(family, auto, kind).values()) < limit(family), kind


@pytest.mark.parametrize("family", ["albert", "modernbert", "opt"])
def test_base_models(family):
    """ALBERT's own pooler, ModernBERT's window, and a base model that its head does not call."""
    for kind in KINDS:
        assert max(compared(family, "AutoModel", kind).values()) < 1e-12, kind


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_a_decoder_made_an_encoder(kind):
    config = {"use_bidirectional_attention": True, "sliding_window": 6}
    assert max(compared("gemma3_text", "AutoModel", kind, **config).values()) < 1e-6


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gptj", "its layers' GPTJAttention do not call transformers' AttentionInterface"),
        ("deberta-v2", "its layers' .*DisentangledSelfAttention do not call transformers' AttentionInterface"),
        ("falcon", "its layers' FalconAttention do not call transformers' AttentionInterface"),
        ("bloom", "BloomModel takes no position_ids"),
        ("mpt", "MptModel takes no position_ids"),
        ("mamba", "MambaModel takes no position_ids"),
        ("t5", "an encoder-decoder must be a sequence-to-sequence language model with its head, got T5Model"),
        ("gpt_oss", "GptOssAttention hands s_aux to attention, which a packed pass does not know"),
        ("falcon_h1", "a Conv1d, mixes rows outside attention"),
        ("qwen3_next", "of its 4 layers attention was called"),
        ("deepseek_v3", "queries, keys and values of DeepseekV3Attention differ in features"),
    ],
)
def test_refused(family, reason):
    backbone = transformers.AutoModel.from_config(REFUSED[family])
    before = {name: copy.copy(value) for name, value in vars(backbone).items()}
    with pytest.raises(ValueError, match=f"backbone of family {family!r} is not served: .*{reason}"):
        PromptModel(backbone, PromptConfig())
    assert vars(backbone) == before and all(p.requires_grad for p in backbone.parameters())
    assert backbone.config._attn_implementation != "fastprompt"


def test_a_model_without_a_layer_of_its_class():
    backbone = build("qwen2")
    del backbone.layers[1]
    with pytest.raises(ValueError, match=r"'qwen2' is not served: it lacks layers.1.self_attn, which its class has"):
        PromptModel(backbone, PromptConfig())


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "mistral", "gemma4_text"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generate(family, kind):
    """As its own forward says, token by token."""
    backbone = build(family, "AutoModelForCausalLM")
    backbone.generation_config.eos_token_id = None
    model = PromptModel(backbone, PromptConfig(kind, 3, init="vocabulary")).eval()
    inputs = batch((8, 5), side="left")
    got = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(3):
        ids = torch.cat([ids, model(input_ids=ids, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(got, ids)


@pytest.mark.parametrize("family", ["albert", "distilbert", "modernbert"])
def test_a_prefix_begins_as_the_keys_of_words(family):
    """Also where the model keeps no cache."""
    model = PromptModel(build(family), PromptConfig(init="text", init_ids=[7, 8, 9], num_virtual_tokens=3))
    assert model.prompt.weight.shape == (3, 2 * 2 * 32) and model.prompt.weight.std() > 0.01
    again = PromptModel(build(family), PromptConfig(init="text", init_ids=[7, 8], num_virtual_tokens=2))
    first = 2 * 32  # keys and values of the first layer see no other row
    torch.testing.assert_close(again.prompt.weight[:, :first], model.prompt.weight[:2, :first])


@pytest.mark.parametrize(("family", "config"), [("electra", "embedding_size"), ("opt", "word_embed_proj_dim")])
def test_embeddings_of_another_width(family, config):
    """A prompt is as wide as they are, and what goes from layer to layer is not. PEFT has only one width."""
    model = PromptModel(build(family, **{config: 16}), PromptConfig("prompt", 3)).eval()
    ids = torch.tensor([[7, 8, 9, 10]])
    rows = torch.cat([model.prompt.weight[None], model.backbone.get_input_embeddings()(ids)], 1)
    got = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, model.backbone(inputs_embeds=rows).last_hidden_state[:, 3:], rtol=1e-6, atol=1e-6)
    model = PromptModel(model.backbone, PromptConfig("prefix", 3, layers=[1], init_scale=1.0)).eval()
    inputs = batch()
    states = model.lower_states(**inputs)
    whole, upper = (model(**inputs, **more).last_hidden_state for more in ({}, {"lower_states": states}))
    torch.testing.assert_close(upper, whole)


def test_several_streams():
    model = PromptModel(build("gemma3n_text"), PromptConfig(layers=[1]))
    with pytest.raises(ValueError, match="output_hidden_states must not be set: .* several streams"):
        model(**batch(), output_hidden_states=True)
    with pytest.raises(ValueError, match="lower_states are of layers that hand on one stream"):
        model.lower_states(**batch())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "electra", "mixtral", "modernbert", "distilbert"])
def test_adapters(family):
    model = PromptModel(build(family), PromptConfig("prefix", 3, adapter_size=4)).eval()
    inputs = batch()
    before = model(**inputs).last_hidden_state
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter)
    after = model(**inputs).last_hidden_state
    after.square().sum().backward()
    assert not torch.allclose(before, after) and all(p.grad.any() for p in model.adapters.parameters())


def test_adapters_where_their_place_is_not_known():
    with pytest.raises(ValueError, match="adapter_size must be None: it is not known where adapters go"):
        PromptModel(build("albert"), PromptConfig("prefix", 3, adapter_size=4))


def test_layers_that_read_the_keys_of_others():
    with pytest.raises(ValueError, match="layers must have keys of their own, got 3, which reads those of 1"):
        PromptModel(build("gemma3n_text"), PromptConfig(layers=[0, 3]))
    model = PromptModel(build("gemma3n_text"), PromptConfig(layers=[1], init_scale=1.0))
    model(**batch()).last_hidden_state.square().sum().backward()
    assert model.prompt.weight.grad.any()


def test_routers():
    model = PromptModel(build("mixtral", "AutoModelForCausalLM"), PromptConfig())
    with pytest.raises(ValueError, match="output_router_logits must not be set"):
        model(**batch(), output_router_logits=True)
    model.backbone.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits must not be set"):
        model(**batch())
