"""Peak memory of one way: by the allocator on a GPU, on the CPU by the high-water mark of a process of its own.

python -m fastprompt.bench.memory NAME WAY      prints two numbers, bytes
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .case import Case, dtype_of


def peak_bytes(case: Case, way: str, device: str) -> tuple[int, int]:
    """Most bytes during one run of a way: beyond what was there before it (results count), and in all.

    Raises:
        RuntimeError: the process failed; the message has the end of what it printed.
    """
    if device == "cuda":
        return _in_allocator(case, way)
    # Memory from mmap goes back when it is freed: the high-water mark then is what was in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "fastprompt.bench.memory", case.name, way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peak memory of {case.name}, {way}: {done.stderr[-2000:]}")
    beyond, total = done.stdout.split()[-2:]
    return int(beyond), int(total)


def _in_allocator(case: Case, way: str) -> tuple[int, int]:
    run = case.make("cuda", dtype_of("cuda"), 0).ways[way]
    run()  # what is set up once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    return most - before, most


def high_water(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes resident at most during `run` beyond those before it, and in all. Linux only."""
    run()  # what is set up once
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    kept = run()  # what it returns counts
    most = _resident("VmHWM")
    del kept
    return most - before, most


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _main() -> None:
    from .registry import find

    name, way = sys.argv[1:]
    print(*high_water(find(name).make("cpu", dtype_of("cpu"), 0).ways[way]))


if __name__ == "__main__":
    _main()
