import contextlib
import copy
import itertools
import shutil

import pytest
import torch
from cuda_emulator import load_emulated
from layouts import LAYOUTS, in_layout
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt import _native
from fastprompt.ops import pack_prompt

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VOCABULARY = 50


def inputs(lengths, prompt_rows, bank_size=3, width=24, dtype=torch.float64, device="cpu", ids=torch.int64):
    """Fresh random arguments for segments of the given lengths, as a dict."""
    tokens = sum(lengths)
    return {
        "embedding": torch.randn(VOCABULARY, width, device=device).to(dtype),
        "input_ids": torch.randint(VOCABULARY, (tokens,), device=device, dtype=ids),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        "prompt": torch.randn(bank_size, prompt_rows, width, device=device).to(dtype).requires_grad_(),
        "prompt_index": torch.randint(bank_size, (len(lengths),), device=device),
    }


def expected(embedding, input_ids, cu_seqlens, prompt, prompt_index=None, per_segment=False, scale=1.0):
    """The definition, as loops: neither backend's way of getting there."""
    tokens = torch.stack([embedding[i] * scale for i in input_ids]) if len(input_ids) else embedding[:0]
    if not per_segment:
        return torch.cat([*prompt, tokens])
    bounds = cu_seqlens.tolist()
    index = prompt_index.tolist() if prompt_index is not None else [0] * (len(bounds) - 1)
    parts = [prompt[0, :0]]  # so that autograd has a way to the prompt without any segment
    for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        parts += [prompt[index[b]], tokens[begin:end]]
    return torch.cat(parts)


def test_native_is_there():
    # All else here would pass on the reference alone.
    if shutil.which("c++"):
        assert _native.available("cpu"), _native.why_not("cpu")
    if torch.cuda.is_available() and shutil.which("nvcc"):
        assert _native.available("cuda"), _native.why_not("cuda")


@pytest.fixture(params=["native", "reference"])
def backend(request, device):
    if request.param == "native" and not _native.available(device):
        pytest.skip(_native.why_not(device))
    return request.param


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("prompt_rows", [0, 1, 17])
@pytest.mark.parametrize("lengths", [[1], [63], [97], [0], [0, 5, 0, 0, 31, 1, 0], []], ids=str)
@pytest.mark.parametrize("bank_size", [1, 3])
def test_values_and_gradient(backend, device, per_segment, prompt_rows, lengths, bank_size):
    args = inputs(lengths, prompt_rows, bank_size, device=device)
    want = expected(**args, per_segment=per_segment, scale=1.7)
    grad = torch.randn_like(want)
    (want_grad,) = torch.autograd.grad(want, args["prompt"], grad, allow_unused=True, materialize_grads=True)
    got = pack_prompt(**args, per_segment=per_segment, scale=1.7, backend=backend)
    (got_grad,) = torch.autograd.grad(got, args["prompt"], grad)
    assert torch.equal(got, want)
    torch.testing.assert_close(got_grad, want_grad)  # the order of a sum in float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 63, 640])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_every_dtype(backend, device, dtype, width, ids):
    args = inputs([7, 0, 63, 2, 1], 17, width=width, dtype=dtype, device=device, ids=ids)
    args["prompt_index"] = args["prompt_index"].to(ids)
    exact = {name: value.detach().double() if value.is_floating_point() else value for name, value in args.items()}
    exact["prompt"].requires_grad_()
    got, want = pack_prompt(**args, per_segment=True, backend=backend), expected(**exact, per_segment=True)
    assert got.dtype == dtype and torch.equal(got.double(), want)
    # The product is rounded once, as torch rounds it.
    scaled = pack_prompt(**args, per_segment=True, scale=25.25, backend=backend)
    assert torch.equal(scaled, expected(**args, per_segment=True, scale=25.25))
    grad = torch.randn_like(got)
    (got_grad,) = torch.autograd.grad(got, args["prompt"], grad)
    (want_grad,) = torch.autograd.grad(want, exact["prompt"], grad.double(), retain_graph=True)
    (magnitude,) = torch.autograd.grad(want, exact["prompt"], grad.double().abs())  # of what was summed
    if dtype == torch.float64:  # no dtype to judge it by
        torch.testing.assert_close(got_grad, want_grad)
        return
    (plain_grad,) = torch.autograd.grad(expected(**args, per_segment=True), args["prompt"], grad)
    error, plain_error = ((g.double() - want_grad).abs().max() for g in (got_grad, plain_grad))
    assert error <= 2 * plain_error + torch.finfo(dtype).eps * magnitude.max()


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("trains", [(), ("prompt",), ("embedding",), ("embedding", "prompt")], ids=str)
def test_every_subset_of_requires_grad(device, per_segment, trains):
    args = inputs([3, 0, 9], 4, device=device)
    for name in ("embedding", "prompt"):
        args[name] = args[name].detach().requires_grad_(name in trains)
    got, want = pack_prompt(**args, per_segment=per_segment), expected(**args, per_segment=per_segment)
    assert torch.equal(got, want) and got.requires_grad == bool(trains)
    if trains:
        grad, leaves = torch.randn_like(want), [args[name] for name in trains]
        torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad))
    if "embedding" in trains:
        with torch.no_grad():  # no gradient is wanted: native again
            assert torch.equal(pack_prompt(**args, per_segment=per_segment), want)
        with pytest.raises(ValueError, match="gradient of the embedding" if _native.available(device) else "native"):
            pack_prompt(**args, backend="native")


