"""Soft prompts: the trained rows, and their view as keys and values."""

import torch
from torch import Tensor, nn


class Prompt(nn.Module):
    """P trained rows that stand before the input embeddings.

    Attributes:
        weight: (P, E) Parameter, begun at `initial`.
    """

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial.detach().clone())

    def forward(self) -> Tensor:
        """(P, E)."""
        return self.weight


class Prefix(nn.Module):
    """P trained keys and values in each of several layers.

    Attributes:
        weight: (P, layers * 2 * Hkv * D) Parameter in PEFT's order, k0, v0, k1, v1, ...; begun at `initial`.
        layers: the indices of the backbone's layers that it enters, ascending.
    """

    def __init__(self, initial: Tensor, layers: list[int], kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial.detach().clone())
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim

    def forward(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer index -> key and value, each (1, Hkv, P, D), views of the weight."""
        return self.split(self.weight.unsqueeze(0))

    def split(self, weights: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """weights (N, P, layers * 2 * Hkv * D) of N prefixes -> layer index -> key and value, (N, Hkv, P, D), views."""
        parts = weights.unflatten(2, (len(self.layers) * 2, self.kv_heads, self.head_dim))
        # One unbind, not a slice per layer: its backward puts all layers' gradients together in one pass.
        parts = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return {layer: (parts[2 * i], parts[2 * i + 1]) for i, layer in enumerate(self.layers)}


def join_prefix(keys_values: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Keys and values (Hkv, P, D) of each layer -> the weight (P, layers * 2 * Hkv * D) of a `Prefix`."""
    parts = torch.stack([part for pair in keys_values for part in pair])  # (2 * layers, Hkv, P, D)
    return parts.permute(2, 0, 1, 3).flatten(1)
