"""segment_mean, segment_first and segment_last, forward and backward.

The rivals get what they need ready-made (the segment of each row, lengths, masks, indices), the padded ones also their
padded batch: no conversion is timed.
    index_add       sums by torch.index_add, over the lengths
    segment_reduce  torch.segment_reduce
    index           hidden[indices], for first and last
    masked          (padded * mask).sum(1) over the lengths
    bmm             1 / length, 0 for pads, times padded, as a batched matrix product
"""

from itertools import accumulate

import torch
from torch import Tensor

from fastprompt.ops import segment_first, segment_last, segment_mean

from .case import OURS, Case, Work

SHAPES = {  # segments, longest, ragged, width
    "sentences-384": (32, 40, True, 384),
    "sentences-768": (32, 40, True, 768),
    "passages-1024": (8, 384, False, 1024),
    "one-long": (1, 8192, False, 768),
}
FUNCTIONS = {"mean": segment_mean, "first": segment_first, "last": segment_last}
RIVALS = {"mean": ("index_add", "segment_reduce", "masked", "bmm"), "first": ("index",), "last": ("index",)}


def cases() -> list[Case]:
    return [_case(pool, label) for pool in FUNCTIONS for label in SHAPES]


def _case(pool: str, label: str) -> Case:
    segments, longest, ragged, width = SHAPES[label]
    # 20 to 40 rows, 30 on average, where the longest is 40
    lengths = [longest - (n * 7 % (longest // 2 + 1) if ragged else 0) for n in range(segments)]
    return Case(
        group="pooling",
        label=f"{pool}-{label}",
        sizes={"B": segments, "L": longest, "D": width},
        make=lambda device, dtype, seed: Batch(pool, lengths, width, device, dtype, seed).work(),
        quick=label == "sentences-384" and pool == "mean",
    )


class Batch:
    """One problem as packed rows and as a padded batch, with what the rivals need ready-made."""

    def __init__(self, pool: str, lengths: list[int], width: int, device: str, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        self.name, self.rows = pool, lengths
        self.hidden = torch.randn(sum(lengths), width, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(len(lengths), width, device=device).to(dtype)
        self.cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        self.padded = self._pad(self.hidden.detach()).requires_grad_()
        self.lengths = torch.tensor(lengths, device=device)
        self.owner = torch.arange(len(lengths), device=device).repeat_interleave(self.lengths)
        self.mask = (torch.arange(max(lengths), device=device) < self.lengths[:, None]).to(dtype)[
            ..., None
        ]  # (B, L, 1)
        self.weights = (self.mask / self.lengths[:, None, None]).mT.contiguous()  # (B, 1, L)
        self.index = self.cu_seqlens[:-1].long() if pool == "first" else self.cu_seqlens[1:].long() - 1

    def work(self) -> Work:
        names = [OURS, *RIVALS[self.name], "reference (ours)"]
        ways = {name: lambda way=name: self.step(way) for name in names}
        rows = len(self.hidden) + (len(self.hidden) if self.name == "mean" else len(self.grad))
        elements = (rows + 2 * len(self.grad)) * self.hidden.shape[1]
        return Work(ways, self.exact, 0, elements, self.hidden.nbytes + self.grad.nbytes)

    def _pad(self, x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(x.split(self.rows), batch_first=True)

    def pool(self, way: str) -> Tensor:
        match way:
            case "index_add":
                return torch.zeros_like(self.grad).index_add(0, self.owner, self.hidden) / self.lengths[:, None]
            case "segment_reduce":
                return torch.segment_reduce(self.hidden, "mean", lengths=self.lengths, initial=0, unsafe=True)
            case "index":
                return self.hidden[self.index]
            case "masked":
                return (self.padded * self.mask).sum(1) / self.lengths[:, None]
            case "bmm":
                return torch.bmm(self.weights, self.padded)[:, 0]
        backend = None if way == OURS else "reference"
        return FUNCTIONS[self.name](self.hidden, self.cu_seqlens, backend=backend)

    def step(self, way: str) -> list[Tensor]:
        pooled = self.pool(way)
        leaf = self.padded if way in ("masked", "bmm") else self.hidden
        return [pooled, *torch.autograd.grad(pooled, leaf, self.grad)]

    def exact(self, way: str) -> list[Tensor]:
        """Pooled rows and the gradient of what was pooled, by a loop."""
        pooled, grad = self.grad.double(), self.hidden.detach().double().zero_()
        bounds = self.cu_seqlens.tolist()
        for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            own = {"mean": slice(begin, end), "first": slice(begin, begin + 1), "last": slice(end - 1, end)}[self.name]
            pooled[b] = self.hidden[own].detach().double().mean(0)
            grad[own] = self.grad[b].double() / len(grad[own])
        return [pooled, self._pad(grad) if way in ("masked", "bmm") else grad]
