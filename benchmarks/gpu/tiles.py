"""Tile sizes of the Triton attention kernels: each kernel's own seconds under a few, on three shapes."""

import functools
from collections.abc import Callable

import torch

from fastprompt.bench.attention import Batch, Shape
from fastprompt.bench.case import dtype_of
from fastprompt.ops._triton import block_of
from fastprompt.ops.prefix_attention import triton_launches as launches

from . import kernels
from .records import DEVICE

SHAPES = [
    Shape(8, 384, True, 32, 64, 9, 3, True),
    Shape(16, 512, True, 32, 128, 24, 8, True),
    Shape(8, 128, True, 100, 256, 4, 1, True),
]
RUNS = {  # entry of the table -> the kernels that take it
    "forward": ("forward_kernel",),
    "query": ("query_kernel",),
    "columns": ("key_value_kernel", "prefix_kernel"),
}
TILES = [
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (64, 128, 8, 2),
    (64, 32, 4, 3),
    (32, 32, 4, 1),
]
if DEVICE == "cpu":
    SHAPES, TILES = [Shape(2, 9, True, 4, 16, 2, 1, True)], [(16, 16, 4, 1)]


def cases() -> dict[str, Callable[[], dict]]:
    return {f"{kernel} {shape.label}": functools.partial(sweep, kernel, shape) for shape in SHAPES for kernel in RUNS}


def sweep(kernel: str, shape: Shape, repeat: int = 5) -> dict:
    """Microseconds by (rows, columns, warps, stages); the first is what the package takes."""
    dtype = dtype_of(DEVICE)
    batch = Batch(shape, DEVICE, dtype, 0)
    tables = launches.FLOAT32_CONFIGURATIONS if dtype == torch.float32 else launches.CONFIGURATIONS
    table, head = tables[kernel], max(64, block_of(shape.dim))
    now, found, errors = table[head], {}, {}
    try:
        for tile in dict.fromkeys([now, *TILES]):
            table[head] = tile
            try:
                ran = kernels.profiled(lambda: batch.ours("triton"), repeat)
            except Exception as error:  # too much shared memory, say
                if "CUDA error" in str(error):
                    raise
                errors[str(tile)] = f"{type(error).__name__}: {error}"[:150]
                continue
            mine = {each.name: each.seconds * 1e6 for each in ran if each.name in RUNS[kernel]}
            found[str(tile)] = {name: round(spent, 2) for name, spent in mine.items()}
    finally:
        table[head] = now
    totals = {tile: sum(parts.values()) for tile, parts in found.items() if parts}
    if not totals:  # on a CPU the interpreter launches nothing
        return {"microseconds": found, "errors": errors}
    best = min(totals, key=totals.get)
    says = f"{totals.get(str(now), float('nan')):.1f} us with {now}, {totals[best]:.1f} with {best}"
    return {"microseconds": found, "errors": errors, "says": says}
