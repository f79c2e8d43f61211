"""One vector a sentence, from padded rows, packed rows, or vectors as they are."""

import torch
from torch import Tensor

from fastprompt.ops import segment_first, segment_last, segment_mean

POOLINGS = {"mean": segment_mean, "first": segment_first, "last": segment_last}


def check_pooling(pooling: str) -> None:
    """Raise a ValueError unless `pooling` is one of POOLINGS."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {tuple(POOLINGS)}, got {pooling!r}")


def pool(hidden: Tensor, pooling: str, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Vectors (B, D) of B sentences.

    Args:
        hidden: (B, L, D) padded rows, (T, D) packed rows with `cu_seqlens`, or (B, D) vectors, which are returned.
        pooling: the "mean" of a sentence's rows, its "first" row or its "last". A sentence without rows gives zeros.
        mask: (B, L) of padded rows, nonzero where a token is, on either side; None if there is no padding. What stands
            elsewhere is not read: it may be NaN.
        cu_seqlens: (B+1,) int32 bounds of packed rows.

    Raises:
        ValueError: an argument that does not fit.
    """
    check_pooling(pooling)
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("mask must be None with cu_seqlens: packed rows have no padding")
        return POOLINGS[pooling](hidden, cu_seqlens)
    if hidden.ndim != 3:
        if mask is not None:
            raise ValueError(f"mask needs padded rows (B, L, D), got {tuple(hidden.shape)}")
        return hidden
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    elif mask.shape != hidden.shape[:2]:
        raise ValueError(f"mask must be {tuple(hidden.shape[:2])}, as the rows are, got {tuple(mask.shape)}")
    present = mask != 0
    if pooling == "mean":
        total = hidden.masked_fill(~present.unsqueeze(-1), 0).sum(1)
        return total / present.sum(1, keepdim=True).clamp(min=1)
    order = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    rank = present * (order if pooling == "last" else order.flip(0))  # largest at the row that is wanted
    row = rank.argmax(1)
    chosen = hidden[torch.arange(len(hidden), device=hidden.device), row]
    return chosen.masked_fill(~present.any(1, keepdim=True), 0)
