"""Seconds of several ways, taken in turns: on a shared machine only what ran side by side can be compared."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Way = Callable[[], object]

FEWEST, MOST = 7, 201  # turns
GPU_HERTZ = 2e9  # for the length of the backlog; a slower clock makes it longer


class Interval(NamedTuple):
    """A median, and between which two of the values it lies with 95 % confidence."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Median and its 95 % interval by order statistics: no distribution is assumed.

    With fewer than six values the two outermost are less than 95 % sure; they are given all the same.
    """
    ordered, n = sorted(values), len(values)
    # The number of values below the true median is binomial (n, 1/2). The largest rank with P(below < rank) <= 2.5 %.
    rank, below = 0, 0.0
    while rank < n // 2 and (below := below + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    rank = max(rank, 1)
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])


def ratio_interval(theirs: Sequence[float], ours: Sequence[float]) -> Interval:
    """Median of the ratios turn by turn, above 1 where ours is faster."""
    return median_interval([t / o for t, o in zip(theirs, ours, strict=True)])


def in_turns(sets: Sequence[dict[str, Way]], device: str, budget: float, width: float = 0.02) -> dict[str, list[float]]:
    """Seconds of each way.

    Args:
        sets: the same ways on several sets of inputs, which take turns: none finds its inputs in the cache.
        device: "cpu" or "cuda". There time is the GPU's own, by events, with a backlog of work before each way so that
            launching is not what is timed.
        budget: stop after so many seconds, but not before FEWEST turns.
        width: stop when all medians are known to this part of them, up or down.
    """
    for ways in sets:
        for way in ways.values():
            way()
    timer = _cpu_seconds if device == "cpu" else _gpu_timer(sets[0])
    seconds: dict[str, list[float]] = {name: [] for name in sets[0]}
    begin = time.perf_counter()
    for turn in range(MOST):
        ways, names = sets[turn % len(sets)], list(seconds)
        random.shuffle(names)  # whom one follows matters: a large product leaves cold caches to the next
        for name in names:
            seconds[name].append(timer(name, ways[name]))
        if (turn + 1) % FEWEST:  # to stop as soon as the interval happens to be narrow would make it less sure
            continue
        spent = time.perf_counter() - begin
        if spent > budget or all(_known(each, width) for each in seconds.values()):
            break
    return seconds


def _known(values: Sequence[float], width: float) -> bool:
    median, low, high = median_interval(values)
    return high - median <= width * median and median - low <= width * median


def _cpu_seconds(name: str, way: Way) -> float:
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def _gpu_timer(ways: dict[str, Way]) -> Callable[[str, Way], float]:
    cycles = {name: int(2 * GPU_HERTZ * launch_seconds(way)) for name, way in ways.items()}

    def seconds(name: str, way: Way) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles[name])
        begin.record()
        way()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def launch_seconds(way: Way) -> float:
    """Seconds that the CPU takes to launch a way on a GPU: the median of several."""
    values = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        way()
        values.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(values)


def as_graph(way: Way) -> Way:
    """`way` captured in a CUDA graph; its replay.

    Raises:
        RuntimeError: it does what cannot be captured, such as reading a number back from the GPU.
    """
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            way()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    return graph.replay


def square_product(device: str, dtype: torch.dtype) -> tuple[Way, int]:
    """torch's own product of two square matrices, large enough for its full rate; and its FLOPs."""
    size = 1024 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return lambda: torch.mm(a, b), 2 * size**3


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of torch's own matrix product here and now: the best of several."""
    product, flops = square_product(device, dtype)
    return flops / _best(product, device)


def memory_rate(device: str) -> float:
    """Bytes per second that a copy of what no cache holds reads and writes: the best of several."""
    source = torch.zeros(2**26 if device == "cpu" else 2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(way: Way, device: str) -> float:
    return min(in_turns([{"": way}], device, budget=0.0)[""])
