"""rms_norm, rotary and gated: the operators between the products of a decoder's layer."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, in_layout
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt import _native
from fastprompt.ops.gated import gated
from fastprompt.ops.rms_norm import rms_norm
from fastprompt.ops.rotary import rotary

native_only = pytest.mark.skipif(not _native.available("cpu"), reason=str(_native.why_not("cpu")))
triton_only = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = {"native": "cpu", "triton": "cpu" if INTERPRETED else "cuda", "reference": "cpu"}
TRITON = pytest.param("triton", marks=triton_only if INTERPRETED else [triton_only, pytest.mark.gpu])
BACKENDS = [pytest.param("native", marks=native_only), TRITON, "reference"]
DOUBLE = [BACKENDS[0], "reference"]  # those that compute in float64
DTYPES = [torch.float32, torch.bfloat16]


def each(dtypes: list[torch.dtype]) -> list:
    """Backends with the dtypes they compute in."""
    wide = [
        pytest.param(*x.values, dtype, marks=x.marks) if x != "reference" else (x, dtype)
        for x in DOUBLE
        for dtype in dtypes
    ]
    narrow = [dtype for dtype in dtypes if dtype != torch.float64]
    return wide + [pytest.param("triton", dtype, marks=TRITON.marks) for dtype in (*narrow, torch.float16)]


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
    """Outputs and gradients, and the gradients that came in; all of them where the inputs are."""
    where = [DEVICE[how["backend"]] if "backend" in how else x.device for x in trains]
    leaves = [x.detach().to(device).requires_grad_() for x, device in zip(trains, where, strict=True)]
    out = call(*leaves, *(x.to(where[0]) for x in frozen), **how)
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o).to(trains[0].device) for o in out] if grads is None else grads
    found = torch.autograd.grad(out, leaves, [x.to(where[0]) for x in grads])
    return [x.to(trains[0].device) for x in (*out, *found)], grads


@pytest.mark.parametrize(("backend", "dtype"), each(DTYPES), ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 31), (63, 40), (97, 576)])
@pytest.mark.parametrize("name", CALLS)
def test_against_float64(name, rows, width, backend, dtype):
    if backend == "triton" and INTERPRETED and "norm" not in name:
        rows = min(rows, 9)  # a program each, at least
    trains, frozen = arguments(name, rows, width, dtype)
    got, grads = run(CALLS[name], trains, frozen, backend=backend)
    exact = [[x.double() for x in group] for group in (trains, frozen, grads)]
    want, _ = run(lambda *x: oracle(name, *x), *exact)
    plain, _ = run(lambda *x: oracle(name, *x), trains, frozen, grads)
    for ours, theirs, true in zip(got, plain, want, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        error, budget = ((x.double() - true).abs().max() for x in (ours, theirs))
        assert error <= 2 * budget + torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("backend", DOUBLE)
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
TRITON_OPERATORS = {
    "llama norm": lambda x, w: torch.ops.fastprompt.rms_norm_triton(x, w, 1e-6, 0.0),
    "rotary": lambda *x: torch.ops.fastprompt.rotary_triton(*x, False),
    "silu": lambda gate, up: torch.ops.fastprompt.gated_triton(gate, up, "silu"),
}


def calls_of(name: str, backend: str) -> list:
    """The function, and the operator under it."""
    registered = {"native": OPERATORS, "triton": TRITON_OPERATORS}.get(backend)
    return [partial(CALLS[name], backend=backend), *([registered[name]] if registered else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_right_or_refused(name, backend):
    trains, frozen = arguments(name, 3, 4, torch.float32 if backend == "triton" else torch.float64)
    for call in calls_of(name, backend):
        leaves = [x.to(DEVICE[backend]).detach().requires_grad_() for x in trains]
        check_second_derivatives(name, call, leaves, [x.to(DEVICE[backend]) for x in frozen], backend)


def check_second_derivatives(name, call, leaves, frozen, backend):
    if name == "rotary" and backend == "triton":  # linear: differentiated by its gradient, the gradient turns forward
        outer = [torch.randn_like(x, requires_grad=True) for x in leaves]
        again = [torch.randn_like(x) for x in leaves]
        grads = torch.autograd.grad(call(*leaves, *frozen), leaves, outer, create_graph=True)
        torch.testing.assert_close(torch.autograd.grad(grads, outer, again), rotary(*again, *frozen))
        return
    if backend == "reference" or name == "rotary":
        assert torch.autograd.gradgradcheck(lambda *x: call(*x, *frozen), leaves)
        return
    out = call(*leaves, *frozen)
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


@pytest.mark.parametrize(("backend", "dtype"), each([*DTYPES, torch.float64]), ids=str)
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
@pytest.mark.parametrize(("backend", "dtype"), each([*DTYPES, torch.float64]), ids=str)
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
    trains, frozen = arguments(name, 9, 10, torch.float32 if backend == "triton" else torch.float64)
    outputs, _ = run(CALLS[name], trains, frozen)
    grads = [torch.randn_like(x) for x in outputs[: len(outputs) - len(trains)]]
    moved = [[in_layout(x.to(DEVICE[backend]), layout) for x in group] for group in (trains, frozen, grads)]
    got, _ = run(CALLS[name], *moved, backend=backend)
    want, _ = run(lambda *x: oracle(name, *x), *([x.contiguous() for x in group] for group in moved))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=triton_only)])
@pytest.mark.parametrize("name", CALLS)
def test_without_values(name, backend, device):
    if backend == "triton" and device == "fake" and not INTERPRETED:
        pytest.skip("fake tensors are on the CPU")
    trains, frozen = arguments(name, 4, 6, torch.bfloat16)
    mode = FakeTensorMode()
    convert = mode.from_tensor if device == "fake" else lambda x: x.to("meta")
    shapes = [[convert(x) for x in group] for group in (trains, frozen)]
    with mode if device == "fake" else contextlib.nullcontext():
        got, _ = run(partial(CALLS[name], backend=backend), *shapes)
    want, _ = run(CALLS[name], trains, frozen)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_empty_inputs_and_a_part_of_the_gradients(name, backend):
    trains, frozen = arguments(name, 9, 10, torch.float32)
    trains, frozen = ([x.to(DEVICE[backend]) for x in group] for group in (trains, frozen))
    call = partial(CALLS[name], backend=backend)
    got, grads = run(call, trains, frozen)
    for cut in (lambda x: x[:0], lambda x: x[..., :0]):  # without rows, and without features
        short = [cut(x) if x.ndim > 1 or not len(cut(trains[0])) == 9 else x[:0] for x in frozen]
        short = [x if "norm" in name and len(cut(trains[0])) == 0 else y for x, y in zip(frozen, short, strict=True)]
        none, _ = run(call, [cut(x) for x in trains], short)
        assert all(x.numel() == 0 and x.shape == cut(y).shape for x, y in zip(none, got, strict=True))
    last = trains[-1].detach().requires_grad_()
    out = call(*trains[:-1], last, *frozen)
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


@triton_only
def test_opcheck_of_triton():
    for name in ("rms_norm", "rotary", "gated"):
        importlib.import_module(f"fastprompt.ops.{name}.triton")  # registers them
    ops, device = torch.ops.fastprompt, DEVICE["triton"]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, up = (torch.randn(4, 6, device=device, requires_grad=True) for _ in range(2))
    heads, angles = torch.randn(4, 2, 6, device=device, requires_grad=True), torch.randn(4, 6, device=device)
    weight, plain, grad = angles[0], x.detach(), up.detach()
    torch.library.opcheck(ops.rms_norm_triton.default, (x, weight, 1e-6, 0.0))
    torch.library.opcheck(ops.rotary_triton.default, (heads, heads, angles, angles, False))
    torch.library.opcheck(ops.gated_triton.default, (x, up, "gelu_tanh"))
    torch.library.opcheck(ops.rms_norm_triton_backward.default, (grad, plain, weight, 1e-6, 0.0))
    torch.library.opcheck(ops.gated_triton_backward.default, (grad, plain, grad, "silu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_break(backend):
    def layer(x, weight, query, key, cos, sin):
        query, key = rotary(query, key, cos, sin, backend=backend)
        x = rms_norm(x, weight, 1e-6, backend=backend)
        return gated(x, x, "silu", backend=backend), query, key

    (x,), (weight,) = arguments("llama norm", 5, 8, torch.float32)
    trains, frozen = arguments("rotary", 5, 8, torch.float32)
    inputs = [each.to(DEVICE[backend]) for each in (x, weight, *trains, *frozen)]
    leaves = [each.detach().requires_grad_(n in (0, 2, 3)) for n, each in enumerate(inputs)]
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for call in (layer, compiled):
        out = call(*leaves)
        found.append([*out, *torch.autograd.grad(sum(y.square().sum() for y in out), [leaves[n] for n in (0, 2, 3)])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", [TRITON])
def test_rows_and_heads_more_than_32_bits_apart(backend):
    far = 2**30 + 16  # the strides themselves fit in 32 bits
    memory = torch.empty(4 * far, dtype=torch.float16, device=DEVICE[backend])  # 8 GiB, of which some pages are touched
    x = memory.as_strided((4, 8), (far, 1))
    x.copy_(torch.randn(4, 8))
    weight, angle = torch.ones(8).to(x), torch.randn(4, 8).to(x)
    for by_row in (True, False):
        heads = x[:, None] if by_row else x[None]
        rows = angle[: len(heads)]
        got = rotary(heads, heads, rows, rows, backend=backend)
        torch.testing.assert_close(got, rotary(heads.clone(), heads.clone(), rows, rows, backend="reference"))
    torch.testing.assert_close(rms_norm(x, weight, 0.0, backend=backend), rms_norm(x.clone(), weight, 0.0))
    torch.testing.assert_close(gated(x, x, "silu", backend=backend), gated(x.clone(), x.clone(), "silu"))


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
        (
            lambda x: gated(x, x, "silu", backend="cuda"),
            "backend must be None, 'native', 'triton' or 'reference', got 'cuda'",
        ),
        (lambda x: gated(x.half(), x.half(), "silu", backend="native"), "not available: .*"),
        (lambda x: gated(x.double(), x.double(), "silu", backend="triton"), "'triton' is not available: it .*float64"),
        (lambda x: rms_norm(x, x[0].requires_grad_(), 1e-6, backend="triton"), "'triton' is not available: it .*"),
        (lambda x: rms_norm(x.new_ones(2**14 + 1), x.new_ones(2**14 + 1), 1e-6, backend="triton"), "is not available"),
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
    x, weight = (torch.randn(size, device=DEVICE[backend]) for size in ((2, 6), (6,)))
    for eps, offset in ((0, 0), (1, -1), (2**31, 2**31), (2**63 - 1, -(2**63)), (1e-300, 1e300)):
        got, want = (rms_norm(x, weight, eps, offset, backend=each) for each in (backend, "reference"))
        torch.testing.assert_close(got, want)
