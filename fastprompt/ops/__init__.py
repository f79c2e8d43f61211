"""Functional operators. Each folder holds the function with its checks, the reference, and the faster paths."""

from .alignment import alignment_loss
from .linear_cross_entropy import linear_cross_entropy
from .pack_prompt import pack_prompt
from .prefix_attention import prefix_attention
from .segment_pool import segment_first, segment_last, segment_mean

__all__ = [
    "alignment_loss",
    "linear_cross_entropy",
    "pack_prompt",
    "prefix_attention",
    "segment_first",
    "segment_last",
    "segment_mean",
]