@pytest.mark.parametrize("width", [8, 63])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cuda_kernels_in_the_emulator(width, dtype):
    args, emulated = inputs([7, 0, 33, 1], 5, width=width, dtype=dtype), load_emulated()
    index = args["prompt_index"]
    for per_segment in (False, True):
        want = expected(**args, per_segment=per_segment, scale=2.0)
        with torch.no_grad():
            got = emulated.pack_prompt(*args.values(), per_segment, 2.0)
        assert torch.equal(got, want)
    (want_grad,) = torch.autograd.grad(want, args["prompt"], torch.ones_like(want))  # whole numbers: exact
    got_grad = emulated.pack_prompt_backward(torch.ones_like(want), args["cu_seqlens"], index, 3, 5)
    assert torch.equal(got_grad, want_grad)


def test_frozen_embedding_through_the_native_operator(device):
    if not _native.available(device):
        pytest.skip(_native.why_not(device))
    hidden = pack_prompt(**inputs([3, 2], 4, device=device))
    assert "fastprompt" in type(hidden.grad_fn).__name__


@pytest.mark.parametrize("per_segment", [False, True])
def test_gradcheck(backend, device, per_segment):
    args = inputs([2, 0, 5, 1], 3, width=4, device=device)
    prompt = args.pop("prompt")

    def run(prompt):
        return pack_prompt(**args, prompt=prompt, per_segment=per_segment, scale=0.5, backend=backend)

    assert torch.autograd.gradcheck(run, prompt)
    assert torch.autograd.gradgradcheck(run, prompt)


