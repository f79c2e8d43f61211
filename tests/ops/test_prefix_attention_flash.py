"""prefix_attention through PyTorch's flash kernels and Triton. Without a GPU, plain PyTorch stands for the former.

TRITON_INTERPRET=1 python -m pytest <this file>
"""

import itertools
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_prefix_attention_triton import DEVICE, NAMES, RAGGED, assert_within_budget, inputs, options, run

from fastprompt.ops import prefix_attention
from fastprompt.ops._triton import INTERPRETED
from fastprompt.ops.prefix_attention import flash, reference, triton_launches

DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # the interpreter has no bfloat16


def attend(query, key, value, bounds, opts):
    """Yields (segment, query, weights' exponents (H, L, L), key and value of each query head)."""
    group = query.shape[1] // key.shape[1]
    for begin, end in itertools.pairwise(bounds.tolist()):
        own = slice(begin, end)
        q, k, v = (x[own].float() for x in (query, key, value))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        seen = reference.visible(end - begin, 0, opts.is_causal, opts.window, False, query.device)
        yield own, q, (opts.scale * torch.einsum("ihd,jhd->hij", q, k)).masked_fill(~seen, -torch.inf), k, v


def own_forward(query, key, value, bounds, longest, opts):
    assert bounds.diff().max() <= longest
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2][::-1], dtype=torch.float32)
    for own, _, score, _, v in attend(query, key, value, bounds, opts):
        lse[:, own] = score.logsumexp(-1)
        out[own] = torch.einsum("hij,jhd->ihd", score.softmax(-1), v).to(out.dtype)
    return out, lse


def own_backward(grad, query, key, value, out, lse, bounds, longest, opts):
    assert bounds.diff().max() <= longest
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for own, q, score, k, v in attend(query, key, value, bounds, opts):
        do, o, heads = grad[own].float(), out[own].float(), (key.shape[1], -1)
        weight = (score - lse[:, own, None]).exp()
        delta = (do * o).sum(-1).T
        score_grad = weight * (torch.einsum("ihd,jhd->hij", do, v) - delta[..., None]) * opts.scale
        grads[0][own] = torch.einsum("hij,jhd->ihd", score_grad, k).to(query.dtype)
        for whole, left, right in ((grads[1], score_grad, q), (grads[2], weight, do)):
            whole[own] = torch.einsum("hij,ihd->jhd", left, right).unflatten(1, heads).sum(2).to(key.dtype)
    return grads


@pytest.fixture(autouse=True)
def library(monkeypatch):
    torch.manual_seed(0)
    if INTERPRETED:
        monkeypatch.setattr(flash, "own_forward", own_forward)
        monkeypatch.setattr(flash, "own_backward", own_backward)


def call(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, *opts, prompt_rows=0, longest=None):
    is_causal, scale, window, _, prefix_in_window, _ = opts
    return flash.prefix_attention(
        *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index),
        *(is_causal, scale, window, prefix_in_window, prompt_rows, longest),
    )


CASES = [  # lengths, heads, kv_heads, features, prefix, entries, options
    (RAGGED, 3, 1, 64, 17, 3, dict(is_causal=True)),
    (RAGGED, 2, 2, 16, 40, 2, dict(window=9, prefix_in_window=True)),
    (RAGGED, 4, 2, 16, 20, 1, dict(is_causal=True, window=4, prefix_in_window=True)),
    (RAGGED, 2, 1, 32, 5, 1, dict(window=3)),
    ([9, 20], 2, 1, 16, 0, 1, dict(is_causal=True)),
    ([0, 0], 2, 1, 16, 3, 2, dict()),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    *shape, chosen = case
    args, opts = inputs(*shape, dtype=dtype), options(shape[3], **chosen)
    grad = torch.randn_like(args[0])
    exact, plain = (run(reference.prefix_attention, args, opts, grad, kind) for kind in (torch.float64, dtype))
    got = run(call, args, opts, grad, dtype)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert_within_budget(got, exact, plain, dtype)


def test_a_prefix_index_of_prompt_rows():
    """It can only name the one prefix there is; what lies behind it is not read."""
    leaves = [torch.randn(9, heads, 16, dtype=DTYPES[0], device=DEVICE).requires_grad_() for heads in (2, 1, 1)]
    nothing = torch.empty(1, 1, 0, 16, dtype=DTYPES[0], device=DEVICE)
    bounds = torch.tensor([0, 4, 5], dtype=torch.int32, device=DEVICE)
    index = torch.tensor([0, 0, 7], device=DEVICE)[:2]
    settings = options(16, is_causal=True)
    outs = [
        call(*leaves, nothing, nothing, bounds, each, *settings, prompt_rows=4, longest=4)[0] for each in (None, index)
    ]
    grads = [torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in outs]
    assert torch.equal(*outs) and all(map(torch.equal, *grads))


def test_prompt_rows():
    """The prompt's rows attend to themselves among the segments, and get the gradient of the prefix besides."""
    lengths, prompt = [9, 0, 33], 20
    args, dtype = inputs([prompt + sum(lengths)], 4, 2, dtype=DTYPES[0]), DTYPES[0]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    grad, nothing, opts = torch.randn_like(args[0]), args[3][:, :, :0], options(is_causal=True)

    def ours(*leaves):
        return call(*leaves, nothing, nothing, cu_seqlens, None, *opts, prompt_rows=prompt, longest=33)

    def theirs(*leaves):
        return prefix_attention(
            *(*leaves, None, None, cu_seqlens),
            **dict(prompt_rows=prompt, is_causal=True, return_lse=True, backend="reference"),
        )

    def both(function, kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in args[:3]]
        out, lse = function(*leaves)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))]

    exact, plain, got = both(theirs, torch.float64), both(theirs, dtype), both(ours, dtype)
    for name, result, want, baseline in zip(("out", "lse", *NAMES), got, exact, plain, strict=False):
        error, plain_error = ((x.double() - want).abs().max() for x in (result, baseline))
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * want.abs().max(), name


