"""Pooling of packed segments in plain PyTorch."""

import torch
from torch import Tensor


def segment_pool(hidden: Tensor, cu_seqlens: Tensor, take: int) -> Tensor:
    """(T, E) -> (B, E): the mean of each segment's rows (take 0), its first (1) or its last (-1); zeros of none."""
    lengths = cu_seqlens.diff()[:, None]
    if take and len(hidden):
        chosen = cu_seqlens[:-1] if take > 0 else cu_seqlens[1:] - 1
        chosen = chosen.clamp(0, len(hidden) - 1)  # where an empty segment points beyond the rows
        return hidden.index_select(0, chosen).masked_fill(lengths == 0, 0)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    owner = torch.repeat_interleave(lengths[:, 0], output_size=len(hidden))  # (T,) segment of each row
    sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=accumulate)
    sums = sums.index_add(0, owner, hidden.to(accumulate))
    return (sums / lengths.clamp(min=1)).to(hidden.dtype)