def moved(layout, **options):
    """Arguments in that layout, but for bounds that could not all be the same, and contiguous copies."""
    args = inputs([3, 4], 5, **options)
    kept = {"cu_seqlens"} if layout == "expanded" else set()
    args = {name: x if name in kept else in_layout(x, layout) for name, x in args.items()}
    return args, {name: x.detach().clone().contiguous().requires_grad_(x.requires_grad) for name, x in args.items()}


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout, per_segment):
    args, plain = moved(layout, width=16, device=device)
    want = expected(**plain, per_segment=per_segment)
    got = pack_prompt(**args, per_segment=per_segment, backend=backend)
    grad = in_layout(torch.randn_like(want), layout)
    assert torch.equal(got, want)
    (got_grad,) = torch.autograd.grad(got, args["prompt"], grad)
    torch.testing.assert_close(got_grad, torch.autograd.grad(want, plain["prompt"], grad.contiguous())[0])


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_the_emulator(layout, ids):
    args, plain = moved(layout, width=8, dtype=torch.bfloat16, ids=ids)
    emulated = load_emulated()
    for per_segment in (False, True):
        want = expected(**plain, per_segment=per_segment)
        with torch.no_grad():
            assert torch.equal(emulated.pack_prompt(*args.values(), per_segment, 1.0), want)
    grad = in_layout(torch.randint(5, want.shape).bfloat16(), layout)  # whole numbers: exact
    got_grad = emulated.pack_prompt_backward(grad, args["cu_seqlens"], args["prompt_index"], 3, 5)
    assert torch.equal(got_grad, torch.autograd.grad(want, plain["prompt"], grad.contiguous())[0])


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_values(kind, per_segment):
    args = inputs([3, 0, 4], 5, dtype=torch.bfloat16)
    mode = FakeTensorMode()
    convert = mode.from_tensor if kind == "fake" else lambda x: x.detach().to("meta").requires_grad_(x.requires_grad)
    args = {name: convert(x) for name, x in args.items()}
    with mode if kind == "fake" else contextlib.nullcontext():
        hidden = pack_prompt(**args, per_segment=per_segment)
        (grad,) = torch.autograd.grad(hidden.sum(), args["prompt"])
    assert hidden.shape == (22, 24) and grad.shape == (3, 5, 24) and hidden.dtype == grad.dtype == torch.bfloat16


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("width, lengths, prompt_rows", [(0, [3, 2], 2), (4, [0, 0], 2), (4, [3], 0), (0, [], 0)])
def test_nothing_in_a_dimension(backend, device, per_segment, width, lengths, prompt_rows):
    args = inputs(lengths, prompt_rows, width=width, device=device)
    got, want = pack_prompt(**args, per_segment=per_segment, backend=backend), expected(**args, per_segment=per_segment)
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got.sum(), args["prompt"])
    assert grad.shape == args["prompt"].shape


