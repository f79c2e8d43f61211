"""What a training job says of itself, the same for ours and for the stock one of the demo."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

WARMUP_STEPS = 3  # left out of the time of a step: allocator and thread pools are still settling


def seconds_per_step(seconds: Sequence[float]) -> float:
    """Median of the steps' seconds, without the first few where there are more."""
    return statistics.median(seconds[WARMUP_STEPS:] or seconds)


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MiB; NaN where /proc does not tell."""
    # Not getrusage: its figure is inherited from the process that started this one.
    status = Path("/proc/self/status")
    found = status.is_file() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(found[1]) / 1024 if found else float("nan")
