"""What trains under each method, what each begins as, and backbones cut to their first layers."""

import copy
import re

import pytest
import torch
from helpers import CONFIGS, DECODERS, ENCODERS, batch, build

from fastprompt.models.methods import METHODS, AdaptedBackbone, AdapterConfig, keep_layers

TOLERANCE = dict(rtol=1e-3, atol=2e-6)  # the stock norms of decoders round to float32
PROMPTS = ("prompt", "prefix")


def adapt(family: str, method: str, **options) -> AdaptedBackbone:
    return AdaptedBackbone(build(family, seed=1), AdapterConfig(method, num_virtual_tokens=3, **options))


def names(adapted: AdaptedBackbone) -> set[str]:
    return {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def of_backbone(family: str, pattern: str) -> set[str]:
    return {f"backbone.{name}" for name, _ in build(family).named_parameters() if re.search(pattern, name)}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_what_trains(family, method):
    adapted = adapt(family, method)
    targets = "query|value" if family in ENCODERS else "q_proj|v_proj"
    modules = {name.rpartition(".")[0] for name in of_backbone(family, rf"({targets})\.weight$")}
    expected = {
        "head": set(),
        "full": of_backbone(family, ""),
        "lora": {f"{name}.lora_{side}.default.weight" for name in modules for side in "AB"},
        "prompt": {"prompted.prompt.weight"},
        "prefix": {"prompted.prompt.weight"},
    }[method]
    assert names(adapted) == expected and (modules or method != "lora")
    prompts = {id(parameter) for parameter in adapted.prompt_parameters()}
    assert len(prompts) == (method in PROMPTS)
    assert len(adapted.weights()) == len(expected) - len(prompts)
    assert not {id(parameter) for parameter in adapted.weights()} & prompts
    assert not any(module.training for module in adapted.modules())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", ["head", "lora", "prefix"])
def test_norms_and_top_layers(family, method):
    own, norm = names(adapt(family, method)), "LayerNorm|norm"
    top = r"layers?\.(1|2)\."
    assert of_backbone(family, norm) and len(of_backbone(family, top)) > 10
    plain = {name for name in names(adapt(family, method, norms=True)) if "lora" not in name} - own
    assert plain == of_backbone(family, norm)
    above = {name.replace("base_layer.", "") for name in names(adapt(family, method, top_layers=2)) - own}
    assert above == of_backbone(family, top)
    both = {name.replace("base_layer.", "") for name in names(adapt(family, method, norms=True, top_layers=2)) - own}
    assert both == of_backbone(family, norm) | of_backbone(family, top)


def test_adapters_train_with_a_prompt():
    adapted = adapt("bert", "prefix", adapter_size=5)
    trained = names(adapted)
    assert "prompted.prompt.weight" in trained and all(
        "adapters" in name for name in trained - {"prompted.prompt.weight"}
    )
    assert len(adapted.prompt_parameters()) == 1 and len(adapted.weights()) == len(trained) - 1 > 0


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", ["head", "full", "lora"])
def test_begins_as_the_stock_model(family, method):
    """And, of LoRA, goes on as PEFT's own, with gradients as of the stock pass."""
    adapted, stock = adapt(family, method), build(family, seed=1)
    inputs = batch()
    expected = stock(**inputs).last_hidden_state.detach()
    present = inputs["attention_mask"].bool()
    hidden = adapted(**inputs)
    torch.testing.assert_close(hidden[present], expected[present], **TOLERANCE)
    assert not hidden[~present].any()
    if method == "head":
        return
    if method == "lora":
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        from peft import LoraConfig, inject_adapter_in_model

        stock = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16), stock)
        stock.load_state_dict(adapted.backbone.state_dict())
    weights = torch.randn_like(expected)[present]
    (adapted(**inputs)[present] * weights).sum().backward()
    (stock(**inputs).last_hidden_state[present] * weights).sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in adapted.backbone.named_parameters():
        if parameter.requires_grad and "pooler" not in name:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, **TOLERANCE, msg=name)


