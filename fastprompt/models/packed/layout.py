"""Where the rows of a packed pass stand: the valid tokens of a padded batch as one row of segments, prompts among them.

All of it happens on the host, in NumPy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastprompt.ops._checks import check_bounds

from ..families import Geometry

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
        max_labels: of a batch that was filled up to a shape: the labels that its plan has room for. None: its shape is
            its own, and so is its plan's.
    """

    index: np.ndarray
    cu_seqlens: np.ndarray
    positions: np.ndarray
    shape: tuple[int, int]
    left_padded: bool = False
    position_ids: np.ndarray | None = None
    labelled: np.ndarray | None = None
    max_labels: int | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> "Packing":
        """The packing of samples of those lengths that share a single row without padding."""
        bounds = np.cumsum([0, *lengths], dtype=np.int32)
        places = np.arange(bounds[-1])
        return cls(places, bounds, places - np.repeat(bounds[:-1], lengths), (1, len(places)))

    @classmethod
    def filled_up(cls, lengths: Sequence[int], tokens: int, samples: int, max_labels: int) -> "Packing":
        """As `of_lengths`, with padding up to a number of tokens: `samples` + 1 segments, whatever there is of either.

        Padding is spread over the segments that no sample takes: one long segment would cost the square in attention.
        Each of its tokens is at position 0: no table is too short for it.
        """
        padding, places = tokens - sum(lengths), samples + 1 - len(lengths)
        each = np.full(places, padding // places) + (np.arange(places) < padding % places)
        packing = cls.of_lengths([*lengths, *each])
        positions = np.where(packing.segment < len(lengths), packing.positions, 0)
        return replace(packing, positions=positions, max_labels=max_labels)

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


@dataclass(frozen=True)
class PromptRows:
    """The rows that prompts have in a packed pass, beside the tokens'.

    Attributes:
        num_prompts, length: N prompts that segments read, and rows of each; 0 and 0 without any.
        is_leading: they stand once before all segments, as in causal models; or else each segment begins with the rows
            of its prompt.
        has_prefix: the prompts have prefixes as well.
        token_offset: what is added to the tokens' positions.
    """

    num_prompts: int
    length: int
    is_leading: bool
    has_prefix: bool
    token_offset: int

    @property
    def leading(self) -> tuple[int, int]:
        """Prompts, and rows of each, that stand once before all segments."""
        return (self.num_prompts, self.length) if self.is_leading else (0, 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pass needs of a batch beside its tensors: arrays of integers on the host, or tensors on a device.

    Attributes:
        positions: (R,) int64, of all rows.
        cu_seqlens: (S+1,) int32 bounds of the segments among the tokens.
        cu_seqlens_rows: the same with the prompt rows that stand in each segment; None: none do.
        token_rows: (T,) int64, the tokens' places among the rows; None: they follow the leading prompts.
        index: (T,) int64, the tokens' places in the flattened batch; None: it is packed as it is.
        prompt_index: (S,) which prompt each segment reads; None: the first.
        leading_bounds, leading_index: (N+1,) int32 and (N,), bounds and numbers of the leading prompts; None: there is
            one at most, without a prefix.
        first_rows: (S,) int64, the row that stands for each segment where a first one is pooled; None: none is.
        targets, predictors, ends: what `CausalHead.planned` says.
    """

    positions: np.ndarray | Tensor
    cu_seqlens: np.ndarray | Tensor
    cu_seqlens_rows: np.ndarray | Tensor | None = None
    token_rows: np.ndarray | Tensor | None = None
    index: np.ndarray | Tensor | None = None
    prompt_index: np.ndarray | Tensor | None = None
    leading_bounds: np.ndarray | Tensor | None = None
    leading_index: np.ndarray | Tensor | None = None
    first_rows: np.ndarray | Tensor | None = None
    targets: np.ndarray | Tensor | None = None
    predictors: np.ndarray | Tensor | None = None
    ends: np.ndarray | Tensor | None = None

    @classmethod
    def of(
        cls,
        packing: Packing,
        rows: PromptRows,
        geometry: Geometry,
        prompt_index: np.ndarray | None = None,
        pools: str | None = None,
        of_head: dict[str, np.ndarray] | None = None,
    ) -> "Plan":
        """The plan of a batch, on the host.

        Args:
            packing: the batch.
            rows: of prompts.
            geometry: the backbone's.
            prompt_index: (S,) which prompt each segment reads; None: the first.
            pools: "text" or "prompt", whose first row stands for a segment; None: none is asked for.
            of_head: what `CausalHead.planned` gave.

        Raises:
            ValueError: the backbone has no such positions.
        """
        positions = _positions(packing, geometry, rows.token_offset)
        first, length, leading = geometry.first_position, rows.length, rows.leading
        planned, begins, token_rows = dict(of_head or {}), packing.cu_seqlens, None
        if leading[1]:  # at the positions before the text's
            last = rows.token_offset + first
            positions = np.concatenate([np.tile(np.arange(last - length, last), leading[0]), positions])
            if rows.num_prompts > 1 or rows.has_prefix:
                planned["leading_bounds"] = np.arange(0, rows.num_prompts * length + 1, length, dtype=np.int32)
                planned["leading_index"] = np.arange(rows.num_prompts)
        elif length:  # in every segment, at positions 0..P-1
            begins = begins + length * np.arange(packing.segments + 1)
            token_rows = np.arange(len(packing.index)) + (packing.segment + 1) * length
            whole = np.empty(begins[-1], dtype=np.int64)
            whole[begins[:-1, None] + np.arange(length)] = np.arange(length) + first
            whole[token_rows] = positions
            positions = whole
            planned |= {"cu_seqlens_rows": begins.astype(np.int32), "token_rows": token_rows}
        if pools == "prompt":
            planned["first_rows"] = begins[:-1].astype(np.int64)
        elif pools is not None:
            firsts = packing.first_rows
            planned["first_rows"] = firsts + math.prod(leading) if token_rows is None else token_rows[firsts]
        index = None if packing.in_place else packing.index
        return cls(positions, packing.cu_seqlens, index=index, prompt_index=prompt_index, **planned)

    def to(self, device: torch.device) -> "Plan":
        """The plan on a device, in one copy that the host does not wait for."""
        return self.within(self.pinned(device).to(device, non_blocking=True))

    def pinned(self, device: torch.device) -> Tensor:
        """Its bytes, on the host, ready to be copied to a device."""
        data = np.concatenate([np.ascontiguousarray(array).view(np.uint8) for array in self._arrays().values()])
        return torch.tensor(data, device="cpu", pin_memory=device.type == "cuda")

    def within(self, data: Tensor) -> "Plan":
        """The plan in tensors that are parts of `data`, its bytes on a device."""
        arrays = self._arrays()
        parts = zip(arrays.items(), data.split([array.nbytes for array in arrays.values()]), strict=True)
        return Plan(**{name: part.view(getattr(torch, array.dtype.name)) for (name, array), part in parts})

    @property
    def shapes(self) -> tuple:
        """Of its arrays, with their names and types."""
        return tuple((name, array.shape, array.dtype.name) for name, array in self._arrays().items())

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {name: array for name, array in vars(self).items() if array is not None}
        return dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # each begins where its type may


def _positions(packing: Packing, geometry: Geometry, offset: int) -> np.ndarray:
    """(T,) the tokens' positions as the backbone counts them, plus an offset."""
    first, longest, positions = geometry.first_position, packing.longest, packing.position_ids
    if positions is None or not len(positions):
        positions = packing.positions + first
    else:
        if first:  # a table with an offset: positions may be counted with it, or from 0 as collators do
            begins = positions[packing.positions == 0]
            if (begins == 0).all():
                positions = positions + first
            elif not (begins == first).all():
                raise ValueError(
                    f"position_ids must begin every sample at {first}, as the backbone's own do, or every one at "
                    f"0, got {sorted(set(begins.tolist()))}"
                )
        longest = positions.max() + 1 - first
        if geometry.positions is not None and positions.min() < 0:
            raise ValueError(f"position_ids must not be negative, got {positions.min()}")
    table = geometry.positions
    if table is not None and longest + offset > table:
        raise ValueError(
            f"input_ids must have at most {table - offset} tokens a sentence: the position table has "
            f"{table} rows and the prompt takes {offset}, got {longest}"
        )
    return positions + offset


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


def tensor_on(values: Sequence | np.ndarray, device: str | torch.device) -> Tensor:
    """A tensor of numbers, brought to a device by a copy that the host does not wait for."""
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, device="cpu", pin_memory=pinned).to(device, non_blocking=True)


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
