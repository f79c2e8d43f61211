"""Adapter: a residual bottleneck."""

import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """y = x + W_up gelu(W_down x + b_down) + b_up: the adapter of Houlsby et al., Parameter-Efficient Transfer Learning
    for NLP (ICML 2019, figure 2). W_up and b_up begin at zero, so that it begins as the identity.

    Args:
        width: features D of the rows.
        size: features of the bottleneck.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        if width < 1 or size < 1:
            raise ValueError(f"width and size must be positive, got {width} and {size}")
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (..., D) -> (..., D), of the dtype of rows."""
        # The weights are kept in float32 where the backbone runs in less.
        down, up = ((linear.weight.to(rows.dtype), linear.bias.to(rows.dtype)) for linear in (self.down, self.up))
        return rows + F.linear(F.gelu(F.linear(rows, *down)), *up)
