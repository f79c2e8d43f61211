import peft
import pytest
import torch
from helpers import CONFIGS, DECODERS, build

from fastprompt.nn import Prefix, Prompt
from fastprompt.nn.prompts import join_prefix

ROWS, KV_HEADS, HEAD_DIM = 5, 2, 3
LAYERS = [[0], [0, 1, 2], [1, 4], []]


def prefix(layers, rows=ROWS):
    return Prefix(torch.randn(rows, len(layers) * 2 * KV_HEADS * HEAD_DIM), layers, KV_HEADS, HEAD_DIM)


def test_prompt():
    initial = torch.randn(4, 6, requires_grad=True)
    prompt = Prompt(initial)
    assert torch.equal(prompt(), initial) and set(prompt.state_dict()) == {"weight"}
    grad = torch.randn(4, 6)
    prompt().backward(grad)
    assert torch.equal(prompt.weight.grad, grad) and initial.grad is None
    initial.detach().zero_()
    assert prompt().all()  # its own memory


def test_prefix_keeps_its_own_memory():
    initial = torch.randn(4, 2 * KV_HEADS * HEAD_DIM, requires_grad=True)
    module = Prefix(initial, [0], KV_HEADS, HEAD_DIM)
    assert torch.equal(module.weight, initial) and set(module.state_dict()) == {"weight"}
    torch.stack(module()[0]).sum().backward()
    assert initial.grad is None
    initial.detach().zero_()
    assert module.weight.all()


@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_prefix_element_by_element(layers, rows):
    module = prefix(layers, rows)
    found = module()
    assert list(found) == layers
    for i, layer in enumerate(layers):
        for j, part in enumerate(found[layer]):  # key, value
            assert part.shape == (1, KV_HEADS, rows, HEAD_DIM)
            for head in range(KV_HEADS):
                start = ((2 * i + j) * KV_HEADS + head) * HEAD_DIM
                assert torch.equal(part[0, head], module.weight[:, start : start + HEAD_DIM])


def test_prefix_is_a_view_of_the_weight():
    module = prefix([0, 2])
    for part in (part for pair in module().values() for part in pair):
        assert part.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_order_is_pefts(family):
    auto, task = ("AutoModelForCausalLM", "CAUSAL_LM") if family in DECODERS else ("AutoModel", "FEATURE_EXTRACTION")
    config = peft.PrefixTuningConfig(num_virtual_tokens=ROWS, task_type=task)
    model = peft.get_peft_model(build(family, auto), config)
    weight = model.prompt_encoder["default"].embedding.weight
    torch.nn.init.normal_(weight)
    theirs = model.get_prompt(batch_size=2).layers
    settings = CONFIGS[family]
    kv_heads = getattr(settings, "num_key_value_heads", settings.num_attention_heads)
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    layers = list(range(settings.num_hidden_layers))
    module = Prefix(weight, layers, kv_heads, head_dim)
    ours = module()
    assert list(ours) == layers and len(theirs) == len(layers)
    for layer, cached in enumerate(theirs):
        for got, want in zip(ours[layer], (cached.keys, cached.values), strict=True):
            assert torch.equal(got.expand_as(want).to(want.dtype), want)
    # The gradient comes back in the same order: PEFT's is the sum over the batch.
    grads = [torch.randn_like(part) for pair in ours.values() for part in pair]
    torch.autograd.backward([part for pair in ours.values() for part in pair], grads)
    torch.autograd.backward(
        [part for cached in theirs for part in (cached.keys, cached.values)],
        [torch.cat([grad, torch.zeros_like(grad)]).to(theirs[0].keys.dtype) for grad in grads],
    )
    assert torch.equal(module.weight.grad, weight.grad)


@pytest.mark.parametrize("layers", LAYERS[:3], ids=str)
def test_join_prefix_is_the_inverse(layers):
    module = prefix(layers)
    pairs = [(key[0], value[0]) for key, value in module().values()]
    assert torch.equal(join_prefix(pairs), module.weight)
    pairs = [tuple(torch.randn(2, KV_HEADS, ROWS, HEAD_DIM)) for _ in layers]
    found = Prefix(join_prefix(pairs), layers, KV_HEADS, HEAD_DIM)()
    for layer, (key, value) in zip(layers, pairs, strict=True):
        assert torch.equal(found[layer][0][0], key) and torch.equal(found[layer][1][0], value)


@pytest.mark.parametrize("layers", LAYERS[:3], ids=str)
def test_prefix_gradient(layers):
    module = prefix(layers)
    grads = [tuple(torch.randn(2, 1, KV_HEADS, ROWS, HEAD_DIM)) for _ in layers]
    torch.autograd.backward([part for pair in module().values() for part in pair], [g for pair in grads for g in pair])
    assert torch.equal(module.weight.grad, join_prefix([(key[0], value[0]) for key, value in grads]))


def test_gradient_of_a_layer_alone():
    module = prefix([0, 1, 3])
    module()[1][1].sum().backward()  # the value of the second
    width = KV_HEADS * HEAD_DIM
    want = torch.zeros_like(module.weight)
    want[:, 3 * width : 4 * width] = 1
    assert torch.equal(module.weight.grad, want)
