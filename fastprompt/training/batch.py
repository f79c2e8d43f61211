"""What one step runs on: inputs packed on the host, and where among their tokens the alignment looks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastprompt.tasks.base import Aligned, Item

from .collator import PackingCollator


@dataclass(frozen=True)
class Batch:
    """One process's part of a step.

    Attributes:
        inputs: the inputs of a packed pass, as `PackingCollator` makes them: first those of the task's items, then
            those of the alignment.
        bounds: where the tokens of each input begin in the packed row, and where the last ones end: B + 1 numbers.
        items: the task's items.
        share: the factor of the task's sum of losses that makes the mean over all processes the loss.
        parts: the places of the aligned tokens in the packed row, part after part, and the parts' bounds, (N+1,) int32;
            None where nothing is aligned.
        teacher: (N, D) vectors of the parts' English sentences.
        row_weight: (N,) weights of the parts; None for equal ones.
        weight: the weight of the alignment loss.
        states: (T, D) hidden states of the tokens that enter the first layer with a prefix, from the cache, or None.
    """

    inputs: dict
    bounds: list[int]
    items: Sequence[Item] = ()
    share: float = 0.0
    parts: tuple[Tensor, Tensor] | None = None
    teacher: Tensor | None = None
    row_weight: Tensor | None = None
    weight: float = 1.0
    states: Tensor | None = None

    def _each(self, change) -> "Batch":
        def of(value):
            return change(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            inputs={name: of(value) for name, value in self.inputs.items()},
            parts=None if self.parts is None else tuple(map(of, self.parts)),
            **{name: of(getattr(self, name)) for name in ("teacher", "row_weight", "states")},
        )

    def to(self, device: str | torch.device) -> "Batch":
        """The same on a device; nothing waits for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU reads by itself; a DataLoader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())


class Collator:
    """Packs items, and those of the alignment, into a `Batch`.

    Args:
        token_types: the backbone tells the first of two texts from the second.
        shapes: `max_tokens` and `max_samples` of `PackingCollator`, where every batch is to have one of a few shapes.
    """

    def __init__(self, token_types: bool, **shapes) -> None:
        self.token_types, self.pack = token_types, PackingCollator(None, **shapes)

    def __call__(self, items: Sequence[Item], aligned: Sequence[Aligned] = (), **more) -> Batch:
        """The batch of the task's items and the alignment's; `more` are fields of `Batch`, taken as they are."""
        whole = [*items, *(each.item for each in aligned)]
        features = [{"input_ids": item.ids} for item in whole]
        for feature, item in zip(features, whole, strict=True) if self.token_types else ():
            feature["token_type_ids"] = (np.arange(len(item.ids)) >= item.second).astype(np.int64)
        bounds = [0, *accumulate(len(item.ids) for item in whole)]
        parts = None
        if aligned:
            starts = bounds[len(items) :]
            spans = [
                (start + begin, start + end)
                for start, each in zip(starts, aligned, strict=False)
                for begin, end, _ in each.parts
            ]
            rows = np.concatenate([np.arange(*span) for span in spans])
            cu_seqlens = np.cumsum([0, *(end - begin for begin, end in spans)], dtype=np.int32)
            parts = torch.from_numpy(rows), torch.from_numpy(cu_seqlens)
        return Batch(self.pack(features), bounds, items, parts=parts, **more)
