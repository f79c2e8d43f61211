"""Packing: the valid tokens of a padded batch as one row of segments. All of it happens on the host, in NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastprompt.ops._checks import check_bounds

NO_LABEL = -100


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a batch (B, L) stand when packed.

    Its arrays are the host's: it passes unchanged through what moves a batch to a device, so that a batch packed by
    `fastprompt.training.PackingCollator` takes its own along.

    Attributes:
        index: (T,) int64, each packed token's place in the flattened batch.
        cu_seqlens: (S+1,) int32 bounds of the segments; S is B, or more if the batch came packed.
        positions: (T,) int64, each token's place in its segment. A gap in the mask is counted, as the stock path does.
        shape: (B, L).
        left_padded: some sentence does not begin in the first column.
        position_ids: (T,) int64, the positions that the caller gave; None: none.
        labelled: ascending, the packed tokens with a next-token label; None: nobody has looked.
    """

    index: np.ndarray
    cu_seqlens: np.ndarray
    positions: np.ndarray
    shape: tuple[int, int]
    left_padded: bool = False
    position_ids: np.ndarray | None = None
    labelled: np.ndarray | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> "Packing":
        """The packing of samples of those lengths that share a single row without padding."""
        bounds = np.cumsum([0, *lengths], dtype=np.int32)
        places = np.arange(bounds[-1])
        return cls(places, bounds, places - np.repeat(bounds[:-1], lengths), (1, len(places)))

    @classmethod
    def of_batch(
        cls,
        shape: tuple[int, int],
        mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        cu_seqlens: np.ndarray | None = None,
        seq_idx: np.ndarray | None = None,
    ) -> "Packing":
        """The packing of a batch (B, L) whose rows hold one sample each, or several that came packed.

        Several are told by cu_seqlens or seq_idx or, without these, by position_ids that begin anew. What is given must
        agree.

        Args:
            shape: (B, L).
            mask: (B, L), nonzero where a token is; padding may stand anywhere. None: everywhere.
            position_ids: (B or 1, L). Steps up by more than one are taken for gaps in one sample only where the caller
                gave a mask: without one transformers takes them for the next sample.
            cu_seqlens: (S+1,) bounds of the samples in a single row without padding, as DataCollatorWithFlattening's
                cu_seq_lens_q. Samples may be empty.
            seq_idx: (B or 1, L), which sample each token is of.

        Raises:
            ValueError: samples that cannot be told apart, or that are told in ways which contradict each other.
        """
        masked, mask = mask is not None, np.ones(shape, dtype=bool) if mask is None else mask != 0
        index = np.flatnonzero(mask)
        bounds = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)  # of the batch's rows
        row, column = np.divmod(index, max(shape[1], 1))
        if cu_seqlens is not None:
            if shape[0] != 1 or len(index) != shape[1]:
                raise ValueError(
                    f"cu_seq_lens_q is for a batch of one row without padding, got {shape} with {len(index)} tokens"
                )
            bounds = cu_seqlens.astype(np.int32)
            check_bounds(bounds.tolist(), len(index))
        own, sample = (
            None if ids is None else np.broadcast_to(ids, shape).reshape(-1)[index].astype(np.int64)
            for ids in (position_ids, seq_idx)
        )
        if sample is not None or own is not None:
            begins = None
            if cu_seqlens is not None:
                begins = np.zeros(len(index), dtype=bool)
                begins[bounds[:-1][np.diff(bounds) > 0]] = True
            begins = _begins(row, column, own, sample, begins, masked)
            if cu_seqlens is None:
                inside = np.flatnonzero(begins & _follows(row))
                bounds = np.sort(np.concatenate([bounds, inside])).astype(np.int32)
        positions = column - column[np.repeat(bounds[:-1], np.diff(bounds))]
        left_padded = bool((mask.any(1) & ~mask[:, :1].any(1)).any())
        return cls(index, bounds, positions, tuple(shape), left_padded, own)

    @property
    def segments(self) -> int:
        """S."""
        return len(self.cu_seqlens) - 1

    @property
    def segment(self) -> np.ndarray:
        """(T,) the segment that each token is in."""
        return np.repeat(np.arange(self.segments), np.diff(self.cu_seqlens))

    @property
    def longest(self) -> int:
        """Number of positions of the longest segment."""
        return int(self.positions.max()) + 1 if len(self.positions) else 0

    @property
    def first_rows(self) -> np.ndarray:
        """(S,) packed row of each segment's first token (an empty segment: of the next one's)."""
        return self.cu_seqlens[:-1].clip(max=max(len(self.index) - 1, 0)).astype(np.int64)

    @property
    def came_packed(self) -> bool:
        """Some row of the batch holds several samples."""
        return self.segments != self.shape[0]

    @property
    def in_place(self) -> bool:
        """There is no padding: the flattened batch is packed as it is."""
        return len(self.index) == self.shape[0] * self.shape[1]


