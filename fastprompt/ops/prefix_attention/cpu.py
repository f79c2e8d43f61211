"""Prefix attention on the CPU through PyTorch's own flash kernels, in two parts.

Softmax splits over disjoint sets of keys: the rows of the segments and the rows of the prefix are attended to apart,
and merged by their log-sum-exp. The prefix part is one call over the rows of all segments, so the prefix is neither
expanded nor concatenated, and its gradient comes out summed over the batch. The backward of either part with the
*merged* output and log-sum-exp gives the exact gradients.
"""

from itertools import groupby, pairwise

import torch
from torch import Tensor

from fastprompt.ops._autograd import once_differentiable
from fastprompt.ops._checks import check_cu_seqlens, check_indices

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _features_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()  # the kernels take no other


def _dense(x: Tensor, batch: int = 1) -> Tensor:
    """(T, H, D) -> (batch, H, T / batch, D), a view where features are contiguous."""
    return _features_contiguous(x).unflatten(0, (batch, -1)).transpose(1, 2)


def _segment_parts(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, is_causal: bool, window: int | None, like: Tensor):
    """Yields (rows, keys, count, is_causal, mask): runs of `count` neighbours of the same lengths, one call each."""
    begin = key_begin = 0
    lengths, key_lengths = (
        [end - begin for begin, end in pairwise(bounds.tolist())]
        for bounds in (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)
    )
    for (length, key_length), run in groupby(zip(lengths, key_lengths, strict=True)):
        count = len(list(run))
        rows = slice(begin, begin := begin + count * length)
        keys = slice(key_begin, key_begin := key_begin + count * key_length)
        if length == 0 or key_length == 0:
            continue
        mask = None
        if window is not None and length > (window if is_causal else window + 1):  # else the window cuts nothing
            i = torch.arange(length)
            distance = i[:, None] - i[None, :]
            hidden = (distance < 0) | (distance >= window) if is_causal else distance.abs() > window
            mask = like.new_zeros(length, length).masked_fill_(hidden, -torch.inf)
        yield rows, keys, count, is_causal and mask is None, mask


def _prefix_parts(
    cu_seqlens: Tensor, prefix_index: Tensor | None, prefix: int, is_causal: bool, window: int | None, like: Tensor
):
    """Yields (n, rows, mask): the rows that read prefix n, and which of it a window over the prefix leaves them."""
    lengths = cu_seqlens.diff().long()
    reader = torch.zeros(0) if prefix_index is None else prefix_index.long().repeat_interleave(lengths)  # (T,)
    entries = [0] if prefix_index is None else reader.unique().tolist()
    for n in entries:
        rows = slice(None) if len(entries) == 1 else (reader == n).nonzero().squeeze(1)
        mask = None
        if window is not None:
            position = (torch.arange(len(like)) - cu_seqlens[:-1].long().repeat_interleave(lengths))[rows]  # in segment
            distance = position[:, None] - torch.arange(-prefix, 0)[None, :]
            hidden = distance >= window if is_causal else distance > window
            if hidden.any():
                mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        yield n, rows, mask


