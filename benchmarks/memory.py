"""Peak memory on the CPU, each way in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def in_process(script: str, *arguments) -> float:
    """What `script`, run with the arguments as JSON, prints: MiB."""
    # Memory from mmap goes back when it is freed: the high-water mark then is what was in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, json.dumps(arguments)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def high_water(step: Callable[[], object]) -> tuple[float, float]:
    """MiB resident before `step`, and at most during it."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    kept = step()  # what it returns counts
    most = _resident("VmHWM")
    del kept
    return before, most


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
