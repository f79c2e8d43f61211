"""prefix_attention with relative biases (T5, ALiBi), and with bounds of their own for the keys (cross-attention)."""

import itertools
from functools import partial

import pytest
import torch
from layouts import LAYOUTS, in_layout
from test_prefix_attention import MASKS, NAMES, check, gradients, in_layouts, inputs, int32, mapped, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from fastprompt import _native
from fastprompt.bench.flops import count_flops
from fastprompt.ops import prefix_attention
from fastprompt.ops.prefix_attention import HAS_TRITON

if HAS_TRITON:
    from fastprompt.ops._triton import INTERPRETED
NATIVE = ["native"] if _native.available("cpu") else []
TRITON = ["triton"] * (HAS_TRITON and INTERPRETED)  # in float32, and few cases: the interpreter takes its time
BACKENDS = [*NATIVE, "reference"]
ROWS = [[0, 5, 0, 31, 1], [97], [4, 4, 9], [0, 0], [3, 0, 70], [], [2, 0, 3]]
KEYS = [[7, 5, 0, 60, 0], [130], [0, 0, 0], [3, 1], [1, 130, 40], [], [0, 4, 5]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
WIDEST = {"triton": torch.float32}


def cross(lengths, key_lengths, *shape, **where):
    """`inputs` whose keys are other rows."""
    args, keys = inputs(lengths, *shape, **where), sum(key_lengths)
    for name in "key", "value":
        args[name] = randn(keys, *args[name].shape[1:]).to(args[name].dtype).requires_grad_()
    return args | {"cu_seqlens_k": int32([0, *itertools.accumulate(key_lengths)])}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths, prefix, features, heads, columns, options", [
    ([97], 17, 64, (6, 2), 301, {"scale": 1.0}), ([0, 5, 0, 0, 31, 1, 0], 64, 80, (6, 2), 63, MASKS[1]),
    ([1] * 5, 257, 32, (8, 1), 1, {}), ([63, 1], 1, 20, (4, 1), 3, MASKS[1] | {"scale": -0.3}),
    ([30, 63], 4, 24, (6, 2), 9, MASKS[3] | {"window": 5}), ([40], 0, 16, (9, 3), 33, MASKS[-2]),
    ([], 3, 8, (2, 2), 5, {}),
])  # fmt: skip
def test_relative_bias(backend, dtype, lengths, prefix, features, heads, columns, options):
    bias = 3 * randn(heads[0], columns).to(dtype)
    check(inputs(lengths, prefix, features, heads, dtype=dtype), relative_bias=bias, backend=backend, **options)


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths, key_lengths, prefix, options", [
    (ROWS[0], KEYS[0], 17, {}), (ROWS[1], KEYS[1], 0, {"scale": 1.0}), (ROWS[2], KEYS[2], 5, {"softcap": 2.0}),
    (ROWS[3], KEYS[3], 140, {}), (ROWS[4], KEYS[4], 64, {"scale": -0.3}), ([], [], 3, {}),
])  # fmt: skip
def test_cross_attention(backend, dtype, lengths, key_lengths, prefix, options):
    check(cross(lengths, key_lengths, prefix, 24, (6, 2), dtype=dtype), backend=backend, **options)


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu", *TRITON])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths, key_lengths", list(zip(ROWS, KEYS, strict=True)), ids=str)
def test_rows_without_keys(backend, dtype, lengths, key_lengths):
    if backend == "triton" and (dtype != torch.float32 or sum(lengths) > 20):
        pytest.skip("the interpreter takes its time")
    args = cross(lengths, key_lengths, 0, 16, (4, 2), dtype=dtype)
    out, lse = prefix_attention(**args, return_lse=True, backend=backend)
    grads = dict(zip(NAMES, gradients(out, args, torch.ones_like(out)), strict=True))
    blind = torch.tensor(
        [not keys for rows, keys in zip(lengths, key_lengths, strict=True) for _ in range(rows)], dtype=bool
    )
    idle = torch.tensor(
        [not rows for rows, keys in zip(lengths, key_lengths, strict=True) for _ in range(keys)], dtype=bool
    )
    assert not out[blind].any() and (lse[blind] == -torch.inf).all() and not grads["query"][blind].any()
    assert out[~blind].all() and lse[~blind].isfinite().all()
    assert not grads["key"][idle].any() and not grads["value"][idle].any() and grads["value"][~idle].all()
    assert not any(x.isnan().any() for x in (out, lse, *grads.values()))


