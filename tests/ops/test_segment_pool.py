import contextlib
import copy
import itertools
from importlib.util import find_spec

import pytest
import torch
from layouts import LAYOUTS, in_layout
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt import _native
from fastprompt.ops import segment_first, segment_last, segment_mean

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FUNCTIONS = [segment_mean, segment_first, segment_last]
RAGGED = [0, 5, 0, 0, 31, 1, 0]
LENGTHS = [[1], [63], [97], [0], [], RAGGED]


def inputs(lengths, width=24, dtype=torch.float64, device="cpu"):
    """Fresh random (hidden, cu_seqlens) for segments of the given lengths."""
    hidden = torch.randn(sum(lengths), width, device=device).to(dtype).requires_grad_()
    return hidden, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def expected(function, hidden, cu_seqlens):
    """The definition, as a loop in hidden's dtype: no backend's way of getting there."""
    pooled, bounds = [], cu_seqlens.tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        taken = {segment_mean: slice(None), segment_first: slice(1), segment_last: slice(-1, None)}[function]
        rows = hidden[begin:end][taken]
        pooled.append(rows.sum(0) / max(1, len(rows)))
    return torch.stack(pooled) if pooled else hidden[:0]


def gradient(pooled, hidden, grad, **options):
    return torch.autograd.grad(pooled, hidden, grad, **options)[0]


def why_not(backend, device, dtype):
    """Why a backend does not take such rows; None if it does."""
    if backend == "native":
        return _native.why_not("cpu") if device == "cpu" else "native is for the CPU"
    if backend == "triton":
        if not find_spec("triton"):
            return "triton is not installed"
        from fastprompt.ops.segment_pool import triton

        return triton.why_not(torch.empty(0, device=device, dtype=dtype))
    return None


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def setting():
    # New memory is filled with NaN in this mode: what a kernel leaves out of its outputs shows.
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


def test_native_is_the_choice_on_the_cpu():
    hidden, cu_seqlens = inputs([3, 2])
    node = segment_mean(hidden, cu_seqlens).grad_fn
    assert (type(node).__name__ == "fastprompt::segment_poolBackward") == _native.available("cpu")


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradient(backend, device, lengths, dtype):
    if reason := why_not(backend, device, dtype):
        pytest.skip(reason)
    widest = 100 if backend == "triton" else 384  # its interpreter is slow
    for function, width in itertools.product(FUNCTIONS, [1, 33, widest]):
        hidden, cu_seqlens = inputs(lengths, width, dtype, device)
        exact, absolute = (x.requires_grad_() for x in (hidden.detach().double(), hidden.detach().double().abs()))
        grad = torch.randn(len(lengths), width, device=device).to(dtype)
        pooled = function(hidden, cu_seqlens, backend=backend)
        assert pooled.dtype == dtype
        got = pooled, gradient(pooled, hidden, grad)
        plain, want, summed = (
            (pooled, gradient(pooled, x, grad.to(x.dtype), allow_unused=True, materialize_grads=True))
            for x in (hidden, exact, absolute)
            for pooled in [expected(function, x, cu_seqlens)]
        )
        for name, result, baseline, correct, magnitude in zip(
            ("pooled", "gradient"), got, plain, want, summed, strict=True
        ):
            assert result.shape == correct.shape and result.isfinite().all(), (function, width, name)
            if dtype == torch.float64:  # no dtype to judge it by
                torch.testing.assert_close(result, correct)
            elif correct.numel():
                error, plain_error = ((x.double() - correct).abs().max() for x in (result, baseline))
                budget = 2 * plain_error + torch.finfo(dtype).eps * magnitude.abs().max()
                assert error <= budget, (function, width, name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_of_other_segments_do_not_leak(backend, device, function):
    if reason := why_not(backend, device, torch.float32):
        pytest.skip(reason)
    hidden, cu_seqlens = inputs(RAGGED, dtype=torch.float32, device=device)
    hidden.data[:5] = torch.nan
    pooled = function(hidden, cu_seqlens, backend=backend)
    assert pooled[1].isnan().all() and pooled[[0, 2, 3, 4, 5, 6]].isfinite().all()
    grad = torch.randn_like(pooled)
    grad[[0, 1]] = torch.nan  # of an empty segment, and of rows 0 to 4
    result = gradient(pooled, hidden, grad)
    assert result[5:].isfinite().all() and not result[0 if function is not segment_last else 4].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts(backend, device, function, layout):
    if reason := why_not(backend, device, torch.float32):
        pytest.skip(reason)
    hidden, cu_seqlens = inputs([0, 5, 0, 3, 1], dtype=torch.float32, device=device)
    hidden = in_layout(hidden, layout)
    plain, bounds = hidden.detach().clone().requires_grad_(), cu_seqlens
    if layout != "expanded":  # bounds that are all the same leave no rows
        cu_seqlens = in_layout(cu_seqlens, layout)
    got, want = function(hidden, cu_seqlens, backend=backend), expected(function, plain, bounds)
    grad = in_layout(torch.randn_like(want), layout)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, hidden, grad), gradient(want, plain, grad.contiguous()))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_values(kind, function):
    hidden, cu_seqlens = inputs([3, 0, 4], dtype=torch.bfloat16)
    mode = FakeTensorMode()
    convert = mode.from_tensor if kind == "fake" else lambda x: x.detach().to("meta").requires_grad_(x.requires_grad)
    hidden, cu_seqlens = convert(hidden), convert(cu_seqlens)
    with mode if kind == "fake" else contextlib.nullcontext():
        pooled = function(hidden, cu_seqlens)
        (grad,) = torch.autograd.grad(pooled.sum(), hidden)
    assert pooled.shape == (3, 24) and grad.shape == (7, 24) and pooled.dtype == grad.dtype == torch.bfloat16


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_in_a_row(backend, device, function):
    if reason := why_not(backend, device, torch.float32):
        pytest.skip(reason)
    hidden, cu_seqlens = inputs([3, 0, 4], 0, torch.float32, device)
    pooled = function(hidden, cu_seqlens, backend=backend)
    assert pooled.shape == (3, 0) and gradient(pooled, hidden, pooled.detach()).shape == (7, 0)


