"""rotary in plain PyTorch."""

import torch
from torch import Tensor


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(query.dtype, torch.float32)
    half = query.shape[-1] // 2
    c, s = (x[:, None, :half].to(accumulate) for x in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(accumulate).split(half, -1)
        return torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)

    return rotate(query), rotate(key)
