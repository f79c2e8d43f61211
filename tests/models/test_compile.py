"""torch.compile: of a model it changes nothing; the model's own compile() makes one graph of the base model."""

import copy

import peft
import pytest
import torch
from helpers import VOCABULARY, build
from torch._dynamo.utils import counters

import fastprompt
from fastprompt import PromptConfig, PromptModel
from fastprompt.training import PackingCollator

BATCHES = (5, 2, 7), (4, 1), (9, 1, 5)


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(family: str, kind: str):
    auto = "AutoModelForTokenClassification" if family == "bert" else "AutoModelForCausalLM"
    layers = {"layer_types": ["sliding_attention"]} if family == "gemma3_text" else {}
    backbone = build(family, auto, torch.float32, num_hidden_layers=1, **layers)
    if kind == "fused":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return fastprompt.fuse(peft.get_peft_model(backbone, config)).train()
    return PromptModel(backbone, PromptConfig(kind, 3, init_scale=1.0)).train()


def results(model, family: str) -> list[torch.Tensor]:
    """Losses, and the gradients of what trains, of batches of one shape."""
    torch.manual_seed(0)
    collate, found = PackingCollator(max_tokens=20, max_samples=5), []
    for lengths in BATCHES:
        rows = [torch.randint(5, VOCABULARY, (length,)) for length in lengths]
        model.zero_grad()
        loss = model(
            **collate([{"input_ids": row, "labels": row % (2 if family == "bert" else 60)} for row in rows])
        ).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


FAMILIES = [("llama", "prefix"), ("gemma3_text", "prompt"), ("bert", "prompt"), ("llama", "fused")]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_of_a_model_it_changes_nothing(family, kind):
    model = model_of(family, kind)
    compiled = torch.compile(model, backend="eager")
    assert all(map(torch.equal, results(compiled, family), results(model, family)))
    (reason,) = counters["graph_break"]
    assert "the model's own compile() compiles what runs between" in reason
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_the_base_model_is_one_graph(family, kind):
    model = model_of(family, kind)
    expected = results(model, family)
    model.compile(backend="eager", dynamic=False)
    for got, wanted in zip(results(model, family), expected, strict=True):
        torch.testing.assert_close(got, wanted)  # transformers' own norms and products, in another order
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(results(other, family)[0], results(model, family)[0])


def test_bad_options():
    model = model_of("llama", "prefix")
    with pytest.raises(TypeError, match="no_such"):
        model.compile(no_such=1)
    assert model.compile_options is None
