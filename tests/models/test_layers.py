"""Fused layers: the modules stay what they were, and step aside where a fused operator cannot run."""

import copy
import os
import pickle

import pytest
import torch
import transformers
from helpers import DECODERS, batch, build

from fastprompt import PromptConfig, PromptModel, _native
from fastprompt.models.packed.layers import Fused, FusedAttention, FusedMLP, FusedNorm, fuse_layers
from fastprompt.ops import _checks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
native_only = pytest.mark.skipif(not _native.available("cpu"), reason=str(_native.why_not("cpu")))
DEVICE = {"native": "cpu", "triton": "cpu" if INTERPRETED else "cuda"}
BACKENDS = [
    pytest.param("native", marks=native_only),
    pytest.param("triton", marks=() if INTERPRETED else pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """What runs the fused operators: as on a CPU, and as on a GPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setitem(_checks.ELEMENTWISE, DEVICE["triton"], "triton")
    return request.param


def fused(family: str, auto: str = "AutoModelForCausalLM", dtype: torch.dtype = torch.float32):
    model = build(family, auto, dtype).requires_grad_(False)
    stock = copy.deepcopy(model)
    fuse_layers(model)
    return model, stock


def operators(model, hidden) -> set[str]:
    """The native operators that a layer runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(hidden)
    return {event.name.removeprefix("fastprompt::") for event in profile.events() if "fastprompt::" in event.name}


@pytest.mark.parametrize("family", DECODERS)
def test_a_training_step_runs_the_operators(family, backend):
    backbone = build(family, "AutoModelForCausalLM", torch.float32).to(DEVICE[backend])
    model = PromptModel(backbone, PromptConfig("prompt", 3)).train()
    inputs = batch(lengths=(3, 2)) | {"labels": torch.randint(5, 60, (2, 3))}
    inputs = {name: x.to(DEVICE[backend]) for name, x in inputs.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**inputs).loss.backward()
    names = {event.name for event in profile.events()}
    wanted = "rms_norm_backward", "rotary", "gated_backward"
    if backend == "triton":  # whose launches need no operator: autograd's names tell
        wanted = "rms_norm_tritonBackward", "rotary_tritonBackward", "gated_tritonBackward"
    assert {f"fastprompt::{name}" for name in wanted} <= names
    assert not names & {"aten::silu", "aten::gelu", "aten::rsqrt"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_same_logits_and_gradient_of_embeddings(family, dtype, backend):
    model, stock = (each.to(DEVICE[backend]) for each in fused(family, dtype=dtype))
    embeddings = torch.randn(1, 9, 48).to(DEVICE[backend], dtype)
    out = []
    for each in (model, stock):
        leaf = embeddings.clone().requires_grad_()
        logits = each(inputs_embeds=leaf).logits
        logits.float().square().sum().backward()
        out.append((logits.detach().double(), leaf.grad.double()))
    eps = {torch.float64: 1e-6, torch.float32: 5e-5, torch.bfloat16: 0.1}[dtype]  # as for PEFT in test_equality.py
    for ours, theirs in zip(*out, strict=True):
        assert (ours - theirs).abs().max() < eps * theirs.abs().max()


@native_only
@pytest.mark.parametrize("family", DECODERS)
def test_copies_pickles_saves_and_generates(family, tmp_path):
    model, stock = fused(family)
    inputs = batch(lengths=(6, 6))
    want = model(**inputs).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        weights = dict(again.named_parameters())
        for layer in again.modules():
            if isinstance(layer, Fused):  # it reads its own weights, not the original's
                assert all(p is weights[n] for n, p in again.named_parameters())
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        assert not again(**inputs).logits.any()
    assert torch.equal(model(**inputs).logits, want)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0].mlp) is type(stock.model.layers[0].mlp)
    torch.testing.assert_close(loaded(**inputs).logits, want, rtol=1e-4, atol=1e-4)
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options))


def elsewhere(self, x):
    """A forward that is not the class's own."""
    return x


