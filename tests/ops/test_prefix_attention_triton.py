"""The Triton backend of prefix_attention. Without a GPU: TRITON_INTERPRET=1 python -m pytest <this file>."""

import itertools
from functools import partial

import pytest
import torch
from layouts import LAYOUTS, in_layout

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from fastprompt.ops import prefix_attention  # noqa: E402
from fastprompt.ops._triton import INTERPRETED  # noqa: E402
from fastprompt.ops.prefix_attention import reference  # noqa: E402
from fastprompt.ops.prefix_attention import triton as backend  # noqa: E402
from fastprompt.ops.prefix_attention import triton_launches as launches  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


@pytest.fixture(autouse=True)
def setting():
    torch.manual_seed(0)  # the budget of few float32 numbers is a matter of luck: let it be the same luck every time
    # New memory is filled with NaN in this mode: what a kernel leaves out of its outputs shows.
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


def inputs(lengths, heads=2, kv_heads=1, features=16, prefix=5, entries=1, dtype=torch.float32):
    """Fresh (query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index)."""
    tokens = sum(lengths)
    shapes = [
        (tokens, heads, features),
        *[(tokens, kv_heads, features)] * 2,
        *[(entries, kv_heads, prefix, features)] * 2,
    ]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    prefix_index = None if entries == 1 else torch.randint(entries, (len(lengths),), device=DEVICE)
    return [*(torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes), cu_seqlens, prefix_index]


def options(features=16, is_causal=False, window=None, softcap=None, prefix_in_window=False, dropout_p=0.0):
    return is_causal, features**-0.5, window, softcap, prefix_in_window, dropout_p


def run(function, args, opts, grad, dtype, trains=NAMES):
    """[out, lse, the five gradients or None], computed in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_(name in trains) for name, x in zip(NAMES, args, strict=False)]
    out, lse = function(*leaves, *args[5:], *opts)
    wanted = [x for x in leaves if x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad.to(dtype), allow_unused=True, materialize_grads=True))
    return [out.detach(), lse.detach(), *(next(grads) if x.requires_grad else None for x in leaves)]


def assert_within_budget(got, exact, plain, dtype):
    """An error of at most twice plain PyTorch's plus eps * max."""
    for name, result, want, baseline in zip(("out", "lse", *NAMES), got, exact, plain, strict=True):
        if want.numel() == 0:
            assert result.shape == want.shape
            continue
        error, plain_error = ((x.double() - want).abs().max() for x in (result, baseline))
        budget = 2 * plain_error + torch.finfo(dtype).eps * want.abs().max()
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


RAGGED = [7, 0, 1, 33, 16]
CASES = [  # lengths, heads, kv_heads, features, prefix, entries, options
    (RAGGED, 2, 2, 32, 5, 1, dict()),
    (RAGGED, 3, 1, 80, 17, 3, dict(is_causal=True)),
    (RAGGED, 3, 1, 64, 40, 2, dict(window=4)),
    (RAGGED, 3, 1, 64, 40, 2, dict(window=9, prefix_in_window=True, softcap=2.0)),
    (RAGGED, 1, 1, 16, 40, 1, dict(is_causal=True, window=9, prefix_in_window=True)),
    ([63, 20], 2, 1, 16, 0, 1, dict(is_causal=True, window=9, softcap=50.0)),
    ([1, 12], 4, 2, 256, 17, 1, dict()),
    ([1], 8, 8, 32, 1, 1, dict()),
    ([0, 0], 2, 1, 16, 3, 2, dict()),
    ([], 2, 1, 16, 3, 1, dict()),
]
LARGE = [
    ([384, 97, 1, 0, 130], 8, 2, features, prefix, entries, dict(is_causal=is_causal, **more))
    for features, prefix in [(32, 257), (64, 8), (64, 1024), (80, 64), (128, 32), (256, 100)]
    for entries, is_causal in [(1, True), (3, False)]
    for more in [dict(), dict(window=64, prefix_in_window=entries == 3), dict(softcap=30.0)]
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.gpu) for case in LARGE)], ids=str)
def test_against_float64(case, dtype):
    *shape, chosen = case
    if INTERPRETED and dtype == torch.bfloat16 and shape[3] != 32:
        pytest.skip("float32 to the interpreter")
    if INTERPRETED and dtype == torch.float32 and shape[3] == 256:
        pytest.skip("the interpreter's sums of 256 products are NumPy's, less exact than PyTorch's")
    args, opts = inputs(*shape, dtype=dtype), options(shape[3], **chosen)
    grad = torch.randn_like(args[0])
    exact, plain = (run(reference.prefix_attention, args, opts, grad, kind) for kind in (torch.float64, dtype))
    got = run(backend.prefix_attention, args, opts, grad, dtype)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert_within_budget(got, exact, plain, dtype)


