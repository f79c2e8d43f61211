import functools
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, in_layout
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt.ops import prefix_attention

# Each with what it can do, asked as device=..., softcap=..., dropout_p=..., dtype=..., features=...
BACKENDS = {
    # On a GPU only where 16 bits are asked for: test_prefix_attention_cuda.py has the tests of those kernels.
    "native": lambda device, dtype=None, **_: (
        dtype != torch.float16 if device == "cpu" else dtype in (torch.bfloat16, torch.float16)
    ),
    "cpu": lambda device, softcap=None, dropout_p=0.0, **_: device == "cpu" and softcap is None and dropout_p == 0,
    "reference": lambda device, **_: True,
}
int32 = functools.partial(torch.tensor, dtype=torch.int32)
randn = functools.partial(torch.randn, dtype=torch.float64)
NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
LABELS = ("output", "lse", *NAMES)
SEEN = [(False, None, False), (True, None, False), (False, 3, False), (False, 0, True), (False, 40, True)]
SEEN += [(True, 5, False), (True, 1, True), (True, 2, True), (True, 40, True)]
MASKS = [dict(zip(("is_causal", "window", "prefix_in_window"), options, strict=True)) for options in SEEN]

# Every list of lengths under every mask; the rest drawn, with a seed that lets nearly all pairs of values meet.
LENGTHS = [[1], [63], [97], [0, 5, 0, 0, 31, 1, 0], [4, 4, 4, 9], []]
REST = [
    [0, 1, 17, 64, 257], [32, 64, 80, 128, 256], [(2, 2), (6, 2), (8, 1)],
    [None, torch.int64, torch.int32], [None, 0.3, -0.7, 30.0],
]  # fmt: skip
RNG = random.Random(1484)
CASES = [(each, mask, *map(RNG.choice, REST)) for each, mask in itertools.product(LENGTHS, MASKS)]
SHAPES = {
    "lengths": st.lists(st.integers(0, 9), max_size=6), "prefix": st.integers(0, 9), "features": st.integers(1, 20),
    "heads": st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2), (9, 3)]), "bank": st.integers(1, 3),
    "index": st.sampled_from([None, torch.int32, torch.int64]),
}  # fmt: skip
OPTIONS = {
    "is_causal": st.booleans(), "prefix_in_window": st.booleans(), "window": st.none() | st.integers(1, 12),
    "scale": st.none() | st.floats(-2, 2), "softcap": st.none() | st.floats(0.5, 50),
}  # fmt: skip


def skip_unless(backend, **needs):
    if not BACKENDS.get(backend, lambda **_: True)(**needs):
        pytest.skip(f"backend {backend!r} does not do {needs}")


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    skip_unless(request.param, device=device)
    return request.param


@pytest.fixture
def fresh(backend, device):
    """`inputs` on the device and in the widest dtype that the backend computes in."""
    skip_unless(backend, device=device)
    wide = not backend or BACKENDS[backend](device=device, dtype=torch.float64)
    return functools.partial(inputs, device=device, dtype=torch.float64 if wide else torch.float32)


def inputs(lengths=(3, 0, 9, 1), prefix=4, features=8, heads=(6, 2), bank=3, index=torch.int64, **where):
    """Random arguments for segments of the given lengths, as a dict; heads are query's and key's, `where` for to()."""
    tokens, entries = (sum(lengths), heads[1], features), (bank, heads[1], prefix, features)
    shapes = [(sum(lengths), heads[0], features), tokens, tokens, entries, entries]
    args = {name: randn(*shape).to(**where).requires_grad_() for name, shape in zip(NAMES, shapes, strict=True)}
    args["cu_seqlens"] = int32([0, *itertools.accumulate(lengths)], device=args["query"].device)
    args["prefix_index"] = index and torch.randint(bank, (len(lengths),), dtype=index, device=args["query"].device)
    return args


def mapped(args, change):
    return args | {name: change(args[name].detach()).requires_grad_() for name in NAMES}