@pytest.mark.parametrize("scale", [0, 1, -1, 2**31, 2**63 - 1, 1e-300, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_any_size(backend, device, dtype, scale):
    args = inputs([3, 2], 2, dtype=dtype, device=device)
    want = expected(**args, scale=float(scale))
    assert torch.equal(pack_prompt(**args, scale=scale, backend=backend), want)


def test_outputs_are_written_whole(backend, device):
    # New memory is filled with NaN in this mode: what a kernel leaves out shows.
    args = inputs([0, 63, 1, 0, 33], 17, device=device)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, device=device).isnan().all()
        for per_segment in (False, True):
            hidden = pack_prompt(**args, per_segment=per_segment, backend=backend)
            (grad,) = torch.autograd.grad(hidden.sum(), args["prompt"])
            assert hidden.isfinite().all() and grad.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(was)


def test_gradient_is_the_same_in_each_run(device):
    args = inputs([5] * 40, 9, width=320, dtype=torch.float32, device=device)
    grad = torch.randn_like(hidden := pack_prompt(**args, per_segment=True))
    first, *others = (torch.autograd.grad(hidden, args["prompt"], grad, retain_graph=True)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("with_index", [False, True])
def test_opcheck(device, per_segment, with_index):
    if not _native.available(device):
        pytest.skip(_native.why_not(device))
    args = inputs([3, 0, 4], 5, device=device)
    index = args["prompt_index"] if with_index else None
    names = ("embedding", "input_ids", "cu_seqlens", "prompt")
    torch.library.opcheck(
        torch.ops.fastprompt.pack_prompt.default, (*(args[name] for name in names), index, per_segment, 2.0)
    )
    grad = torch.randn(3 * 5 + 7, 24, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.fastprompt.pack_prompt_backward.default, (grad, args["cu_seqlens"], index, 3, 5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(pack_prompt, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths, prompt_rows in ([3, 0, 4], 5), ([6, 1, 0, 9], 2):
        for per_segment in (False, True):
            args = inputs(lengths, prompt_rows, device=device)
            results = [
                run(**args, per_segment=per_segment, scale=3.0, backend=backend) for run in (compiled, pack_prompt)
            ]
            grad = torch.randn_like(results[0])
            assert torch.equal(*results)
            torch.testing.assert_close(*(torch.autograd.grad(r, args["prompt"], grad)[0] for r in results))


def test_compiled_checks_values_too():
    if not _native.available("cpu"):
        pytest.skip(_native.why_not("cpu"))
    torch.compiler.reset()
    compiled = torch.compile(pack_prompt, fullgraph=True, backend="aot_eager")
    args = inputs([3, 4], 2)
    with pytest.raises(IndexError, match="input_ids must be in"):
        compiled(**args | {"input_ids": args["input_ids"] + VOCABULARY})
    with pytest.raises(ValueError, match="cu_seqlens must begin at 0"):
        compiled(**args | {"cu_seqlens": args["cu_seqlens"] + 1})


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"embedding": torch.randn(5)}, ValueError, r"embedding must have shape \(V, E\), got \(5,\)"),
        ({"embedding": torch.ones(50, 24, dtype=torch.int32)}, TypeError, "embedding must be one of"),
        ({"input_ids": torch.zeros(7, 1, dtype=torch.int64)}, ValueError, r"input_ids must have shape \(T,\)"),
        ({"input_ids": torch.zeros(7)}, TypeError, "input_ids must be torch.int32 or torch.int64, got torch.float32"),
        ({"input_ids": torch.full((7,), VOCABULARY)}, IndexError, r"input_ids must be in \[0, 50\), got 50"),
        ({"input_ids": torch.full((7,), -1)}, IndexError, "input_ids must be in .* got -1"),
        ({"cu_seqlens": [0, 3, 7]}, TypeError, "cu_seqlens must be a tensor, got list"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        ({"cu_seqlens": int32(0, 3, 7)[None]}, ValueError, r"cu_seqlens must have shape \(B\+1,\), got \(1, 3\)"),
        ({"cu_seqlens": int32()}, ValueError, r"cu_seqlens must have shape \(B\+1,\), got \(0,\)"),
        ({"cu_seqlens": int32(1, 3, 7)}, ValueError, "cu_seqlens must begin at 0, got 1"),
        ({"cu_seqlens": int32(0, 3, 6)}, ValueError, "cu_seqlens must end at 7, .* got 6"),
        ({"cu_seqlens": int32(0, 8, 7)}, ValueError, "cu_seqlens must not decrease, got 7 after 8 at index 2"),
        ({"prompt": torch.randn(4, 24)}, ValueError, r"prompt must have shape \(N, P, 24\)"),
        ({"prompt": torch.randn(0, 4, 24)}, ValueError, "prompt must have shape .* N >= 1"),
        ({"prompt": torch.randn(1, 4, 23)}, ValueError, r"prompt must have shape .* got \(1, 4, 23\)"),
        ({"prompt": torch.randn(1, 4, 24).half()}, TypeError, "prompt must be torch.float64, .* got torch.float16"),
        ({"prompt": torch.randn(1, 4, 24, device="meta").double()}, ValueError, "prompt must be on cpu, .* got meta"),
        ({"prompt_index": torch.tensor([0])}, ValueError, r"prompt_index must have shape \(2,\), got \(1,\)"),
        ({"prompt_index": torch.tensor([0.0, 1.0])}, TypeError, "prompt_index must be torch.int32 or torch.int64"),
        ({"prompt_index": torch.tensor([0, 3])}, IndexError, r"prompt_index must be in \[0, 3\), got 3"),
        ({"prompt_index": torch.tensor([0, -1])}, IndexError, "prompt_index must be in .* got -1"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
        *(
            ({"scale": bad}, ValueError, "scale must be a finite number, got ")
            for bad in (torch.nan, torch.inf, 2**2000, True, "1", None)
        ),
        *(({"per_segment": bad}, TypeError, "per_segment must be a bool, got ") for bad in (0, 2**63, "no", None)),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input(change, error, match, backend):
    args = inputs([3, 4], 4) | {"backend": backend, "per_segment": True}
    kept = copy.deepcopy({name: value for name, value in args.items() if name not in change})
    with pytest.raises(error, match=match):
        pack_prompt(**kept, **change)


def test_forcing_native_where_there_is_none(monkeypatch):
    monkeypatch.setattr(_native, "_why_not", {"cpu": "not built: there was no compiler 'c++'"})
    with pytest.raises(ValueError, match="'native' is not available: not built: there was no compiler"):
        pack_prompt(**inputs([3], 2), backend="native")
    assert pack_prompt(**inputs([3], 2, bank_size=1)).shape == (5, 24)
