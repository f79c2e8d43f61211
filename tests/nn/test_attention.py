"""nn.PrefixAttention: packed, dense and padded input agree, and equal plain attention over [prefix; text]."""

import pytest
import torch
import torch.nn.functional as F

from fastprompt.nn import PrefixAttention


def rows(*shape):
    return [torch.randn(*shape, h, 16, dtype=torch.float64).requires_grad_() for h in (6, 2, 2)]


def module(**options) -> PrefixAttention:
    return PrefixAttention(6, 2, 16, 5, init_scale=1.0, **options).double()


def test_dense_is_attention_over_prefix_and_text():
    attention, (query, key, value) = module(num_prefixes=3), rows(4, 9)
    which = torch.tensor([2, 0, 1, 2])
    got = attention(query, key, value, prefix_index=which)
    key, value = (
        torch.cat([p[which], x.transpose(1, 2)], 2)
        for p, x in ((attention.prefix_key, key), (attention.prefix_value, value))
    )
    want = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, enable_gqa=True).transpose(1, 2)
    leaves, grad = [*attention.parameters(), query], torch.randn_like(got)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_packed_agree(side):
    attention, tensors, bias = module(is_causal=True, window=4), rows(3, 7), torch.randn(6, 9)
    lengths = torch.tensor([7, 0, 3])
    mask = torch.arange(7) < lengths[:, None]
    mask = mask.flip(1) if side == "left" else mask
    padded = attention(*tensors, attention_mask=mask, relative_bias=bias)
    cu_seqlens = torch.tensor([0, 7, 7, 10], dtype=torch.int32)
    packed = attention(*(x[mask] for x in tensors), cu_seqlens=cu_seqlens, relative_bias=bias)
    torch.testing.assert_close(padded[mask], packed)
    assert not padded[~mask].any()


def test_cross_attention():
    attention, (query, *_), (_, *memory) = module(), rows(5), rows(9)
    bounds, bounds_k = torch.tensor([[0, 2, 5], [0, 9, 9]], dtype=torch.int32)
    got = attention(query, *memory, cu_seqlens=bounds, cu_seqlens_k=bounds_k)
    first = attention(query[:2], *memory, cu_seqlens=bounds[:2], cu_seqlens_k=bounds_k[:2])
    alone = attention(query[2:], *(x[:0] for x in memory), cu_seqlens=bounds[1:] - 2, cu_seqlens_k=bounds_k[1:] - 9)
    torch.testing.assert_close(got, torch.cat([first, alone]))
    with pytest.raises(ValueError, match="cu_seqlens_k needs cu_seqlens"):
        attention(*rows(2, 5), cu_seqlens_k=bounds_k)


def test_dropout_is_for_training_only():
    attention, tensors = module(dropout_p=0.5), rows(1, 9)
    assert not torch.equal(attention(*tensors), attention(*tensors))
    attention.eval()
    assert torch.equal(attention(*tensors), attention(*tensors))


def test_half_precision_around_a_float32_prefix():
    attention = PrefixAttention(6, 2, 16, 5)
    out = attention(*(x.bfloat16() for x in rows(2, 9)))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and attention.prefix_key.grad.dtype == torch.float32
    assert repr(attention) == "PrefixAttention(6, 2, 16, 5, num_prefixes=1)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrefixAttention(6, 4, 16, 5), "heads must be a multiple of kv_heads, got 6 and 4"),
        (lambda: PrefixAttention(6, 2, 16, -1), "num_virtual_tokens must be 0 or more .* got -1 and 1"),
        (lambda: module()(*rows(9)), r"query must be \(T, H, D\) with cu_seqlens .* got \(9, 6, 16\)"),
        (lambda: module()(*rows(2, 9)[::-1]), "query must have 6 heads, got 2"),
        (lambda: module()(*rows(2, 9), attention_mask=torch.ones(2, 8)), r"attention_mask must be \(2, 9\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