@pytest.mark.parametrize("family", DECODERS)
def test_norms_get_gradients_where_they_train(family):
    adapted, stock = adapt(family, "head", norms=True), build(family, seed=1)
    inputs = batch()
    present = inputs["attention_mask"].bool()
    adapted(**inputs)[present].square().sum().backward()
    stock(**inputs).last_hidden_state[present].square().sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in adapted.backbone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, **TOLERANCE)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_first_layers(family, count):
    """Of a decoder the norm that follows the last layer follows the one that is kept."""
    whole, short = build(family), build(family)
    keep_layers(short, count)
    keep_layers(short, count)  # once more, nothing
    inputs = batch()
    present = inputs["attention_mask"].bool()
    expected, norm = [], getattr(whole, "norm", None)
    if norm is None:
        expected = whole(**inputs, output_hidden_states=True).hidden_states[count]
    else:
        states = []
        whole.layers[count - 1].register_forward_hook(lambda module, args, output: states.append(output))
        whole(**inputs)
        expected = norm(states[0][0] if isinstance(states[0], tuple) else states[0])
    got = short(**inputs).last_hidden_state
    torch.testing.assert_close(got[present], expected[present], **TOLERANCE)
    packed = AdaptedBackbone(short, AdapterConfig("head"))
    assert len(packed.layers) == count and short.config.num_hidden_layers == count
    torch.testing.assert_close(packed(**inputs)[present], expected[present], **TOLERANCE)
    prompted = AdaptedBackbone(copy.deepcopy(short), AdapterConfig("prefix", num_virtual_tokens=3))
    assert prompted(**inputs).isfinite().all() and prompted.prompted.prompt.layers == list(range(count))


@pytest.mark.parametrize("family", DECODERS)
def test_first_layers_of_a_model_with_its_head(family):
    model = build(family, "AutoModelForCausalLM")
    keep_layers(model.base_model, 2)
    assert model(**batch()).logits.isfinite().all() and model.config.num_hidden_layers == 2


@pytest.mark.parametrize("family", CONFIGS)
def test_text_positions(family):
    table = {"bert": 64, "xlm-roberta": 64}.get(family)
    for method, used in (("head", 0), ("prefix", 3), ("prompt", 3)):
        assert adapt(family, method).text_positions == (None if table is None else table - used)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adapter", {}, r"method must be one of \('prefix', .* got 'adapter'"),
        ("prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer, 1 or more, got 0"),
        ("prompt", {"layers": [0]}, "layers is for kind 'prefix'"),
        ("lora", {"adapter_size": 8}, "adapter_size is for methods 'prompt' and 'prefix', got it with 'lora'"),
        ("head", {"top_layers": 4}, r"top_layers must be in \[0, 3\], the backbone's, got 4"),
        ("head", {"top_layers": -1}, "top_layers must be an integer, 0 or more, got -1"),
        ("lora", {"lora_rank": 0}, "lora_rank must be an integer, 1 or more, got 0"),
        ("head", {"num_layers": True}, "num_layers must be an integer or nothing, got True"),
    ],
)
def test_errors(method, options, message):
    with pytest.raises(ValueError, match=message):
        AdaptedBackbone(build("bert"), AdapterConfig(method, **options))


def test_a_prompt_begins_as_a_text():
    config = AdapterConfig("prefix", init_text="w1 w2").prompt(lambda text, **_: {"input_ids": [5, 6]})
    assert config.init == "text" and config.init_ids == [5, 6]
    with pytest.raises(ValueError, match="init_text must have at least one token, got none in ''"):
        AdapterConfig("prefix", init_text="").prompt(lambda text, **_: {"input_ids": []})


@pytest.mark.parametrize("count", [0, 4, -1])
def test_layers_that_are_not_there(count):
    with pytest.raises(ValueError, match=rf"num_layers must be in \[1, 3\], the backbone's, got {count}"):
        keep_layers(build("bert"), count)
