"""measure: one case, checked and then timed."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from .case import OURS, Case, Work, dtype_of
from .machine import cache_bytes
from .memory import peak_bytes
from .timing import Way, as_graph, in_turns, launch_seconds, median_interval, ratio_interval, square_product

PRODUCT = "square product"
SETS = 16  # of inputs, at most, however small they are


def measure(
    case: Case, device: str, *, budget: float = 3.0, memory: bool = True, memory_rate: float = math.inf
) -> dict:
    """Check each way against the exact result, time those that are right in turns, and measure their memory.

    Args:
        budget: seconds of timing, beyond the fewest turns there must be.
        memory: whether to measure the peak of `case.memory`.
        memory_rate: bytes per second to and from memory, for the floor.

    Returns:
        What `fastprompt.bench.records` describes. If ours is wrong no way has a time; a rival that is wrong has none.
    """
    dtype = dtype_of(device)
    record = {
        "name": case.name,
        "group": case.group,
        "sizes": case.sizes,
        "sweep": case.sweep,
    }
    torch.compiler.reset()
    works = [case.make(device, dtype, 0)]
    errors, failed = _errors(works[0])
    record |= {"flops": works[0].flops, "bytes": works[0].elements * dtype.itemsize}
    record["missing"] = works[0].missing | failed
    record["wrong"] = {name: error for name, error in errors.items() if not error <= case.tolerance[dtype]}
    record["ways"] = {}
    if OURS in record["wrong"]:
        return record
    sets = math.ceil(2 * cache_bytes(device) / works[0].input_bytes)  # none finds its inputs in the cache
    works += [case.make(device, dtype, seed) for seed in range(1, min(SETS, sets))]
    right = [name for name in errors if name not in record["wrong"]]
    # The machine's own rate is taken in the same turns: what slows us then slows it as well.
    product, flops = square_product(device, dtype)
    turns = [{name: work.ways[name] for name in right} | {PRODUCT: product} for work in works]
    seconds = in_turns(turns, device, budget)
    rate = flops / statistics.median(seconds.pop(PRODUCT))
    record["sets"] = len(works)
    record["matrix_gflops"] = round(rate / 1e9, 1)
    record["floor_seconds"] = max(works[0].flops / rate, record["bytes"] / memory_rate)
    for name in right:
        way = record["ways"][name] = {"seconds": median_interval(seconds[name])._asdict(), "turns": len(seconds[name])}
        way["error"] = errors[name]
        if name != OURS:
            way["over_ours"] = ratio_interval(seconds[name], seconds[OURS])._asdict()
        if device == "cuda":
            way |= _launched(works[0].ways[name])
    del works, turns
    for name in case.memory if memory else ():
        if name in right:
            beyond, total = peak_bytes(case, name, device)
            record["ways"][name] |= {"peak_bytes": beyond, "resident_bytes": total}
    return record


def _errors(work: Work) -> tuple[dict[str, float], dict[str, str]]:
    """Of each way, the largest error of an entry over the largest exact entry of its tensor; why a rival failed."""
    errors, failed = {}, {}
    for name, way in (work.checked or work.ways).items():
        try:
            errors[name] = _error(way(), work.exact(name))
        except Exception as error:  # whatever a rival raises: the others can still be measured
            if name == OURS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return errors, failed


def _error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    worst = 0.0
    for one, want in zip(got, exact, strict=True):
        if want.numel():
            largest = want.abs().max().clamp(min=torch.finfo(want.dtype).tiny)
            error = ((one.detach().double() - want).abs().max() / largest).item()
            worst = error if math.isnan(error) else max(worst, error)
            if math.isnan(worst):
                break
    return worst


def _launched(way: Way) -> dict:
    """On a GPU also: seconds the CPU takes to launch it, and the GPU's seconds when it is replayed from a graph."""
    found: dict = {"launch_seconds": launch_seconds(way)}
    try:
        replay = as_graph(way)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return found | {"graph": str(error).splitlines()[0]}
    return found | {"graph_seconds": median_interval(in_turns([{"": replay}], "cuda", 0.2)[""])._asdict()}
