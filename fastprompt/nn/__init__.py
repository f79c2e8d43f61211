"""Modules: what a training script swaps in."""

from .adapter import Adapter
from .alignment import AlignmentLoss
from .attention import PrefixAttention
from .encoders import LSTMEncoder, MLPEncoder, PrefixEncoder
from .prompts import Prefix, Prompt

__all__ = [
    "Adapter",
    "AlignmentLoss",
    "LSTMEncoder",
    "MLPEncoder",
    "Prefix",
    "PrefixAttention",
    "PrefixEncoder",
    "Prompt",
]