@torch.library.custom_op("fastprompt::prefix_attention_cpu", mutates_args=(), device_types="cpu")
def _prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    prefix_in_window: bool,
) -> tuple[Tensor, Tensor]:
    check_cu_seqlens(cu_seqlens, len(query))  # again: torch.compile does not read values
    if prefix_index is not None:
        check_indices(prefix_index, len(prefix_key), "prefix_index")
    out, lse = _outputs(query)
    if cu_seqlens_k is not None:  # a segment may have no keys
        check_cu_seqlens(cu_seqlens_k, len(key), argument="cu_seqlens_k")
        out.zero_(), lse.fill_(-torch.inf)
    for rows, keys, count, causal, mask in _segment_parts(cu_seqlens, cu_seqlens_k, is_causal, window, query):
        q, k, v = (_dense(x, count) for x in (query[rows], key[keys], value[keys]))
        part, part_lse = _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        out[rows] = part.transpose(1, 2).flatten(0, 1)
        lse[rows] = part_lse.transpose(1, 2).flatten(0, 1)
    prefix = prefix_key.shape[2]
    if prefix == 0 or len(query) == 0:
        return out, lse
    prefix_window = window if prefix_in_window else None
    for n, rows, mask in _prefix_parts(cu_seqlens, prefix_index, prefix, is_causal, prefix_window, query):
        k, v = (_features_contiguous(x[n : n + 1]) for x in (prefix_key, prefix_value))
        part, part_lse = _forward(_dense(query[rows]), k, v, 0.0, False, attn_mask=mask, scale=scale)
        part, part_lse = part[0].transpose(0, 1), part_lse[0].transpose(0, 1)  # (rows, H, D), (rows, H)
        if mask is not None:  # the kernel's log-sum-exp of no keys at all is 0
            part_lse = part_lse.masked_fill((mask == -torch.inf).all(1, keepdim=True), -torch.inf)
        segment_lse = lse[rows]
        merged = torch.logaddexp(segment_lse, part_lse)
        out[rows] = (
            out[rows] * (segment_lse - merged).exp().unsqueeze(-1) + part * (part_lse - merged).exp().unsqueeze(-1)
        ).to(out.dtype)
        lse[rows] = merged
    return out, lse


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """out (T, H, D), log-sum-exp (T, H), not yet filled."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=accumulate)


@_prefix_attention.register_fake
def _(query, *_):
    return _outputs(query)


@torch.library.custom_op("fastprompt::prefix_attention_cpu_backward", mutates_args=(), device_types="cpu")
def _prefix_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    prefix_in_window: bool,
    segments_need: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients; those of query, key and value are empty unless `segments_need`."""
    grad = grad.contiguous()  # a loss that is a plain sum expands one number
    grads = _gradients(query, key, value, prefix_key, prefix_value, segments_need)
    grad_query, _, _, grad_prefix_key, grad_prefix_value = grads
    if segments_need:
        if cu_seqlens_k is not None:  # a segment may have no rows, or no keys
            for whole in grads[:3]:
                whole.zero_()
        for rows, keys, count, causal, mask in _segment_parts(cu_seqlens, cu_seqlens_k, is_causal, window, query):
            do, q, o = (_dense(x[rows], count) for x in (grad, query, out))
            k, v = (_dense(x[keys], count) for x in (key, value))
            part_lse = lse[rows].unflatten(0, (count, -1)).transpose(1, 2)
            parts = _backward(do, q, k, v, o, part_lse, 0.0, causal, attn_mask=mask, scale=scale)
            for whole, where, part in zip(grads[:3], (rows, keys, keys), parts, strict=True):
                whole[where] = part.transpose(1, 2).flatten(0, 1)
    grad_prefix_key.zero_()  # an entry of the bank that nobody reads has zero gradient
    grad_prefix_value.zero_()
    prefix = prefix_key.shape[2]
    if prefix == 0 or len(query) == 0:
        return grads
    prefix_window = window if prefix_in_window else None
    for n, rows, mask in _prefix_parts(cu_seqlens, prefix_index, prefix, is_causal, prefix_window, query):
        do, q, o = (_dense(x[rows]) for x in (grad, query, out))
        k, v = (_features_contiguous(x[n : n + 1]) for x in (prefix_key, prefix_value))
        part_lse = lse[rows].T.unsqueeze(0)
        dq, dk, dv = _backward(do, q, k, v, o, part_lse, 0.0, False, attn_mask=mask, scale=scale)
        grad_prefix_key[n], grad_prefix_value[n] = dk[0], dv[0]
        if segments_need:
            grad_query[rows] += dq[0].transpose(0, 1)
    return grads


def _gradients(query, key, value, prefix_key, prefix_value, segments_need: bool) -> tuple[Tensor, ...]:
    def like(x: Tensor, wanted: bool) -> Tensor:
        return x.new_empty(x.shape if wanted else (0,))

    segments = tuple(like(x, segments_need) for x in (query, key, value))
    return *segments, like(prefix_key, True), like(prefix_value, True)


@_prefix_attention_backward.register_fake
def _(grad, query, key, value, prefix_key, prefix_value, *others):
    return _gradients(query, key, value, prefix_key, prefix_value, others[-1])


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, prefix_key, prefix_value, *bounds = inputs[:8]
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, prefix_key, prefix_value, *output, *bounds)


def _backward_formula(ctx, grad_out, grad_lse):
    segments_need = any(ctx.needs_input_grad[:3])
    grads = _prefix_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options, segments_need)
    wanted = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:5], strict=True)]
    return *wanted, *[None] * 7


_prefix_attention.register_autograd(
    once_differentiable("prefix_attention", _backward_formula), setup_context=_setup_context
)

prefix_attention = _prefix_attention