def read(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The values of tensors of integers or booleans: the one place where a step waits for its device, once for all."""
    values = {}
    for device in {tensor.device for tensor in tensors.values()}:
        here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        flat = [
            x.detach().reshape(-1).to(torch.float64 if x.is_floating_point() else torch.int64) for x in here.values()
        ]
        parts = np.split(torch.cat(flat).cpu().numpy(), np.cumsum([len(x) for x in flat])[:-1])
        values |= {name: part.reshape(x.shape) for (name, x), part in zip(here.items(), parts, strict=True)}
    return values


def to_device(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays (N,) of integers, brought to a device in one copy that the host does not wait for."""
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # each begins where its type may
    data = np.concatenate([np.ascontiguousarray(array).view(np.uint8) for array in arrays.values()])
    pinned = torch.tensor(data, device="cpu", pin_memory=device.type == "cuda")
    parts = pinned.to(device, non_blocking=True).split([array.nbytes for array in arrays.values()])
    return {
        name: part.view(getattr(torch, array.dtype.name))
        for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


def _follows(row: np.ndarray) -> np.ndarray:
    """(T,) whether the token before each is of the same row of the batch."""
    same = row == np.roll(row, 1)
    same[:1] = False
    return same


def _begins(
    row: np.ndarray,
    column: np.ndarray,
    positions: np.ndarray | None,
    sample: np.ndarray | None,
    begins: np.ndarray | None,
    masked: bool,
) -> np.ndarray:
    """(T,) whether a sample begins at each token; all arguments are of the T tokens, `begins` what cu_seq_lens_q says.

    What is no step within a row, at the first token of each, says nothing.
    """
    within = _follows(row)
    if sample is not None:
        changes = ~within | (sample != np.roll(sample, 1))
        if begins is not None and not np.array_equal(begins, changes):
            raise ValueError("seq_idx must change where cu_seq_lens_q says that a sample begins, and nowhere else")
        begins = changes
    if positions is None:
        return begins
    step = positions - np.roll(positions, 1)
    if begins is not None:
        wrong = np.flatnonzero(within & np.where(begins, step == 1, step <= 0))
        if len(wrong):
            at = wrong[0]
            raise ValueError(
                "position_ids must begin anew where cu_seq_lens_q or seq_idx says that a sample begins, and nowhere "
                f"else, got {positions[at - 1]} and {positions[at]} at columns {column[at - 1]} and {column[at]}"
            )
        return begins
    leaps = np.flatnonzero(within & (step > 1))
    if not masked and len(leaps):
        at = leaps[0]
        raise ValueError(
            f"position_ids must go up by one or begin anew, got {positions[at - 1]} and {positions[at]} in "
            "neighbouring columns: give attention_mask if they are of one sample, cu_seq_lens_q or seq_idx if of two"
        )
    return ~within | (step <= 0)