@pytest.mark.filterwarnings("ignore:.*encountered in reduce")  # of the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_at_the_end_of_the_range(backend, device, dtype):
    """Sums beyond it are infinite, as in plain PyTorch; one row alone, and a gradient, are as they were."""
    if reason := why_not(backend, device, dtype):
        pytest.skip(reason)
    largest = torch.finfo(dtype).max
    rows = [1.0, 0.5, 0.25, 0.125, -1, -1, -1, 1, torch.inf, 1, torch.inf, -torch.inf]
    hidden = (torch.tensor(rows, dtype=dtype, device=device)[:, None] * largest).expand(-1, 3).requires_grad_()
    bounds = torch.tensor([0, 1, 2, 4, 7, 8, 10, 12], dtype=torch.int32, device=device)
    got, want = segment_mean(hidden, bounds, backend=backend), segment_mean(hidden, bounds, backend="reference")
    grad = torch.full_like(want, largest)
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(gradient(got, hidden, grad), gradient(want, hidden, grad))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", ["native", "reference"])  # those that have float64
def test_gradcheck(backend, device, function):
    if reason := why_not(backend, device, torch.float64):
        pytest.skip(reason)
    hidden, cu_seqlens = inputs([2, 0, 5, 1], 3, device=device)

    def run(hidden):
        return function(hidden, cu_seqlens, backend=backend)

    assert torch.autograd.gradcheck(run, hidden)
    assert torch.autograd.gradgradcheck(run, hidden)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivative(backend, device, function):
    if reason := why_not(backend, device, torch.float32):
        pytest.skip(reason)
    hidden, cu_seqlens = inputs(RAGGED, dtype=torch.float32, device=device)
    pooled = function(hidden, cu_seqlens, backend=backend)
    grad, direction = torch.randn_like(pooled).requires_grad_(), torch.randn_like(hidden)
    spread = gradient(pooled, hidden, grad, create_graph=True)
    # The backward is linear, and its transpose the pooling itself.
    torch.testing.assert_close(gradient(spread, grad, direction), expected(function, direction, cu_seqlens))