SMALL = [7, 0, 1, 9]
POSITIONS = [  # of CASES, and columns of a table of biases, or lengths of the keys' segments
    (SMALL, 4, 2, 16, 5, 1, dict(is_causal=True), 9),
    (SMALL, 2, 1, 20, 20, 3, dict(), 61),
    ([40], 1, 1, 16, 3, 2, dict(is_causal=True, window=5, prefix_in_window=True), 1),
    (SMALL, 4, 2, 16, 5, 3, dict(), [3, 4, 20, 0]),
    ([2, 9], 2, 1, 20, 20, 1, dict(softcap=2.0), [100, 1]),
    ([0, 0], 2, 1, 16, 3, 1, dict(), [5, 0]),
]
LARGE_POSITIONS = [
    ([384, 97, 1, 0, 130], 8, 2, features, prefix, entries, dict(is_causal=isinstance(more, int)), more)
    for features, prefix, entries in [(64, 100, 3), (128, 32, 1), (256, 7, 1)]
    for more in (257, [97, 400, 0, 33, 2])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", [*POSITIONS, *(pytest.param(case, marks=pytest.mark.gpu) for case in LARGE_POSITIONS)], ids=str
)
def test_biases_and_other_keys(case, dtype):
    *shape, chosen, more = case
    if INTERPRETED and dtype != (torch.float16 if shape[3] == 20 else torch.float32):
        pytest.skip("the interpreter takes its time")
    args, opts = inputs(*shape, dtype=dtype), options(shape[3], **chosen)
    given = {"relative_bias": 3 * torch.randn(shape[1], more, device=DEVICE)} if isinstance(more, int) else {}
    if not given:
        keys = torch.randn(2, sum(more), *args[1].shape[1:], device=DEVICE).to(dtype)
        args[1:3] = keys
        given["cu_seqlens_k"] = torch.tensor([0, *itertools.accumulate(more)], dtype=torch.int32, device=DEVICE)
    grad, run_reference = torch.randn_like(args[0]), partial(reference.prefix_attention, **given)
    exact, plain = (run(run_reference, args, opts, grad, kind) for kind in (torch.float64, dtype))
    got = run(partial(backend.prefix_attention, **given), args, opts, grad, dtype)
    assert_within_budget(got, exact, plain, dtype)


@pytest.mark.parametrize("trains", [c for n in range(1, 6) for c in itertools.combinations(NAMES, n)], ids="-".join)
def test_every_subset_of_requires_grad(trains, monkeypatch):
    args, opts = inputs([5, 3], entries=2), options(is_causal=True)
    grad = torch.randn_like(args[0])
    whole = run(backend.prefix_attention, args, opts, grad, torch.float32)
    if "query" not in trains:  # not even launched
        monkeypatch.setattr(launches.backward_kernels, "query_kernel", None)
    if not {"key", "value"} & set(trains):
        monkeypatch.setattr(launches.backward_kernels, "key_value_kernel", None)
    if not {"prefix_key", "prefix_value"} & set(trains):
        monkeypatch.setattr(launches.prefix_kernels, "prefix_kernel", None)
    got = run(backend.prefix_attention, args, opts, grad, torch.float32, trains)
    for name, result, want in zip(NAMES, got[2:], whole[2:], strict=True):
        assert torch.equal(result, want) if name in trains else result is None


def test_entries_that_no_segment_reads():
    *args, _ = inputs([5, 3], entries=3)
    exact, got = (
        run(call, [*args, None], options(), torch.ones_like(args[0]), dtype)
        for call, dtype in ((reference.prefix_attention, torch.float64), (backend.prefix_attention, torch.float32))
    )
    for result, want in zip(got, exact, strict=True):
        torch.testing.assert_close(result.double(), want.double(), rtol=1e-4, atol=1e-4)
    assert not any(gradient[1:].any() for gradient in got[-2:])


def test_frozen_inputs_give_no_graph():
    out, _ = backend.prefix_attention(*inputs([3]), *options())
    assert not out.requires_grad


