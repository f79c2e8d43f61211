"""Case and Work: what is measured, and on which inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

OURS = "ours"


@dataclass
class Work:
    """One set of inputs, and the ways to do the same with it.

    Attributes:
        ways: name -> a function that does the work once, forward and backward, and returns tensors. OURS is one of
            them, a name that ends in "(ours)" is another backend of our own, the others are rivals.
        exact: way -> what it must return, computed in float64 by plain PyTorch.
        flops: that any way must do.
        elements: tensor entries that any way must read from or write to memory.
        input_bytes: of what is read; says how many sets of inputs it takes to fill the cache.
        missing: rival -> why it is not among `ways`.
        checked: the same without dropout, where `ways` have some: held to `exact` in their place.
    """

    ways: dict[str, Callable[[], Sequence[Tensor]]]
    exact: Callable[[str], Sequence[Tensor]]
    flops: int
    elements: int
    input_bytes: float
    missing: dict[str, str] = field(default_factory=dict)
    checked: dict[str, Callable[[], Sequence[Tensor]]] | None = None


@dataclass(frozen=True)
class Case:
    """One line of the benchmark.

    Attributes:
        group: "attention", "alignment", ...
        label: tells it from others of its group.
        sizes: what its cost depends on: B segments, L rows of the longest, P prompt rows, N rows, D features, ...
        make: (device, dtype, seed) -> Work with fresh random inputs.
        tolerance: largest error allowed to a way, of the largest exact entry, by dtype; above it the way has no time.
        quick: whether --quick runs it.
        sweep: of `sizes`, the one that grows while the others stay: for the fitted exponents.
        memory: ways whose peak of memory is measured too.
    """

    group: str
    label: str
    sizes: dict[str, int]
    make: Callable[[str, torch.dtype, int], Work]
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: {torch.float32: 1e-5, torch.bfloat16: 3e-2})
    quick: bool = False
    sweep: str | None = None
    memory: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.group}/{self.label}"


def dtype_of(device: str) -> torch.dtype:
    """What the cases are computed in on a device: as one would train there."""
    return torch.float32 if device == "cpu" else torch.bfloat16