@pytest.mark.parametrize("trains", [("prefix_key",), ("query",), ("value", "prefix_value")], ids="-".join)
def test_only_what_is_needed_is_computed(trains, monkeypatch):
    args, opts = inputs([5, 3], entries=2, dtype=DTYPES[0]), options(is_causal=True)
    grad = torch.randn_like(args[0])
    whole = run(call, args, opts, grad, DTYPES[0])
    if trains == ("prefix_key",):
        monkeypatch.setattr(flash, "own_backward", None)
    if "query" not in trains:
        monkeypatch.setattr(triton_launches.backward_kernels, "query_kernel", None)
    got = run(call, args, opts, grad, DTYPES[0], trains)
    for name, result, want in zip(NAMES, got[2:], whole[2:], strict=True):
        if name in trains:
            torch.testing.assert_close(result, want)
        else:
            assert result is None


@pytest.mark.parametrize(
    "chosen", [dict(), dict(is_causal=True), dict(is_causal=True, window=7), dict(window=7)], ids=str
)
def test_the_library_takes_what_it_is_handed(chosen, monkeypatch):
    monkeypatch.undo()
    query, key = (torch.empty(11, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (6, 2))
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    opts = triton_launches.Options(*options(64, **chosen), 0)
    out, lse = flash.own_forward(query, key, key, bounds, 9, opts)
    assert out.shape == query.shape and lse.shape == (6, 11) and lse.dtype == torch.float32
    grads = flash.own_backward(out, query, key, key, out, lse, bounds, 9, opts)
    assert [x.shape for x in grads] == [query.shape, key.shape, key.shape]


def test_opcheck():
    args = inputs([3, 0, 2], entries=2, prefix=2, dtype=DTYPES[0])
    for x in args[:5]:
        x.requires_grad_()
    kinds = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(flash._prefix_attention, (*args, True, 0.25, 3, True, 0, 3), test_utils=kinds)


def test_long_segments_are_its_own(monkeypatch):
    module = sys.modules["fastprompt.ops.prefix_attention"]
    monkeypatch.setattr(flash, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1000, 8, 64))
    long, short = (torch.zeros(n, dtype=torch.int32) for n in (3, 5))
    assert module._mean_is_long(query, long) and not module._mean_is_long(query, short)
    choose, few = partial(module._choose, relative_bias=None, cu_seqlens_k=None), torch.empty(0)
    assert choose(None, query, None, 0.0, True) == choose("flash", query, None, 0.0, False) == "flash"
    assert choose(None, query, None, 0.0, False) == choose(None, query, 5.0, 0.0, True) == "triton"
    for other in (dict(dtype=torch.float32), dict(shape=(1000, 8, 60))):
        assert choose(None, SimpleNamespace(**{**vars(query), **other}), None, 0.0, True) == "triton"
    for name in "relative_bias", "cu_seqlens_k":
        assert choose(None, query, None, 0.0, True, **{name: few}) == "triton"
        assert choose("triton", query, None, 0.0, True, **{name: few}) == "triton"
        for backend in "flash", "native":
            with pytest.raises(ValueError, match=f"'{backend}' has no {name} on cuda; 'triton' and 'reference' have"):
                choose(backend, query, None, 0.0, True, **{name: few})


def test_what_is_refused():
    args = [x.cpu() for x in inputs([5, 3])[:6]]
    with pytest.raises(ValueError, match="max_seqlen must be at least the longest segment's 5 rows, got 4"):
        prefix_attention(*args, max_seqlen=4, backend="reference")
    with pytest.raises(TypeError, match="max_seqlen must be an integer, got 5.0"):
        prefix_attention(*args, max_seqlen=5.0)
    with pytest.raises(ValueError, match="backend 'flash' computes in bfloat16 or float16"):
        prefix_attention(*args, backend="flash")
    with pytest.raises(ValueError, match="backend 'flash' needs no softcap"):
        prefix_attention(*args, softcap=3.0, backend="flash")
    with pytest.raises(ValueError, match="backend 'flash' needs tensors on an NVIDIA GPU"):
        prefix_attention(*(x.half() for x in args[:5]), args[5], backend="flash")