def test_equal_inputs_give_equal_bits():
    args, opts = inputs([20, 1, 43], entries=2), options(dropout_p=0.2)
    grad = torch.randn_like(args[0])
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(backend.prefix_attention, args, opts, grad, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_prefix_sum_in_splits(monkeypatch):
    args, opts = inputs([20, 1, 43], prefix=20), options()
    grad = torch.randn_like(args[0])
    exact, plain = (run(reference.prefix_attention, args, opts, grad, x) for x in (torch.float64, torch.float32))
    for most in (1, 2):
        monkeypatch.setattr(launches, "programs", lambda device, most=most: most)
        assert_within_budget(
            run(backend.prefix_attention, args, opts, grad, torch.float32), exact, plain, torch.float32
        )


def test_more_splits_than_are_summed_at_once(monkeypatch):
    monkeypatch.setattr(launches, "SUMMED", dict(SPLITS=2, COLUMNS=16))
    args, opts = inputs([200, 43], features=16, prefix=3), options()
    assert launches.PrefixSums(args[3], 243, 2, False).splits > 3
    grad = torch.randn_like(args[0])
    exact, plain = (run(reference.prefix_attention, args, opts, grad, x) for x in (torch.float64, torch.float32))
    assert_within_budget(run(backend.prefix_attention, args, opts, grad, torch.float32), exact, plain, torch.float32)


PROMPTS = [  # lengths of the segments, P, heads, kv_heads, options
    (RAGGED, 6, 4, 2, dict()),
    (RAGGED, 20, 3, 1, dict(window=4, prefix_in_window=True)),
    ([9, 70], 40, 2, 2, dict(window=7, softcap=2.0)),
    ([0, 0], 3, 2, 1, dict()),
    ([], 4, 2, 1, dict()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_prompt_rows(case, dtype, monkeypatch):
    """In one launch, and no other tensor made for it."""
    lengths, prompt, heads, kv_heads, chosen = case
    args = inputs([prompt + sum(lengths)], heads, kv_heads, dtype=dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    grad, grids = torch.randn_like(args[0]), []
    launch = launches.forward_kernels.forward_kernel

    def call(kind, name):
        leaves = [x.detach().to(kind).requires_grad_() for x in args[:3]]
        common = dict(prompt_rows=prompt, is_causal=True, return_lse=True, backend=name)
        out, lse = prefix_attention(*leaves, None, None, cu_seqlens, **common, **chosen)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))]

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return launch[grid]

    monkeypatch.setattr(launches.forward_kernels, "forward_kernel", Counted())
    exact, plain, got = call(torch.float64, "reference"), call(dtype, "reference"), call(dtype, "triton")
    assert len(grids) == 1
    for name, result, want, baseline in zip(("out", "lse", *NAMES), got, exact, plain, strict=False):
        error, plain_error = ((x.double() - want).abs().max() for x in (result, baseline))
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * want.abs().max(), name


def test_dropout_of_prompt_rows_is_the_same_in_forward_and_backward():
    """The output is linear in the values: their gradient is that of the very weights that were kept."""
    args, prompt, lengths = inputs([20], heads=2, kv_heads=1), 5, [9, 6]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    other, grad = torch.randn_like(args[2]), torch.randn_like(args[0])

    def call(value):
        torch.manual_seed(3)
        options = dict(prompt_rows=prompt, is_causal=True, dropout_p=0.4, backend="triton")
        return prefix_attention(*args[:2], value, None, None, cu_seqlens, **options)

    value = args[2].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(call(value), value, grad)
    change = (call(other) - call(args[2])).double()
    torch.testing.assert_close(
        (change * grad).sum(), ((other - args[2]).double() * gradient).sum(), rtol=1e-4, atol=1e-4
    )


def test_dropout_is_the_same_in_forward_and_backward():
    lengths, heads, kv_heads, features, prefix, dropout_p = [12, 0, 1, 20], 2, 1, 64, 9, 0.3
    args = inputs(lengths, heads, kv_heads, features, prefix)
    opts = options(features, is_causal=True, dropout_p=dropout_p)

    # Values of one feature each: the output is the row of weights.
    unit = torch.eye(features, device=DEVICE)
    shown = [*args]
    shown[2] = torch.cat([unit[prefix : prefix + n] for n in lengths])[:, None].expand_as(args[2])
    shown[4] = unit[:prefix].expand_as(args[4])
    torch.manual_seed(5)
    weights, _ = backend.prefix_attention(*shown, *opts)
    kept = weights != 0  # (T, H, D)

    def expected(query, key, value, prefix_key, prefix_value, *_):
        outputs, lses = [], []
        for begin, end in itertools.pairwise(args[5].tolist()):
            k = torch.cat([prefix_key[0].transpose(0, 1), key[begin:end]]).repeat_interleave(heads // kv_heads, 1)
            v = torch.cat([prefix_value[0].transpose(0, 1), value[begin:end]]).repeat_interleave(heads // kv_heads, 1)
            score = torch.einsum("ihd,jhd->hij", query[begin:end], k) * features**-0.5
            seen = reference.visible(end - begin, prefix, True, None, False, score.device)
            score = score.masked_fill(~seen, -torch.inf)
            lse = score.logsumexp(-1, keepdim=True)
            mask = kept[begin:end, :, : prefix + end - begin].transpose(0, 1)
            outputs.append(torch.einsum("hij,jhd->ihd", (score - lse).exp() * mask / (1 - dropout_p), v))
            lses.append(lse.squeeze(-1).T)
        return torch.cat(outputs), torch.cat(lses)

    grad = torch.randn_like(args[0])
    exact, plain = (run(expected, args, opts, grad, dtype) for dtype in (torch.float64, torch.float32))
    torch.manual_seed(5)
    assert_within_budget(run(backend.prefix_attention, args, opts, grad, torch.float32), exact, plain, torch.float32)

    visible = torch.cat([reference.visible(n, prefix, True, None, False, kept.device).sum(1) for n in lengths])
    count = visible.sum().item() * heads
    share = kept.sum().item() / count
    assert abs(share - (1 - dropout_p)) < 4 * (dropout_p * (1 - dropout_p) / count) ** 0.5
    on_prefix = kept[..., :prefix]
    assert (on_prefix[:, 0] != on_prefix[:, 1]).any() and (on_prefix[0] != on_prefix[13]).any()  # by head, by row
    again, _ = backend.prefix_attention(*shown, *opts)  # a new draw
    assert ((again != 0) != kept).any()


@pytest.mark.parametrize(
    "chosen", [dict(), dict(is_causal=True, window=3, softcap=5.0, prefix_in_window=True, dropout_p=0.5)], ids=str
)
def test_opcheck(chosen):
    args = inputs([3, 0, 2], entries=2, prefix=2)
    for x in args[:5]:
        x.requires_grad_()
    seed = torch.tensor([7], device=DEVICE) if "dropout_p" in chosen else None
    torch.library.opcheck(backend._prefix_attention, (*args, seed, None, None, *options(**chosen), 0))


def test_opcheck_of_biases_and_other_keys():
    args = inputs([3, 0, 2], prefix=2)
    for x in args[:5]:
        x.requires_grad_()
    kinds = "test_schema", "test_autograd_registration", "test_faketensor"
    for bias, keys in (torch.randn(2, 5, device=DEVICE), None), (None, args[5]):
        torch.library.opcheck(backend._prefix_attention, (*args, None, bias, keys, *options(), 0), test_utils=kinds)


def test_compile():
    args, opts = inputs([5, 3]), options(dropout_p=0.5)
    grad = torch.randn_like(args[0])
    compiled = torch.compile(backend.prefix_attention, backend="aot_eager", fullgraph=True)
    results = []
    for function in (backend.prefix_attention, compiled):
        torch.manual_seed(1)
        results.append(run(function, args, opts, grad, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layouts():
    args = inputs([5, 3], kv_heads=2, entries=3)
    grad = torch.randn_like(args[0])
    want = run(backend.prefix_attention, args, options(), grad, torch.float32)
    for layout in LAYOUTS.keys() - {"expanded"}:
        moved = [in_layout(x, layout) for x in args]
        got = run(backend.prefix_attention, moved, options(), in_layout(grad, layout), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), layout
    same = [x[:1].expand_as(x) for x in args[:5]] + args[5:]  # and a loss that is a plain sum
    got, want = (
        run(backend.prefix_attention, tensors, options(), grad, torch.float32)
        for tensors, grad in (
            (same, torch.ones((), device=DEVICE).expand_as(grad)),
            ([x.contiguous() for x in same], torch.ones_like(grad)),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_refused():
    with pytest.raises(ValueError, match="float64"):
        backend.prefix_attention(*inputs([3], dtype=torch.float64), *options())
    with pytest.raises(ValueError, match="256"):
        backend.prefix_attention(*inputs([3], features=257), *options())
