"""rms_norm, rotary and gated: the operators between the products of a decoder's layer."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastprompt import _native
from fastprompt.ops.gated import gated
from fastprompt.ops.rms_norm import rms_norm
from fastprompt.ops.rotary import rotary

BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(not _native.available("cpu"), reason=str(_native.why_not("cpu")))),
    "reference",
]
native_only = BACKENDS[0].marks[0]
DTYPES = [torch.float32, torch.bfloat16]
CALLS = {
    "llama norm": lambda x, w, **how: rms_norm(x, w, 1e-6, **how),
    "gemma norm": lambda x, w, **how: rms_norm(x, w, 1e-6, 1.0, **how),
    "rotary": rotary,
    "silu": lambda gate, up, **how: gated(gate, up, "silu", **how),
    "gelu_tanh": lambda gate, up, **how: gated(gate, up, "gelu_tanh", **how),
}


def oracle(name: str, *inputs: torch.Tensor):
    """The definitions as a model's own layers state them."""
    if "norm" in name:
        x, weight = inputs
        return F.rms_norm(x, (len(weight),), weight + (name == "gemma norm"), 1e-6)
    if name == "rotary":
        query, key, cos, sin = inputs

        def turn(x):
            first, second = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

        return turn(query), turn(key)
    gate, up = inputs
    return (F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")) * up


def arguments(name: str, rows: int, width: int, dtype=torch.float64) -> tuple[list, list]:
    """Fresh inputs: those that train, and the frozen ones."""
    if "norm" in name:
        # One row of zeros, one that is large: eps counts, and does not.
        x = torch.randn(rows, width, dtype=dtype) * torch.tensor([1.0, 0, 100])[:rows].repeat(rows)[:rows, None].to(
            dtype
        )
        return [x], [torch.randn(width, dtype=dtype)]
    if name == "rotary":
        angle = torch.randn(rows, width).double().repeat(1, 2)
        wide = torch.randn(rows, 7, 2 * width, dtype=dtype)  # strided: heads of one projection for all
        return [wide[:, :4], wide[:, 4:6]], [angle.cos().to(dtype), angle.sin().to(dtype)]
    return [torch.randn(rows, width).mul(6).to(dtype), torch.randn(rows, width, dtype=dtype)], []


def run(call, trains, frozen, grads=None, **how):
    leaves = [x.detach().requires_grad_() for x in trains]
    out = call(*leaves, *frozen, **how)
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in out] if grads is None else grads
    return [*out, *torch.autograd.grad(out, leaves, grads)], grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 31), (63, 40), (97, 576)])
@pytest.mark.parametrize("name", CALLS)
def test_against_float64(name, rows, width, backend, dtype):
    trains, frozen = arguments(name, rows, width, dtype)
    got, grads = run(CALLS[name], trains, frozen, backend=backend)
    exact = [[x.double() for x in group] for group in (trains, frozen, grads)]
    want, _ = run(lambda *x: oracle(name, *x), *exact)
    plain, _ = run(lambda *x: oracle(name, *x), trains, frozen, grads)
    for ours, theirs, true in zip(got, plain, want, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        error, budget = ((x.double() - true).abs().max() for x in (ours, theirs))
        assert error <= 2 * budget + torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name, backend):
    trains, frozen = arguments(name, 3, 6)
    leaves = [x.detach().requires_grad_() for x in trains]
    assert torch.autograd.gradcheck(lambda *x: CALLS[name](*x, *frozen, backend=backend), leaves)


@pytest.mark.parametrize("name", CALLS)
def test_strides_empty_inputs_and_a_part_of_the_gradients(name):
    trains, frozen = arguments(name, 9, 10)
    for group in (trains, frozen):
        group[:] = [x.repeat_interleave(2, -1)[..., ::2] for x in group]
    got, grads = run(CALLS[name], trains, frozen)
    torch.testing.assert_close(got, run(lambda *x: oracle(name, *x), trains, frozen, grads)[0])
    none, _ = run(CALLS[name], [x[:0] for x in trains], [x if "norm" in name else x[:0] for x in frozen])
    assert all(len(x) == 0 for x in none)
    last = trains[-1].detach().requires_grad_()
    out = CALLS[name](*trains[:-1], last, *frozen)
    out = out if isinstance(out, tuple) else (out,)
    (grad,) = torch.autograd.grad(out[-1], last, grads[-1])  # the other output's gradient does not come
    torch.testing.assert_close(grad, got[-1])


@native_only
def test_opcheck():
    ops = torch.ops.fastprompt
    x, up = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    heads, angles = torch.randn(4, 2, 6, requires_grad=True), torch.randn(4, 6)
    torch.library.opcheck(ops.rms_norm.default, (x, torch.randn(6), 1e-6, 0.0))
    torch.library.opcheck(ops.rotary.default, (heads, heads, angles, angles, False))
    torch.library.opcheck(ops.gated.default, (x, up, 1))
    torch.library.opcheck(ops.rms_norm_backward.default, (up.detach(), x.detach(), torch.randn(6), 1e-6, 0.0))
    torch.library.opcheck(ops.gated_backward.default, (up.detach(), x.detach(), up.detach(), 0))


@native_only
@pytest.mark.parametrize("instructions", ["portable", "avx512"])
def test_every_instruction_set_in_poisoned_memory(instructions):
    code = (
        "import sys, torch; sys.path.insert(0, 'tests/ops'); from test_elementwise import *\n"
        "torch.use_deterministic_algorithms(True); torch.utils.deterministic.fill_uninitialized_memory = True\n"
        "for name in CALLS:\n"
        "    trains, frozen = arguments(name, 63, 50)\n"
        "    got, grads = run(CALLS[name], trains, frozen, backend='native')\n"
        "    torch.testing.assert_close(got, run(lambda *x: oracle(name, *x), trains, frozen, grads)[0])"
    )
    environment = os.environ | {"FASTPROMPT_CPU": instructions, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, x[0, :3], 1e-6), r"x must be \(..., D\) and weight \(D,\), got \(4, 6\) and \(3,\)"),
        (lambda x: rms_norm(x, x[0].double(), 1e-6), "weight must be torch.float32 on cpu, as x is, got torch.float64"),
        (lambda x: rms_norm(x.int(), x[0], 1e-6), "x must be floating point, got torch.int32"),
        (lambda x: rms_norm(x, x[0].requires_grad_(), 1e-6, backend="native"), "not available: .*"),
        (lambda x: rotary(x, x, x, x), r"query must be \(T, H, D\) with D even, got \(4, 6\)"),
        (lambda x: rotary(x[:, None], x[:3, None], x, x), r"key must be \(4, Hkv, 6\), as query is, got \(3, 1, 6\)"),
        (
            lambda x: rotary(x[:, None], x[:, None], x, x[:3]),
            r"cos and sin must be \(4, 6\), got \(4, 6\) and \(3, 6\)",
        ),
        (lambda x: gated(x, x[:3], "silu"), r"up must be \(4, 6\), as gate is, got \(3, 6\)"),
        (lambda x: gated(x, x, "relu"), "activation must be one of .* got 'relu'"),
        (lambda x: gated(x, x, "silu", backend="cuda"), "backend must be None, 'native' or 'reference', got 'cuda'"),
        (lambda x: gated(x.half(), x.half(), "silu", backend="native"), "not available: .*"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6))
