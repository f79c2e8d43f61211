"""rotary in plain PyTorch."""

import torch
from torch import Tensor


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(query.dtype, torch.float32)
    half = query.shape[-1] // 2
    c, s = (x[:, None, :half].to(accumulate) for x in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        x, dtype = x.to(accumulate), x.dtype
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * c - second * s, second * c + first * s], -1).to(dtype)

    return rotate(query), rotate(key)