def in_layouts(args, layout):
    """All in memory of another layout; the bounds, which one value for all is not, in that of slices then."""
    moved = {name: x if x is None else in_layout(x, layout) for name, x in args.items()}
    return moved | {"cu_seqlens": in_layout(args["cu_seqlens"], "sliced" if layout == "expanded" else layout)}


@functools.cache
def seen(rows, prefix, is_causal, window, prefix_in_window):
    """Which positions, the prefix at -P..-1 and the segment from 0, each row attends to: one by one."""

    def sees(i, j):
        near = window is None or (i - j < window if is_causal else abs(i - j) <= window)
        return (j < 0 and not prefix_in_window) or (near and (j <= i or not is_causal))

    return torch.tensor([[sees(i, j) for j in range(-prefix, rows)] for i in range(rows)])


@functools.cache
def column(rows, prefix, columns):
    """Which column of a table of biases each row takes for each position: one by one."""
    places = range(-prefix, rows)
    return torch.tensor([[min(max(j - i + columns // 2, 0), columns - 1) for j in places] for i in range(rows)])


def attend(args, is_causal=False, scale=None, window=None, softcap=None, prefix_in_window=False, relative_bias=None):
    """The definition, one segment and one head after the other: where it is, its q, k, v and scores, those seen."""
    query, key, value, prefix_key, prefix_value = (args[name] for name in NAMES)
    bounds, (_, heads, features), prefix = args["cu_seqlens"].tolist(), query.shape, prefix_key.shape[2]
    key_bounds = args.get("cu_seqlens_k", args["cu_seqlens"]).tolist()
    for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = slice(*key_bounds[b : b + 2])
        n = 0 if args["prefix_index"] is None else int(args["prefix_index"][b])
        for h in range(heads if end > begin else 0):
            g = h // (heads // key.shape[1])
            q = query[begin:end, h]
            k, v = (torch.cat([x[n, g], y[own, g]]) for x, y in ((prefix_key, key), (prefix_value, value)))
            score = (features**-0.5 if scale is None else scale) * (q @ k.T)
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            if relative_bias is not None:
                score = score + relative_bias[h].to(score)[column(end - begin, prefix, relative_bias.shape[1])]
            masked = score
            if "cu_seqlens_k" not in args:
                mask = seen(end - begin, prefix, is_causal, window, prefix_in_window).to(query.device)
                masked = score.masked_fill(~mask, -torch.inf)
            yield (slice(begin, end), h, n, g, own), (q, k, v, score), masked


def expected(args, **options):
    """Output and log-sum-exp in the dtype of `args`."""
    query = args["query"]
    outs, lses = ([[start[:0, h]] for h in range(query.shape[1])] for start in (query, query[..., 0]))
    for (_, h, *_), (_, _, v, _), score in attend(args, **options):
        outs[h].append(score.softmax(-1) @ v)
        lses[h].append(score.logsumexp(-1))
    return tuple(torch.stack([torch.cat(parts) for parts in heads], 1) for heads in (outs, lses))


def gradients(result, args, grad):
    return torch.autograd.grad(result, [args[name] for name in NAMES], grad, allow_unused=True, materialize_grads=True)


@torch.no_grad()
def sums(args, grad, size=torch.abs, slack=0.0, scale=None, softcap=None, **options):
    """Output, log-sum-exp and gradients by their formulas, all terms through `size`, scores counting `slack` times."""
    scale = args["query"].shape[-1] ** -0.5 if scale is None else scale
    out, lse, total = 0 * grad, 0 * grad[..., 0], {name: torch.zeros_like(args[name]) for name in NAMES}
    prefix = args["prefix_key"].shape[2]
    for (rows, h, n, g, own), (q, k, v, score), masked in attend(args, scale=scale, softcap=softcap, **options):
        p, do, terms = masked.softmax(-1), grad[rows, h], slack * abs(scale) * (q.abs() @ k.abs().T)
        if softcap is None:
            terms += slack * (score - scale * q @ k.T).abs()  # the bias
        lse[rows, h] = size(masked.logsumexp(-1)) + (p * terms).sum(-1)
        # A weight is the exponential of a difference of two sums, which are rounded themselves.
        o, p = p @ v, p * (1 + terms + slack * lse[rows, h, None])
        ds = p * (size(do) @ size(v).T + size(-do * o).sum(-1, keepdim=True))
        ds = size(scale * ds * (1 if softcap is None else 1 - (score / softcap) ** 2))
        out[rows, h] = p @ size(v)
        total["query"][rows, h] = ds @ size(k)
        for kind, part in ("key", ds.T @ size(q)), ("value", p.T @ size(do)):
            total["prefix_" + kind][n, g] += part[:prefix]
            total[kind][own, g] += part[prefix:]
    return out, lse, *total.values()


def check(args, grad_like=torch.randn_like, run=prefix_attention, backend=None, **options):
    """Output, log-sum-exp and gradients: in float64 to torch's tolerance, else by the error plain torch makes."""
    query, softcap = args["query"], options.get("softcap")
    skip_unless(backend, device=query.device.type, dtype=query.dtype, features=query.shape[-1], softcap=softcap)
    exact, eps = mapped(args, torch.Tensor.double), torch.finfo(query.dtype).eps
    got = run(**args, **options, return_lse=True, backend=backend)
    assert got[0].dtype == query.dtype and not got[1].requires_grad
    assert got[1].dtype == torch.promote_types(query.dtype, torch.float32)
    want = expected(exact, **options)
    grad = grad_like(want[0]).to(query.dtype)
    want = (*want, *gradients(want[0], exact, grad.double()))
    got = (*got, *gradients(got[0], args, grad))
    if query.dtype == torch.float64:
        return torch.testing.assert_close(got, want)
    args = mapped(args, torch.Tensor.contiguous)  # PyTorch's bfloat16 products read what is around others
    plain = expected(args, **options)
    plain = (*plain, *gradients(plain[0], args, grad.contiguous()))
    magnitudes = sums(exact, grad.double(), slack=torch.finfo(torch.float32).eps / eps, **options)
    for name, x, plainly, exactly, magnitude in zip(LABELS, got, plain, want, magnitudes, strict=True):
        if x.numel():
            error, plain_error = ((y.double() - exactly).abs().max() for y in (x, plainly))
            assert error <= 2 * plain_error + eps * magnitude.max(), name


def test_the_oracle_agrees_with_itself():
    # Its autograd, which gives what is expected, and its formulas, which give the budget.
    for options in [*MASKS, {"softcap": 1.5, "scale": -0.7}]:
        want = expected(args := inputs(), **options)
        grads = gradients(want[0], args, grad := torch.randn_like(want[0]))
        torch.testing.assert_close(sums(args, grad, lambda x: x, **options), (*want, *grads))


@pytest.mark.parametrize("lengths, mask, prefix, features, heads, index, scale", CASES)
def test_values_and_gradients(backend, fresh, lengths, mask, prefix, features, heads, index, scale):
    check(fresh(lengths, prefix, features, heads, index=index), **mask, scale=scale, backend=backend)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.fixed_dictionaries(SHAPES), options=st.fixed_dictionaries(OPTIONS), seed=st.integers(0, 2**32))
def test_any_small_problem(backend, device, fresh, shape, options, seed):
    torch.manual_seed(seed)
    if not BACKENDS[backend](device=device, softcap=options["softcap"]):
        options = options | {"softcap": None}
    check(fresh(**shape), **options, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths, prefix, features, heads, options", [
    ([97], 17, 64, (6, 2), {}), ([0, 5, 0, 0, 31, 1, 0], 64, 80, (6, 2), {"is_causal": True}),
    ([1] * 5, 257, 32, (8, 1), {}), ([63, 1], 1, 256, (4, 1), {"is_causal": True, "scale": 0.1}),
    ([30, 63], 4, 128, (6, 2), {"window": 5, "prefix_in_window": True}),
    ([33] * 3, 4, 64, (6, 2), {"window": 7, "is_causal": True}), ([9, 40], 4, 64, (2, 2), {"softcap": 2.0}),
    ([9, 40], 17, 32, (4, 2), {"softcap": 5.0, "scale": 3.0, "is_causal": True}),
])  # fmt: skip
def test_every_dtype(backend, fresh, dtype, lengths, prefix, features, heads, options):
    check(fresh(lengths, prefix, features, heads, dtype=dtype), **options, backend=backend)


@pytest.mark.parametrize("lengths", [[3, 0, 9, 1], []], ids=str)
@pytest.mark.parametrize("trains", [c for n in range(6) for c in itertools.combinations(NAMES, n)], ids="-".join)
def test_every_subset_of_requires_grad(backend, fresh, trains, lengths):
    args = fresh(lengths)
    want, _ = expected(args)
    want_grads = gradients(want, args, grad := torch.randn_like(want))
    args |= {name: args[name].detach().requires_grad_(name in trains) for name in NAMES}
    got = prefix_attention(**args, backend=backend)
    torch.testing.assert_close(got, want)
    assert got.requires_grad == bool(trains)
    if trains:
        got.backward(grad)
    for name, gradient in zip(NAMES, want_grads, strict=True):
        torch.testing.assert_close(args[name].grad, gradient if name in trains else None)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("options", [{}, MASKS[-2], {"softcap": 1.5}, {"dropout_p": 0.4}])
def test_gradcheck(backend, device, fresh, options):
    skip_unless(backend, device=device, **options, dtype=torch.float64)
    args = fresh([2, 0, 3], prefix=3, features=2, heads=(2, 1), bank=2)

    def run(*tensors):
        torch.manual_seed(3)  # of the dropout
        return prefix_attention(**args | dict(zip(NAMES, tensors, strict=True)), **options, backend=backend)

    assert torch.autograd.gradcheck(run, [args[name] for name in NAMES])


class Recorder(TorchDispatchMode):
    calls = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "fastprompt::prefix_attention" in func.name():
            self.calls += ((func, args, kwargs),)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, MASKS[-2]])
def test_opcheck_of_every_registered_operator(device, options):
    where = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    with Recorder() as recorder:
        for name, index in itertools.product(BACKENDS, (None, torch.int64)):
            if BACKENDS[name](**where):
                args = inputs(features=16, index=index, **where)
                prefix_attention(**args, **options, backend=name).sum().backward()
                more = {"relative_bias": torch.randn(6, 5)} if options else {"cu_seqlens_k": args["cu_seqlens"]}
                if device == "cpu" and index and (name == "native" or not options):
                    prefix_attention(**args, **options, **more, backend=name).sum().backward()
    names = (name for name in torch._C._dispatch_get_all_op_names() if "fastprompt::prefix_attention" in name)
    registered = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())}
    assert {func.name() for func, _, _ in recorder.calls} == registered
    for func, args, kwargs in recorder.calls:
        if "backward" in func.name():  # has no gradient of its own
            args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(func, tuple(args), kwargs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_compile(backend, fresh, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(prefix_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths, prefix, index in ([3, 0, 4], 5, torch.int64), ([6, 1, 0, 9], 2, None):
        for options in {"is_causal": True}, {"window": 3, "prefix_in_window": True, "scale": 0.3}:
            check(fresh(lengths, prefix, index=index), run=compiled, **options, backend=backend)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("prefix", [0, 17])
def test_outputs_are_written_whole_and_the_same_each_time(backend, fresh, options, prefix, request):
    args = mapped(fresh([0, 63, 1, 0, 33, 33], prefix, 32), torch.Tensor.float)
    args["prefix_index"].fill_(1)[1] = 2  # nobody reads the first
    was, runs = torch.are_deterministic_algorithms_enabled(), []
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(was))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what a kernel leaves out shows
    assert torch.empty(8).isnan().all()
    for _ in range(2):
        out, lse = prefix_attention(**args, **options, return_lse=True, backend=backend)
        runs.append([out, lse, *torch.autograd.grad(out.square().sum(), [args[name] for name in NAMES])])
    assert all(first.isfinite().all() and torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert not any(gradient[0].any() for gradient in runs[0][-2:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", MASKS[1:3], ids=str)
def test_layouts(backend, fresh, layout, options):
    args = in_layouts(fresh(), layout)
    for grad_like in lambda x: in_layout(torch.randn_like(x), layout), lambda x: x.new_ones(1, 1, 1).expand_as(x):
        check(args, grad_like, **options, backend=backend)


def test_dropout(backend, device, fresh):
    skip_unless(backend, device=device, dropout_p=0.4)
    options = {"is_causal": True, "backend": backend, "dropout_p": 0.4}
    args = fresh([5], heads=(2, 1))
    many = args | {name: args[name].repeat(2000, 1, 1) for name in NAMES[:3]}
    many |= dict(prefix_index=args["prefix_index"].expand(2000), cu_seqlens=5 * torch.arange(2001).int().to(device))
    draws = prefix_attention(**many, **options).unflatten(0, (2000, 5))
    error = draws.mean(0) - expected(args, is_causal=True)[0]
    assert draws.std(0).min() > 0 and (error.abs() < 6 * draws.std(0) / 2000**0.5).all()
    torch.manual_seed(5)
    first, second = (prefix_attention(**args, **options) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, prefix_attention(**args, **options)) and not torch.equal(first, second)
    for out in first, second:  # linear in the values, so this holds if backward has forward's mask
        grads = dict(zip(NAMES, gradients(out, args, grad := torch.randn_like(out)), strict=True))
        by_value = sum((args[name] * grads[name]).sum() for name in ("value", "prefix_value"))
        torch.testing.assert_close(by_value, (out * grad).sum())
        assert all(gradient.isfinite().all() and gradient.any() for gradient in grads.values())


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_identical_segments_give_identical_rows(backend, device, fresh, options):
    args, rows = fresh([7, 2]), [*range(7), *range(9), *range(7)]
    many = args | {name: args[name][rows] for name in NAMES[:3]} | {"prefix_index": args["prefix_index"][[0, 0, 1, 0]]}
    many["cu_seqlens"] = int32([0, 7, 14, 16, 23], device=device)
    out, repeated = (prefix_attention(**each, **options, backend=backend) for each in (args, many))
    torch.testing.assert_close(repeated, out[rows])


@pytest.mark.parametrize("options", [m for m in MASKS if m["prefix_in_window"] or not m["window"]], ids=str)
def test_a_prefix_is_rows_put_before_the_segment(backend, device, fresh, options):
    args = fresh([9], prefix=5, index=None, bank=1)
    joined = args | dict(query=torch.cat([args["query"][:5], args["query"]]), cu_seqlens=int32([0, 14], device=device))
    for name in "key", "value":
        joined[name] = torch.cat([args["prefix_" + name][0].transpose(0, 1), args[name]])
        joined["prefix_" + name] = args["prefix_" + name][:, :, :0]
    out = prefix_attention(**args, **options, backend=backend)
    want = prefix_attention(**joined, **options, backend=backend)[5:]
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(gradients(out, args, grad := torch.randn_like(out)), gradients(want, args, grad))


def test_prefix_gradient_is_the_sum_over_segments(backend, device, fresh):
    args, parts = fresh(lengths := [4, 0, 9, 1, 9]), []
    for b, length in enumerate(lengths):
        one = args | {name: args[name].split(lengths)[b] for name in NAMES[:3]}
        one |= {"cu_seqlens": int32([0, length], device=device), "prefix_index": args["prefix_index"][b : b + 1]}
        parts.append(prefix_attention(**one, backend=backend))
    whole, grads = prefix_attention(**args, backend=backend), [torch.randn_like(part) for part in parts]
    one_by_one = zip(*(gradients(part, args, grad) for part, grad in zip(parts, grads, strict=True)), strict=True)
    torch.testing.assert_close(gradients(whole, args, torch.cat(grads)), tuple(map(sum, one_by_one)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_a_prefix_it_is_torch(backend, fresh, is_causal):
    args = fresh(lengths := [5, 1, 12], prefix=0)
    segments = zip(*(args[name].transpose(0, 1).split(lengths, 1) for name in NAMES[:3]), strict=True)
    want = [F.scaled_dot_product_attention(*qkv, is_causal=is_causal, enable_gqa=True) for qkv in segments]
    out = prefix_attention(**args, is_causal=is_causal, backend=backend)
    torch.testing.assert_close(out, torch.cat(want, 1).transpose(0, 1))
