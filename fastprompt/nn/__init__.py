"""Modules: what a training script swaps in."""

from .alignment import AlignmentLoss
from .attention import PrefixAttention
from .prompts import Prefix, Prompt

__all__ = ["AlignmentLoss", "Prefix", "PrefixAttention", "Prompt"]
