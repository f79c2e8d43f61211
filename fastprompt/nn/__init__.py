"""Modules: what a training script swaps in."""

from .alignment import AlignmentLoss
from .prompts import Prefix, Prompt

__all__ = ["AlignmentLoss", "Prefix", "Prompt"]
