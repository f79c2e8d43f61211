"""Timing in turns: on a shared machine only what ran side by side can be compared."""

import statistics
import time
from collections.abc import Callable

import torch


def in_turns(ways: dict[str, Callable[[], object]], turns: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each way, `turns` of them, the ways taking turns. Each is run once before."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, turns):
        for name, way in ways.items():
            _synchronize(device)
            begin = time.perf_counter()
            way()
            _synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the ratios turn by turn: above 1, ours is faster."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def matrix_rate(device: str = "cpu", size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of torch's own square matrix product here and now: the best of several."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = in_turns({"mm": lambda: torch.mm(a, b)}, 9, device)["mm"]
    return 2 * size**3 / min(seconds)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
