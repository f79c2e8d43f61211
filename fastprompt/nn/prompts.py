"""Soft prompts: the trained rows, and their view as keys and values."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prompt(nn.Module):
    """P trained rows that stand before the input embeddings.

    Args:
        initial: (P, E) what the weight begins at.
        encoder: makes the rows of the weight, (P, E) -> (P, E); see `fastprompt.nn.MLPEncoder`. None: they are it.
        dropout: probability with which an element of the rows is dropped (and the rest scaled up) in training; one draw
            a call, so the same for all samples of a batch.

    Attributes:
        weight: (P, E) Parameter.
    """

    def __init__(self, initial: Tensor, encoder: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial.detach().clone())
        self.encoder, self.dropout = encoder, dropout

    def encoded(self) -> Tensor:
        """The rows without dropout."""
        return self.weight if self.encoder is None else self.encoder(self.weight)

    def rows(self) -> Tensor:
        """The rows, in training with dropout."""
        return F.dropout(self.encoded(), self.dropout, self.training)

    def forward(self) -> Tensor:
        """(P, E)."""
        return self.rows()


class Prefix(Prompt):
    """P trained keys and values in each of several layers: rows (P, layers * 2 * Hkv * D), in PEFT's order k0, v0, ...

    Args:
        initial: (P, layers * 2 * Hkv * D), or with an encoder what it takes.
        layers: the indices of the backbone's layers that it enters, ascending.
        kv_heads, head_dim: Hkv and D.
        encoder, dropout: as in `Prompt`; see `fastprompt.nn.PrefixEncoder`.

    Attributes:
        weight: a Parameter, as initial.
    """

    def __init__(
        self,
        initial: Tensor,
        layers: list[int],
        kv_heads: int,
        head_dim: int,
        encoder: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(initial, encoder, dropout)
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim

    def forward(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer index -> key and value, each (1, Hkv, P, D), views of the rows."""
        return self.split(self.rows().unsqueeze(0))

    def split(self, rows: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """rows (N, P, layers * 2 * Hkv * D) of N prefixes -> layer index -> key and value, (N, Hkv, P, D), views."""
        parts = rows.unflatten(2, (len(self.layers) * 2, self.kv_heads, self.head_dim))
        # One unbind, not a slice per layer: its backward puts all layers' gradients together in one pass.
        parts = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return {layer: (parts[2 * i], parts[2 * i + 1]) for i, layer in enumerate(self.layers)}


def join_prefix(keys_values: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Keys and values (Hkv, P, D) of each layer -> the rows (P, layers * 2 * Hkv * D) of a `Prefix`."""
    parts = torch.stack([part for pair in keys_values for part in pair])  # (2 * layers, Hkv, P, D)
    return parts.permute(2, 0, 1, 3).flatten(1)
