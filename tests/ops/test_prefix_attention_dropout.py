"""Dropout in the fused kernel: its mask, and the results given the mask."""

import itertools

import pytest
import torch
from test_prefix_attention import NAMES, attend, gradients, inputs, mapped, sums
from torch.utils.checkpoint import checkpoint

from fastprompt import _native
from fastprompt.ops import prefix_attention

pytestmark = pytest.mark.skipif(not _native.available("cpu"), reason=str(_native.why_not("cpu")))


def native(**args):
    return prefix_attention(**args, backend="native")


def kept(args, seed, run=native, **options):
    """(T, H, D) bool: whether each row's weights of keys 0, 1, ... are kept, prefix and own rows counted through.

    Key j's value is the j-th unit vector: there must be no more keys than features.
    """
    row, prefix = torch.arange(len(args["query"]), device=args["query"].device), args["prefix_key"].shape[2]
    unit = torch.eye(args["query"].shape[-1]).to(args["query"])
    bounds = args["cu_seqlens"].long()
    own = row - bounds[torch.searchsorted(bounds, row, right=True) - 1]
    args = mapped(args, torch.zeros_like)  # equal weights: the mask does not depend on them
    args["value"] = unit[prefix + own][:, None].expand(args["key"].shape)
    args["prefix_value"] = unit[:prefix].expand(args["prefix_key"].shape)
    torch.manual_seed(seed)
    return run(**args, **options) != 0


def expected(args, mask, dropout_p, **options):
    """The formula of the output with these weights kept."""
    outs = [[args["query"][:0, h]] for h in range(args["query"].shape[1])]
    for (rows, h, *_), (_, _, v, _), score in attend(args, **options):
        weight = score.softmax(-1) * mask[rows, h, : len(v)] / (1 - dropout_p)
        outs[h].append(weight.to(v.dtype) @ v)
    return torch.stack([torch.cat(parts) for parts in outs], 1)


def check_given_the_mask(args, dropout_p, run=native, **options):
    """Output and gradients, by the error that plain PyTorch makes with the same weights dropped."""
    masking = {name: x for name, x in options.items() if name not in ("softcap", "scale")}
    mask = kept(args, 7, run, dropout_p=dropout_p, **masking)
    torch.manual_seed(7)
    out = run(**args, dropout_p=dropout_p, **options)
    exact, grad = mapped(args, torch.Tensor.double), torch.randn_like(out)
    (want, *want_grads), (plain, *plain_grads), (got, *got_grads) = (
        (x, *gradients(x, leaves, grad.to(x.dtype)))
        for x, leaves in (
            (expected(exact, mask, dropout_p, **options), exact),
            (expected(args, mask, dropout_p, **options), args),
            (out, args),
        )
    )
    eps = torch.finfo(grad.dtype).eps
    magnitudes = sums(exact, grad.double(), slack=torch.finfo(torch.float32).eps / eps, **options)
    terms = (magnitudes[0], *magnitudes[2:])
    tensors = zip(("output", *NAMES), (got, *got_grads), (plain, *plain_grads), (want, *want_grads), terms, strict=True)
    for name, x, plainly, exactly, magnitude in tensors:
        error, plain_error = ((y.double() - exactly).abs().max() for y in (x, plainly))
        assert error <= 2 * plain_error + eps * magnitude.max() / (1 - dropout_p), name


