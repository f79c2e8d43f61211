"""rms_norm, rotary and gated: the operators between the products of a decoder's layer."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, in_layout
from torch._subclasses.fake_tensor import FakeTensorMode

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


OPERATORS = {  # as they are registered, with their own autograd
    "llama norm": lambda x, w: torch.ops.fastprompt.rms_norm(x, w, 1e-6, 0.0),
    "rotary": lambda *x: torch.ops.fastprompt.rotary(*x, False),
    "silu": lambda gate, up: torch.ops.fastprompt.gated(gate, up, 0),
}
TWICE = [(name, CALLS[name], backend) for name in OPERATORS for backend in ("native", "reference")]
TWICE += [(name, OPERATORS[name], None) for name in OPERATORS]


@native_only
@pytest.mark.parametrize(("name", "call", "backend"), TWICE)
def test_second_derivatives_are_right_or_refused(name, call, backend):
    trains, frozen = arguments(name, 3, 4)
    leaves, how = [x.detach().requires_grad_() for x in trains], {"backend": backend} if backend else {}
    if backend == "reference" or name == "rotary":
        assert torch.autograd.gradgradcheck(lambda *x: call(*x, *frozen, **how), leaves)
        return
    out = call(*leaves, *frozen, **how)
    outer = torch.randn_like(out, requires_grad=True)
    penalty = sum(x.square().sum() for x in torch.autograd.grad(out, leaves, outer, create_graph=True))
    refused = pytest.raises(RuntimeError, match="has no second derivative, but for backend 'reference'")
    for by in (*leaves, outer):
        for unused in (False, True):
            with refused:
                torch.autograd.grad(penalty, by, allow_unused=unused, retain_graph=True)
    with refused:
        penalty.backward()


EDGES = [0.0, 1e-45, 1e-30, 1.0, 80, 85, 88.5, 90, 95, 1e13, 2e19, 1e30, 3e38, torch.inf]


def kind(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), 2, x.isinf().int())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated_at_the_edges_of_the_range(name, backend, dtype):
    """Each element by itself, as plain PyTorch has it: in the same dtype, or in float64."""
    edges = torch.tensor([*EDGES, *(-x for x in EDGES), torch.nan]).to(dtype)
    grids = torch.meshgrid(edges, edges, torch.tensor([1, -2e-3, 1e30, 0, torch.inf]).to(dtype), indexing="ij")
    gate, up, grad = (x.flatten() for x in grids)
    got, _ = run(CALLS[name], [gate, up], [], [grad], backend=backend)
    plain, _ = run(lambda *x: oracle(name, *x), [gate, up], [], [grad])
    exact, _ = run(lambda *x: oracle(name, *x), [gate.double(), up.double()], [], [grad.double()])
    for ours, theirs, true in zip(got, plain, exact, strict=True):
        rounded = true.to(dtype)
        assert ((kind(ours) == kind(theirs)) | (kind(ours) == kind(rounded))).all()
        finite = ours.isfinite() & rounded.isfinite()
        error, budget = ((x.double() - true).abs()[finite] for x in (ours, theirs))
        budget = 2 * budget.nan_to_num(0) + 4 * torch.finfo(dtype).eps * true.abs()[finite]
        assert (error <= budget + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("low, high", [(-90, -80), (-88.7, -88), (-12, 12)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_where_the_sigmoid_is_almost_nothing(backend, low, high):
    inputs = [torch.empty(2000).uniform_(low, high), torch.randn(2000)]
    got, grads = run(CALLS["silu"], inputs, [], backend=backend)
    plain, _ = run(lambda *x: oracle("silu", *x), inputs, [], grads)
    exact, _ = run(lambda *x: oracle("silu", *x), [x.double() for x in inputs], [], [x.double() for x in grads])
    for ours, theirs, true in zip(got, plain, exact, strict=True):
        error, budget = ((x.double() - true).abs().max() for x in (ours, theirs))
        assert error <= 2 * budget + torch.finfo(torch.float32).eps * true.abs().max()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_extreme_rows_is_plain_pytorch_s(backend, dtype, eps):
    x = torch.tensor([1e-45, 1e-30, 1e-20, 1, 1e18, 1e30, 1e38, 0, torch.inf, torch.nan])[:, None].to(dtype)
    x, weight = x * torch.tensor([1.0, -0.5, 0.25]).to(dtype), torch.tensor([1.0, 2.0, -1.0]).to(dtype)
    got, grads = run(lambda x, w: rms_norm(x, w, eps, backend=backend), [x], [weight])
    accumulate = torch.promote_types(dtype, torch.float32)
    plain = run(lambda x, w: F.rms_norm(x, (3,), w, eps), *([y.to(accumulate)] for y in (x, weight, *grads)))[0]
    torch.testing.assert_close(got, [y.to(dtype) for y in plain], equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_layouts(name, backend, layout):
    trains, frozen = arguments(name, 9, 10)
    outputs, _ = run(CALLS[name], trains, frozen)
    grads = [torch.randn_like(x) for x in outputs[: len(outputs) - len(trains)]]
    moved = [[in_layout(x, layout) for x in group] for group in (trains, frozen, grads)]
    got, _ = run(CALLS[name], *moved, backend=backend)
    want, _ = run(lambda *x: oracle(name, *x), *([x.contiguous() for x in group] for group in moved))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("name", CALLS)
def test_without_values(name, device):
    trains, frozen = arguments(name, 4, 6, torch.bfloat16)
    mode = FakeTensorMode()
    convert = mode.from_tensor if device == "fake" else lambda x: x.to("meta")
    shapes = [[convert(x) for x in group] for group in (trains, frozen)]
    with mode if device == "fake" else contextlib.nullcontext():
        got, _ = run(CALLS[name], *shapes)
    want, _ = run(CALLS[name], trains, frozen)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]


@pytest.mark.parametrize("name", CALLS)
def test_empty_inputs_and_a_part_of_the_gradients(name):
    trains, frozen = arguments(name, 9, 10)
    got, grads = run(CALLS[name], trains, frozen)
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
        "import sys, torch; sys.path[:0] = ['tests', 'tests/ops']; from test_elementwise import *\n"
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
        *(
            (lambda x, bad=bad: gated(x, x, bad), r"activation must be one of \('silu', 'gelu_tanh'\), got ")
            for bad in (0, 1, True, None, ["silu"], torch.nan)
        ),
        *(
            (lambda x, bad=bad: rms_norm(x, x[0], bad), "eps must be a finite number of at least 0, got ")
            for bad in (-1e-6, torch.nan, torch.inf, 2**2000, True, "1e-6", None, torch.tensor(1e-6))
        ),
        *(
            (lambda x, bad=bad: rms_norm(x, x[0], 1e-6, bad), "offset must be a finite number, got ")
            for bad in (torch.nan, -torch.inf, -(2**2000), False, "1", None)
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_any_size(backend):
    x, weight = torch.randn(2, 6), torch.randn(6)
    for eps, offset in ((0, 0), (1, -1), (2**31, 2**31), (2**63 - 1, -(2**63)), (1e-300, 1e300)):
        got, want = (rms_norm(x, weight, eps, offset, backend=each) for each in (backend, "reference"))
        torch.testing.assert_close(got, want)
