"""Packing: the valid tokens of a padded batch as one row of segments, and the way back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprompt.ops._checks import check_cu_seqlens


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch (B, L) stand when packed.

    Attributes:
        index: (T,) int64, each packed token's place in the flattened batch.
        cu_seqlens: (S+1,) int32 bounds of the segments; S is B, or more if the batch came packed.
        positions: (T,) int64, each token's place in its segment. A gap in the mask is counted, as the stock path does.
        shape: (B, L).
        longest: number of positions of the longest segment.
        left_padded: some sentence does not begin in the first column.
    """

    index: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    shape: tuple[int, int]
    longest: int
    left_padded: bool

    @classmethod
    def of_mask(cls, mask: Tensor) -> "Packing":
        """mask (B, L), nonzero where a token is; padding may stand on either side."""
        mask = mask != 0
        lengths = mask.sum(1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        index = mask.flatten().nonzero().squeeze(1)
        first = mask.int().argmax(1)  # (B,) the first valid token
        row = index // mask.shape[1]
        positions = index - row * mask.shape[1] - first[row]
        longest = int(positions.max()) + 1 if len(index) else 0
        return cls(index, cu_seqlens, positions, tuple(mask.shape), longest, bool(first.any()))

    @classmethod
    def of_positions(cls, position_ids: Tensor) -> "Packing":
        """position_ids (1, T) of a batch that came packed: a segment begins wherever they do not go up by one."""
        positions = position_ids[0].long()
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[1:] = positions.diff() != 1
        starts = begins.nonzero().squeeze(1)
        cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=len(positions)).to(torch.int32)
        index = torch.arange(len(positions), device=positions.device)
        inside = index - starts[begins.cumsum(0) - 1]
        longest = int(inside.max()) + 1 if len(index) else 0
        return cls(index, cu_seqlens, inside, tuple(position_ids.shape), longest, left_padded=False)

    @classmethod
    def of_bounds(cls, cu_seqlens: Tensor, tokens: int) -> "Packing":
        """cu_seqlens (S+1,) of a batch (1, T) that came packed, as DataCollatorWithFlattening's cu_seq_lens_q."""
        cu_seqlens = cu_seqlens.to(torch.int32)
        check_cu_seqlens(cu_seqlens, tokens)
        lengths, index = cu_seqlens.diff().long(), torch.arange(tokens, device=cu_seqlens.device)
        inside = index - cu_seqlens[:-1].long().repeat_interleave(lengths)
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(index, cu_seqlens, inside, (1, tokens), longest, left_padded=False)

    @property
    def segment(self) -> Tensor:
        """(T,) int64, the segment that each token is in."""
        lengths = self.cu_seqlens.diff().long()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    @property
    def first_rows(self) -> Tensor:
        """(S,) packed row of each segment's first token (an empty segment: of the next one's)."""
        return self.cu_seqlens[:-1].long().clamp(max=max(len(self.index) - 1, 0))

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zero where the batch is padded."""
        padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return padded.index_copy(0, self.index, packed).unflatten(0, self.shape)
