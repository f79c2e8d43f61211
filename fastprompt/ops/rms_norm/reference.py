"""rms_norm in plain PyTorch."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    accumulate = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(accumulate)
    factor = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * factor * (offset + weight.to(accumulate))).to(x.dtype)