@pytest.mark.parametrize("options", [
    dict(dropout_p=0.1), dict(dropout_p=0.5, is_causal=True), dict(dropout_p=0.9, window=5, prefix_in_window=True),
    dict(dropout_p=0.3, softcap=1.5, is_causal=True, window=9), dict(dropout_p=0.3, softcap=30.0, scale=-0.7),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_given_the_mask(dtype, options):
    check_given_the_mask(inputs([40, 0, 1, 33], prefix=20, features=60, heads=(4, 2), dtype=dtype), **options)


@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 0.9])
def test_weights_are_dropped_independently(dropout_p):
    segments, length, prefix, heads = 100, 24, 8, 4
    args = inputs([length] * segments, prefix, prefix + length, (heads, heads), dtype=torch.float32)
    masks = [kept(args, seed, dropout_p=dropout_p).double() - (1 - dropout_p) for seed in (0, 1)]
    variance, first = dropout_p * (1 - dropout_p), masks[0]  # (rows, heads, keys)
    pairs = [(first[:-n], first[n:]) for n in (1, 2, length)]  # rows, and the same row of the next segment
    pairs += [(first[:, :-n], first[:, n:]) for n in (1, 2)] + [(first[..., :-n], first[..., n:]) for n in (1, 2, 4, 8)]
    pairs += [(first[:-1, :, 1:], first[1:, :, :-1]), masks]
    for one, other in pairs:
        assert abs((one * other).mean()) < 5 * variance / one.numel() ** 0.5
    for dimensions in (0, 1), (0, 2), (1, 2):  # sums over rows, heads or keys are as those of independent weights
        total = first.sum(dimensions)
        assert total.abs().max() < 5.5 * (variance * first.numel() / total.numel()) ** 0.5
    for dimension in range(3):
        total = first.sum(dimension)
        assert abs(total.var() / (variance * first.shape[dimension]) - 1) < 5 * (2 / total.numel()) ** 0.5 + 0.02


@pytest.mark.parametrize("options", [{}, dict(is_causal=True, window=3)], ids=str)
def test_prompt_rows(options):
    args = inputs([3, 0, 9], prefix=0, features=24, heads=(4, 2), index=None, bank=1)
    query, key, value = leaves = [args[name] for name in NAMES[:3]]
    options = options | dict(is_causal=True, prompt_rows=4, dropout_p=0.4, backend="native")
    rest = None, None, torch.tensor([0, 3, 8], dtype=torch.int32)
    torch.manual_seed(3)
    out = prefix_attention(*leaves, *rest, **options)
    grads = torch.autograd.grad(out, leaves, grad := torch.randn_like(out))
    torch.testing.assert_close((value * grads[2]).sum(), (out * grad).sum())  # forward's mask: linear in the values
    own = torch.cat([torch.arange(4), torch.arange(3) + 4, torch.arange(5) + 4])
    torch.manual_seed(3)
    weights = prefix_attention(query, key, torch.eye(24).double()[own][:, None].expand_as(key), *rest, **options)
    segments = [(slice(0, 4), [*range(4)]), (slice(4, 7), [*range(7)]), (slice(7, 12), [*range(4), *range(7, 12)])]
    for rows, keys in segments:
        values = value[keys].repeat_interleave(2, 1)
        torch.testing.assert_close(out[rows], torch.einsum("ihj,jhd->ihd", weights[rows, :, : len(keys)], values))


def test_all_but_nothing_is_dropped():
    args = inputs([40, 3], prefix=5, features=8, heads=(2, 1), dtype=torch.float32)
    for dropout_p in 1e-12, 1 - 1e-12, 1 - 2**-53:
        out = prefix_attention(**args, dropout_p=dropout_p, backend="native")
        assert all(x.isfinite().all() for x in (out, *gradients(out, args, torch.ones_like(out))))
    assert not out.any()
    plain = prefix_attention(**args, backend="native")
    assert torch.equal(prefix_attention(**args, dropout_p=1e-12, backend="native"), plain)


def test_the_seed_is_a_draw_of_torch():
    """Eager, compiled and computed again by checkpoint: the same draw, one a call, of the default generator."""
    torch.compiler.reset()
    args = inputs([9, 5], prefix=3, heads=(4, 2), dtype=torch.float32)
    options = dict(is_causal=True, dropout_p=0.3, backend="native")
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")

    def again(**args):
        return checkpoint(lambda: prefix_attention(**args), use_reentrant=False)

    results = []
    for run in prefix_attention, compiled, again:
        torch.manual_seed(11)
        outs = [run(**args, **options) for _ in range(2)]
        assert not torch.equal(*outs)
        grads = [gradients(out, args, torch.ones_like(out)) for out in reversed(outs)]
        results.append([*outs, *itertools.chain(*grads), torch.rand(3)])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))