def attention_of_t5(is_decoder):
    config = T5Config(d_model=24, d_kv=8, num_heads=4, relative_attention_max_distance=20, is_decoder=is_decoder)
    config._attn_implementation = "eager"
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    distances = torch.arange(-60, 61)
    buckets = attention._relative_position_bucket(distances, not is_decoder, 32, 20)
    return attention, attention.relative_attention_bias(buckets).T.detach()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_decoder, prefix", [(False, 0), (True, 0), (True, 30)])
def test_it_is_the_attention_of_t5(backend, is_decoder, prefix):
    """With PEFT's prefix, which stands in the cache."""
    attention, bias = attention_of_t5(is_decoder)
    hidden, past = randn(29, 24), [randn(1, 4, prefix, 8).requires_grad_() for _ in range(2)]
    mask = None
    if is_decoder:
        mask = torch.full((29, 29), -torch.inf, dtype=torch.float64).triu(1)
        mask = torch.cat([mask.new_zeros(29, prefix), mask], 1)[None, None]
    cache = None
    if prefix:
        cache = DynamicCache()
        cache.update(*past, 0)
    want = attention(hidden[None], mask=mask, past_key_values=cache)[0][0]
    query, key, value = (project(hidden).view(29, 4, 8) for project in (attention.q, attention.k, attention.v))
    options = dict(is_causal=is_decoder, scale=1.0, relative_bias=bias, backend=backend)
    got = attention.o(prefix_attention(query, key, value, *past, int32([0, 29]), **options).flatten(1))
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    if prefix:
        torch.testing.assert_close(*(torch.autograd.grad(out, past, grad) for out in (got, want)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_alibi(backend):
    """Bloom adds slope * key's position: by softmax the same as slope * distance."""
    args, prefix = inputs([9], 5, 8, (6, 6), index=None, bank=1), 5
    alibi = build_alibi_tensor(torch.ones(1, 14), 6, torch.float64).squeeze(1)  # (H, P + L)
    keys, values = (torch.cat([args["prefix_" + name][0], args[name].transpose(0, 1)], 1) for name in ("key", "value"))
    score = 8**-0.5 * args["query"].transpose(0, 1) @ keys.mT + alibi[:, None]
    seen = torch.ones(9, 14, dtype=bool).tril(prefix)
    want = (score.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    table = (alibi[:, 1] - alibi[:, 0])[:, None] * torch.arange(-20, 21)
    got = prefix_attention(**args, is_causal=True, relative_bias=table, backend=backend)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    torch.testing.assert_close(gradients(got, args, grad), gradients(want, args, grad))


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
@pytest.mark.parametrize("window, in_window", [(None, False), (4, True)])
def test_prompt_rows_with_a_bias(backend, window, in_window):
    """Each segment's rows are as if the prompt's stood before them."""
    if backend == "triton" and not in_window:
        pytest.skip("the interpreter takes its time")
    dtype = WIDEST.get(backend, torch.float64)
    args, lengths = inputs([5, 3, 0, 20], 0, 16, (4, 2), index=None, bank=1, dtype=dtype), [3, 0, 20]
    leaves, bias = [args[name] for name in NAMES[:3]], randn(4, 9)
    options = dict(is_causal=True, window=window, prefix_in_window=in_window, relative_bias=bias)
    got = prefix_attention(*leaves, None, None, int32([0, 3, 3, 23]), prompt_rows=5, backend=backend, **options)
    wants, begin = [], 5
    for own in [[], *(range(begin + sum(lengths[:n]), begin + sum(lengths[: n + 1])) for n in range(3))]:
        rows = [*range(5), *own]
        prefix = args["prefix_key"], args["prefix_value"]
        whole = prefix_attention(
            *(x[rows] for x in leaves), *prefix, int32([0, len(rows)]), backend="reference", **options
        )
        wants.append(whole[5 if len(wants) else 0 :])
    want, grad = torch.cat(wants), torch.randn_like(got)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad))


def both(dtype=torch.float64):
    """Arguments and options: a bias, and cross-attention."""
    return (inputs([3, 0, 9, 1], dtype=dtype), {"relative_bias": randn(6, 7)}), (
        cross([3, 0, 9, 1], [2, 7, 0, 4], dtype=dtype),
        {},
    )


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_every_subset_of_requires_grad(backend):
    subsets = [names for n in range(1, 6) for names in itertools.combinations(NAMES, n)]
    if backend == "triton":
        subsets = [("value",), ("prefix_key",)]
    for args, options in both(WIDEST.get(backend, torch.float64)):
        out = prefix_attention(**args, **options, backend="reference")
        grads = dict(zip(NAMES, gradients(out, args, grad := torch.randn_like(out)), strict=True))
        for trains in subsets:
            leaves = args | {name: args[name].detach().requires_grad_(name in trains) for name in NAMES}
            prefix_attention(**leaves, **options, backend=backend).backward(grad)
            for name in NAMES:
                torch.testing.assert_close(leaves[name].grad, grads[name] if name in trains else None)


@pytest.mark.parametrize("backend, layout", [*itertools.product(BACKENDS, LAYOUTS), *((x, "sliced") for x in TRITON)])
def test_layouts(backend, layout):
    for args, options in both(WIDEST.get(backend, torch.float64)):
        args = in_layouts(args, layout)
        if "cu_seqlens_k" in args and layout == "expanded":
            args["cu_seqlens_k"] = int32([0, 2, 9, 9, 13])
        options = {name: in_layout(bias, layout) for name, bias in options.items()}
        check(args, lambda x: in_layout(torch.randn_like(x), layout), backend=backend, **options)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_dropout(backend):
    for args, options in both(WIDEST.get(backend, torch.float64))[backend == "triton" :]:
        outs = []
        for _ in range(2):
            torch.manual_seed(5)
            outs.append(prefix_attention(**args, **options, dropout_p=0.4, backend=backend))
        assert torch.equal(*outs) and not torch.equal(outs[0], prefix_attention(**args, **options, backend=backend))
        grads = dict(zip(NAMES, gradients(outs[0], args, grad := torch.randn_like(outs[0])), strict=True))
        by_value = sum((args[name] * grads[name]).sum() for name in ("value", "prefix_value"))
        torch.testing.assert_close(by_value, (outs[0] * grad).sum())  # linear in the values: forward's mask


@pytest.mark.skipif(not NATIVE, reason="the reference has second derivatives")
def test_second_derivatives():
    for args, options in both(torch.float32):
        leaves = [args[name] for name in NAMES]
        first = torch.autograd.grad(prefix_attention(**args, **options).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="prefix_attention has no second derivative"):
            first[0].sum().backward()


@pytest.mark.parametrize("backend", [*NATIVE, *TRITON])
def test_tensors_without_values(backend):
    for args, options in both(torch.float32):
        for move in FakeTensorMode().from_tensor, lambda x: x.detach().to("meta").requires_grad_(x.requires_grad):
            fakes, moved = (
                {name: move(x) for name, x in each.items() if isinstance(x, torch.Tensor)} for each in (args, options)
            )
            leaves = [fakes[name] for name in NAMES]
            out = prefix_attention(**fakes, **moved, backend=None if fakes["query"].is_meta else backend)
            assert out.shape == args["query"].shape
            assert [x.shape for x in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]


@pytest.mark.parametrize("backend", NATIVE)
def test_compile(backend):
    torch.compiler.reset()
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    for args, options in both():
        check(args, run=compiled, backend=backend, **options)
    with pytest.raises(ValueError, match="cu_seqlens_k must end at 13, .* got 12"):
        compiled(**args | {"cu_seqlens_k": int32([0, 2, 9, 9, 12])}, backend=backend)


@pytest.mark.skipif(not NATIVE, reason="the native library has the formulas")
def test_flops():
    args = cross([3, 0, 9], [5, 2, 0], 4, 8, (6, 2))
    pairs = 3 * 5 + 12 * 4
    assert count_flops(lambda: prefix_attention(**args).sum().backward()) == 14 * pairs * 6 * 8
    args = inputs([3, 0, 9], 4, 8, (6, 2))
    pairs = 3 * 3 + 9 * 9 + 12 * 4
    run = partial(prefix_attention, **args, relative_bias=randn(6, 5))
    assert count_flops(lambda: run().sum().backward()) == 14 * pairs * 6 * 8


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("backend", NATIVE)
def test_division_among_threads(backend, threads):
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(cross([201, 0, 30], [5, 40, 300], 150, 20, (4, 2)), backend=backend)
        check(inputs([97, 0, 2], 64, 20, (4, 2)), relative_bias=randn(4, 99), backend=backend)
    finally:
        torch.set_num_threads(was)


@pytest.mark.parametrize(
    "backend, dtype",
    [*itertools.product(BACKENDS, [torch.float64, torch.float32]), *((x, torch.float32) for x in TRITON)],
)
def test_biases_of_any_size(backend, dtype):
    """They hide keys as masks do, or choose one, whatever the scale."""
    args = mapped(inputs([9], 3, 8, (2, 1), dtype=dtype), lambda x: x)
    most = torch.finfo(dtype).max
    sizes = [*itertools.product((-torch.inf, -most, -1e9), (1e-29, 0.3, 1e30))]
    for low, scale in sizes[1:7:2] if backend == "triton" else sizes:
        table = torch.full((2, 31), low, dtype=dtype)
        table[:, 15] = 0  # a row sees itself alone
        out, lse = prefix_attention(**args, relative_bias=table, scale=scale, return_lse=True, backend=backend)
        if scale < 1:
            torch.testing.assert_close(out, args["value"].repeat_interleave(2, 1))
        assert all(x.isfinite().all() for x in (out, lse, *gradients(out, args, torch.ones_like(out))))
    table = torch.full((2, 31), -most, dtype=dtype)  # all alike
    out = prefix_attention(**args, relative_bias=table, scale=0.3, backend=backend)
    assert out.isfinite().all()


BIAS = randn(6, 5)
EXCLUDED = {"is_causal": True, "window": 3, "prompt_rows": 2, "relative_bias": BIAS}


@pytest.mark.parametrize("change, error, match", [
    ({"relative_bias": 0.5}, TypeError, "relative_bias must be a tensor, got float"),
    ({"relative_bias": BIAS[:, :4]}, ValueError, r"relative_bias must be \(6, R\), .* R odd, .* got \(6, 4\)"),
    ({"relative_bias": BIAS[:, :0]}, ValueError, r"relative_bias must be \(6, R\), .* got \(6, 0\)"),
    ({"relative_bias": BIAS[:2]}, ValueError, r"relative_bias must be \(6, R\), .* got \(2, 5\)"),
    ({"relative_bias": BIAS[0]}, ValueError, r"relative_bias must be \(6, R\), .* got \(5,\)"),
    ({"relative_bias": BIAS.int()}, ValueError, "relative_bias must be .* floating point, got .* torch.int32"),
    ({"relative_bias": BIAS.to("meta")}, ValueError, "relative_bias must be on cpu, where query is, got meta"),
    ({"relative_bias": BIAS.clone().requires_grad_()}, ValueError, "relative_bias must be frozen, .* requires grad"),
    ({"relative_bias": BIAS, "softcap": 5.0}, ValueError, "softcap must be None with relative_bias, got 5.0"),
    *(
        ({"cu_seqlens_k": int32([0, 3, 7]), name: x}, ValueError, f"{name} must not be given with cu_seqlens_k, got ")
        for name, x in EXCLUDED.items()
    ),
    ({"cu_seqlens_k": int32([0, 3, 6])}, ValueError, "cu_seqlens_k must end at 7, .* got 6"),
    ({"cu_seqlens_k": int32([0, 8, 7])}, ValueError, "cu_seqlens_k must not decrease, got 7 after 8"),
    ({"cu_seqlens_k": int32([0, 7])}, ValueError, r"cu_seqlens_k must be \(3,\), as cu_seqlens is, got \(2,\)"),
    ({"cu_seqlens_k": torch.tensor([0, 3, 7])}, TypeError, "cu_seqlens_k must be torch.int32, got torch.int64"),
    ({"cu_seqlens_k": [0, 3, 7]}, TypeError, "cu_seqlens_k must be a tensor, got list"),
    ({"cu_seqlens_k": int32([0, 3, 7]).to("meta")}, ValueError, "cu_seqlens_k must be on cpu, .* got meta"),
    ({"key": randn(8, 2, 8), "cu_seqlens_k": int32([0, 8, 8])}, ValueError, r"value must be \(8, 2, 8\), .* \(7,"),
    ({"key": randn(8, 2, 8)}, ValueError, r"key must be \(7, 2, 8\)"),
])  # fmt: skip
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input(backend, change, error, match):
    with pytest.raises(error, match=match):
        prefix_attention(**inputs([3, 4]) | {"backend": backend} | change)


@pytest.mark.parametrize("backend, change", [
    ("flash", {"relative_bias": BIAS}), ("flash", {"cu_seqlens_k": int32([0, 3, 7])}), ("cpu", {"relative_bias": BIAS}),
])  # fmt: skip
def test_a_backend_without_them_says_so(backend, change):
    with pytest.raises(
        ValueError, match=f"backend '{backend}' has no {next(iter(change))} on cpu; 'native' and 'reference'"
    ):
        prefix_attention(**inputs([3, 4]) | change, backend=backend)


def test_a_dtype_that_the_kernels_lack_goes_to_the_reference():
    args = inputs([3, 4], dtype=torch.float16)
    want = prefix_attention(**args, relative_bias=BIAS, backend="reference")
    assert torch.equal(prefix_attention(**args, relative_bias=BIAS), want)
