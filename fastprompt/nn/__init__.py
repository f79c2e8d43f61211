"""Modules: what a training script swaps in."""

from .alignment import AlignmentLoss
from .attention import PrefixAttention
from .encoders import LSTMEncoder, MLPEncoder, PrefixEncoder
from .prompts import Prefix, Prompt

__all__ = ["AlignmentLoss", "LSTMEncoder", "MLPEncoder", "Prefix", "PrefixAttention", "PrefixEncoder", "Prompt"]
