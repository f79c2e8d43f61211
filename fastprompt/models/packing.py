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
    def of_batch(
        cls,
        mask: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        *,
        masked: bool = True,
    ) -> "Packing":
        """The packing of a batch (B, L) whose rows hold one sample each, or several that came packed.

        Several are told by cu_seqlens or seq_idx or, without these, by position_ids that begin anew. What is given must
        agree.

        Args:
            mask: (B, L), nonzero where a token is; padding may stand anywhere.
            position_ids: (B or 1, L). Steps up by more than one are taken for gaps in one sample only where the caller
                gave a mask: without one transformers takes them for the next sample.
            cu_seqlens: (S+1,) bounds of the samples in a single row without padding, as DataCollatorWithFlattening's
                cu_seq_lens_q. Samples may be empty.
            seq_idx: (B or 1, L), which sample each token is of.
            masked: whether the caller gave the mask.

        Raises:
            ValueError: samples that cannot be told apart, or that are told in ways which contradict each other.
        """
        mask = mask != 0
        index = mask.flatten().nonzero().squeeze(1)
        rows = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))  # bounds of the batch's rows
        column = index % max(mask.shape[1], 1)
        bounds = rows.to(torch.int32)
        if cu_seqlens is not None:
            if len(mask) != 1 or len(index) != mask.shape[1]:
                raise ValueError(
                    f"cu_seq_lens_q is for a batch of one row without padding, got {tuple(mask.shape)} with "
                    f"{len(index)} tokens"
                )
            bounds = cu_seqlens.to(torch.int32)
            check_cu_seqlens(bounds, len(index))
        own, sample = (
            None if ids is None else ids.expand(mask.shape).flatten()[index].long() for ids in (position_ids, seq_idx)
        )
        if sample is not None or own is not None:
            row, begins = index // max(mask.shape[1], 1), None
            if cu_seqlens is not None:
                begins = torch.zeros_like(index, dtype=torch.bool)
                begins[bounds[:-1][bounds.diff() > 0].long()] = True
            begins = _begins(row, column, own, sample, begins, masked)
            if cu_seqlens is None:
                inside = (begins & _follows(row)).nonzero().squeeze(1)
                bounds = torch.cat([rows, inside]).sort().values.to(torch.int32)
        segment = _segments(bounds)
        positions = column - column[bounds[:-1].long()[segment]]
        longest = int(positions.max()) + 1 if len(index) else 0
        left_padded = bool((mask.any(1) & ~mask[:, :1].any(1)).any())
        return cls(index, bounds, positions, tuple(mask.shape), longest, left_padded)

    @property
    def segment(self) -> Tensor:
        """(T,) int64, the segment that each token is in."""
        return _segments(self.cu_seqlens)

    @property
    def first_rows(self) -> Tensor:
        """(S,) packed row of each segment's first token (an empty segment: of the next one's)."""
        return self.cu_seqlens[:-1].long().clamp(max=max(len(self.index) - 1, 0))

    @property
    def came_packed(self) -> bool:
        """Some row of the batch holds several samples."""
        return len(self.cu_seqlens) - 1 != self.shape[0]

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zero where the batch is padded."""
        padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return padded.index_copy(0, self.index, packed).unflatten(0, self.shape)


def _segments(cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff().long()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def _follows(row: Tensor) -> Tensor:
    """(T,) whether the token before each is of the same row of the batch."""
    same = row == row.roll(1)
    same[:1] = False
    return same


def _begins(
    row: Tensor, column: Tensor, positions: Tensor | None, sample: Tensor | None, begins: Tensor | None, masked: bool
) -> Tensor:
    """(T,) whether a sample begins at each token; all arguments are of the T tokens, `begins` what cu_seq_lens_q says.

    What is no step within a row, at the first token of each, says nothing.
    """
    within = _follows(row)
    if sample is not None:
        changes = ~within | (sample != sample.roll(1))
        if begins is not None and not torch.equal(begins, changes):
            raise ValueError("seq_idx must change where cu_seq_lens_q says that a sample begins, and nowhere else")
        begins = changes
    if positions is None:
        return begins
    step = positions - positions.roll(1)
    if begins is not None:
        wrong = within & torch.where(begins, step == 1, step <= 0)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(
                "position_ids must begin anew where cu_seq_lens_q or seq_idx says that a sample begins, and nowhere "
                f"else, got {int(positions[at - 1])} and {int(positions[at])} at columns {int(column[at - 1])} and "
                f"{int(column[at])}"
            )
        return begins
    leaps = within & (step > 1)
    if not masked and leaps.any():
        at = int(leaps.nonzero()[0])
        raise ValueError(
            f"position_ids must go up by one or begin anew, got {int(positions[at - 1])} and {int(positions[at])} in "
            "neighbouring columns: give attention_mask if they are of one sample, cu_seq_lens_q or seq_idx if of two"
        )
    return ~within | (step <= 0)
