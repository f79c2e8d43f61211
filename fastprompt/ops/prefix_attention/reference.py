"""Prefix attention in plain PyTorch, one segment after the other: the formula every faster path is held to."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops._checks import is_fake


def visible(
    rows: int, prefix: int, is_causal: bool, window: int | None, prefix_in_window: bool, device: torch.device
) -> Tensor:
    """(rows, prefix + rows) bool: which positions, the prefix at -P..-1 and the segment from 0, row i attends to."""
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(-prefix, rows, device=device)[None, :]
    seen = torch.ones(rows, prefix + rows, dtype=torch.bool, device=device)
    if is_causal:
        seen &= j <= i
    if window is not None:
        inside = i - j < window if is_causal else (i - j).abs() <= window
        seen &= inside if prefix_in_window else inside | (j < 0)
    return seen


def biases(relative_bias: Tensor, rows: int, prefix: int) -> Tensor:
    """(H, rows, prefix + rows): what each score of a segment gets, by the distance from query to key."""
    i = torch.arange(rows, device=relative_bias.device)[:, None]
    j = torch.arange(-prefix, rows, device=relative_bias.device)[None, :]
    columns = relative_bias.shape[1]
    return relative_bias[:, (j - i + columns // 2).clamp(0, columns - 1)]


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix_in_window: bool,
    dropout_p: float,
    relative_bias: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    accumulate = torch.promote_types(query.dtype, torch.float32)
    # Without any segment all five inputs still have a gradient, of zero.
    nothing = sum(x[:0].sum() for x in (key, value, prefix_key, prefix_value))
    if is_fake(query):  # the bounds have no values: all that there is are shapes, and what the output depends on
        return query + nothing, query.new_empty(query.shape[:2], dtype=accumulate)
    outputs, lses = [query[:0] + nothing], [query.new_empty((0, query.shape[1]), dtype=accumulate)]
    which = [0] * (len(cu_seqlens) - 1) if prefix_index is None else prefix_index.tolist()
    bounds = cu_seqlens.tolist()
    key_bounds = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for n, (begin, end), own in zip(which, pairwise(bounds), pairwise(key_bounds), strict=True):
        q, own = query[begin:end], slice(*own)  # (L, H, D)
        k = torch.cat([prefix_key[n].transpose(0, 1), key[own]]).repeat_interleave(group, 1)  # (P + Lk, H, D)
        v = torch.cat([prefix_value[n].transpose(0, 1), value[own]]).repeat_interleave(group, 1)
        score = scale * torch.einsum("ihd,jhd->hij", q, k).to(accumulate)
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if relative_bias is not None:
            score = score + biases(relative_bias, end - begin, prefix_key.shape[2]).to(accumulate)
        if cu_seqlens_k is None:
            seen = visible(end - begin, prefix_key.shape[2], is_causal, window, prefix_in_window, query.device)
            score = score.masked_fill(~seen, -torch.inf)
        weight = F.dropout(score.softmax(-1), dropout_p).to(v.dtype)
        outputs.append(torch.einsum("hij,jhd->ihd", weight, v))
        lses.append(score.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(lses)
