"""gated in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    accumulate = torch.promote_types(gate.dtype, torch.float32)
    x = gate.to(accumulate)
    active = F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")
    return (active * up.to(accumulate)).to(gate.dtype)
