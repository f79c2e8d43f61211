"""Functional operators. Each folder holds the function with its checks, the reference, and the faster paths."""

from .alignment import alignment_loss
from .pack_prompt import pack_prompt
from .prefix_attention import prefix_attention

__all__ = ["alignment_loss", "pack_prompt", "prefix_attention"]