def test_leaves_alone_what_others_have_patched(monkeypatch):
    model = build("llama", dtype=torch.float32)
    layer, other = model.layers[0], model.layers[1]
    layer.mlp.forward = elsewhere.__get__(layer.mlp)  # as Liger's kernels for a model that is there, or a hook
    fuse_layers(model)
    assert not isinstance(layer.mlp, Fused) and isinstance(other.mlp, FusedMLP)
    hidden = torch.randn(1, 5, 48)
    assert layer.mlp(hidden) is hidden
    model = build("llama", dtype=torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.layers[0].mlp), "forward", elsewhere)  # a class patched for all
        fuse_layers(model)
    assert not isinstance(model.layers[0].mlp, Fused)
    assert isinstance(model.layers[0].input_layernorm, FusedNorm)


# By their parts, in a model of two layers: attentions, MLPs, norms. One layer of SmolLM3 has no rotary embedding; Olmo
# 2 norms all heads together; Cohere rotates neighbours, StarCoder 2 and it have no RMS norms; Gemma 3n's values have a
# norm; the experts of Mixtral are no MLPs.
PARTS = {
    "qwen2": (2, 2, 5), "qwen3": (2, 2, 9), "qwen3_moe": (2, 0, 9), "mistral": (2, 2, 5), "mixtral": (2, 0, 5),
    "gemma2": (2, 2, 9), "granite": (2, 2, 5), "eurobert": (2, 2, 5), "smollm3": (1, 2, 5), "olmo2": (0, 2, 9),
    "phi3": (0, 0, 5), "cohere2": (0, 2, 0), "starcoder2": (2, 0, 0), "gemma3n_text": (0, 4, 36), "gpt2": (0, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("family", PARTS)
def test_layers_are_found_by_their_parts(family):
    """And give the stock layers' results in a packed pass."""
    model = PromptModel(build(family, dtype=torch.float32), PromptConfig("prompt", 3)).train()
    exact = PromptModel(build(family), PromptConfig("prompt", 3)).train()
    exact.prompt.weight.data.copy_(model.prompt.weight)
    modules = list(model.backbone.modules())
    kinds = FusedAttention, FusedMLP, FusedNorm
    assert tuple(sum(isinstance(module, kind) for module in modules) for kind in kinds) == PARTS[family]
    inputs, results = batch((7, 3, 8)), []
    for each in (model, exact):
        hidden = each(**inputs).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        results.append((hidden.detach().double(), each.prompt.weight.grad.double()))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 5e-5 * theirs.abs().max()


def test_probes_draw_no_random_numbers():
    model = build("llama", dtype=torch.float32)
    torch.manual_seed(5)
    fuse_layers(model)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


class Doubling(torch.nn.Module):
    """An RMS norm by its parts, and none by its results."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(48)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def test_a_module_with_other_results_is_left_alone():
    model = build("llama", dtype=torch.float32)
    model.norm, model.layers[0].mlp.act_fn = Doubling(), torch.nn.Tanh()
    fuse_layers(model)
    assert type(model.norm) is Doubling and not isinstance(model.layers[0].mlp, Fused)
    assert isinstance(model.layers[1].mlp, FusedMLP)


@native_only
def test_steps_aside():
    model, stock = fused("llama")
    layer, hidden = model.model.layers[0], torch.randn(1, 5, 48)
    assert operators(layer.mlp, hidden) == {"gated"} and operators(layer.input_layernorm, hidden) == {"rms_norm"}
    with torch.autocast("cpu", torch.bfloat16):
        assert not operators(layer.mlp, hidden)
    assert not operators(torch.compile(layer.mlp, backend="eager"), hidden)
    layer.input_layernorm.weight.requires_grad_()
    assert not operators(layer.input_layernorm, hidden)
    layer.input_layernorm(hidden).sum().backward()
    assert layer.input_layernorm.weight.grad is not None
    assert not operators(layer.half().mlp, hidden.half())
    other = build("llama", dtype=torch.float32, hidden_act="relu")
    fuse_layers(other)
    assert not operators(other.layers[0].mlp, hidden)