@pytest.mark.parametrize("lengths", [[1000], [1, 700, 0, 2, 97], [30] * 40], ids=["one", "few", "many"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_by_any_number_of_threads(function, lengths):
    hidden, cu_seqlens = inputs(lengths, 385, torch.float32)
    grad = torch.randn(len(lengths), 385)
    was, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            pooled = function(hidden, cu_seqlens)
            results.append((pooled, gradient(pooled, hidden, grad)))
    finally:
        torch.set_num_threads(was)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("take", [0, 1, -1])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_opcheck(device, backend, take):
    if reason := why_not(backend, device, torch.float32):
        pytest.skip(reason)
    hidden, cu_seqlens = inputs(RAGGED, 5, torch.float32, device)
    grad = torch.randn_like(segment_mean(hidden, cu_seqlens, backend=backend)).requires_grad_()
    operators = torch.ops.fastprompt  # triton's are there since that call
    if backend == "native":
        pool, spread = operators.segment_pool.default, operators.segment_pool_backward.default
    else:
        pool, spread = operators.segment_pool_triton.default, operators.segment_pool_triton_backward.default
    torch.library.opcheck(pool, (hidden, cu_seqlens, take))
    torch.library.opcheck(spread, (grad, cu_seqlens, len(hidden), take))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, device, dynamic):
    if reason := why_not(backend, device, torch.float32):
        pytest.skip(reason)
    torch.compiler.reset()

    def run(hidden, cu_seqlens):
        return [function(hidden, cu_seqlens, backend=backend) for function in FUNCTIONS]

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([3, 0, 4], [6, 1, 0, 9]):
        hidden, cu_seqlens = inputs(lengths, dtype=torch.float32, device=device)
        got, want = compiled(hidden, cu_seqlens), run(hidden, cu_seqlens)
        grads = [torch.randn_like(x) for x in want]
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(pooled, hidden, grads) for pooled in (got, want)))


def test_compiled_checks_values_too():
    if not _native.available("cpu"):
        pytest.skip(_native.why_not("cpu"))
    torch.compiler.reset()
    hidden, cu_seqlens = inputs([3, 4])
    compiled = torch.compile(segment_mean, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens must begin at 0, got 1"):
        compiled(hidden, cu_seqlens + 1)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"hidden": torch.randn(7)}, ValueError, r"hidden must have shape \(T, E\), got \(7,\)"),
        ({"hidden": torch.ones(7, 2, dtype=torch.int32)}, TypeError, "hidden must be one of .*, got torch.int32"),
        ({"hidden": torch.randn(7, 2, device="meta")}, ValueError, "cu_seqlens must be on meta, .* got cpu"),
        ({"cu_seqlens": [0, 3, 7]}, TypeError, "cu_seqlens must be a tensor, got list"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        ({"cu_seqlens": int32(0, 3, 7)[None]}, ValueError, r"cu_seqlens must have shape \(B\+1,\), got \(1, 3\)"),
        ({"cu_seqlens": int32()}, ValueError, r"cu_seqlens must have shape \(B\+1,\), got \(0,\)"),
        ({"cu_seqlens": int32(1, 3, 7)}, ValueError, "cu_seqlens must begin at 0, got 1"),
        ({"cu_seqlens": int32(0, 3, 6)}, ValueError, "cu_seqlens must end at 7, .* got 6"),
        ({"cu_seqlens": int32(0, 5, 4, 7)}, ValueError, "cu_seqlens must not decrease, got 4 after 5 at index 2"),
        ({"backend": "cuda"}, ValueError, "backend must be None, .* got 'cuda'"),
        ({"backend": "triton"}, ValueError, "backend 'triton' (computes in float32|needs)"),
        ({"backend": "native", "hidden": torch.randn(7, 2, device="meta")}, ValueError, "'native' needs .* got meta"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input(change, error, match, backend):
    args = dict(zip(("hidden", "cu_seqlens"), inputs([3, 4]), strict=True)) | {"backend": backend}
    for function in FUNCTIONS:
        with pytest.raises(error, match=match):
            function(**copy.deepcopy(args | change))


def test_forcing_native_where_there_is_none(monkeypatch):
    monkeypatch.setattr(_native, "_why_not", {"cpu": "not built: there was no compiler 'c++'"})
    hidden, cu_seqlens = inputs([3])
    with pytest.raises(ValueError, match="'native' is not available: not built: there was no compiler"):
        segment_mean(hidden, cu_seqlens, backend="native")
    assert torch.equal(segment_first(hidden, cu_seqlens), hidden[:1])
