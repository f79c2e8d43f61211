"""compute-sanitizer over the smoke's kernels, and Nsight Compute on the two slowest kernels of attention."""

import csv
import functools
import os
import shutil
import subprocess
import sys
from collections import Counter

from . import smoke
from .records import DEVICE, OUT, PROGRESS, ROOT, NotThere, read

KERNELS = ("forward_kernel", "query_kernel", "key_value_kernel", "prefix_kernel")
METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of compute",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "% of tensor cores",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps",
}
SHAPE = 9  # of attention.SHAPES: Llama's at 8k tokens
CALL = "from benchmarks.gpu.attention import *; b = Rivals(SHAPES[{}], DEVICE, dtype_of(DEVICE), 0); b.ours('triton')"


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if DEVICE == "cpu" or not found:
        raise NotThere(f"{name} needs a GPU" if DEVICE == "cpu" else f"{name} is not installed")
    return found


def memcheck(case: str) -> dict:
    tool = _tool("compute-sanitizer")
    call = f"from benchmarks.gpu import smoke; print(smoke.CASES[{case!r}]())"
    # Without the caching allocator every tensor has memory of its own, so that a step beyond one is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", call]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(found.stdout[-20000:], found.stderr[-5000:], flush=True)
    if found.returncode:
        lines = [line.strip("= \n") for line in found.stdout.splitlines() if line.startswith("=========")]
        said = next((line for line in lines if "Invalid" in line or "rror" in line), "it said nothing")
        raise RuntimeError(f"exit status {found.returncode}: {said}")
    return {}


def slow(place: int) -> dict:
    """Nsight Compute's figures for the slowest kernel, or the one after."""
    tool = _tool("ncu")
    spent: Counter = Counter(dict.fromkeys(KERNELS, 0))
    for record in (*read(PROGRESS), *read(OUT / "results.jsonl")):
        for name, _, microseconds in record.get("kernels", {}).get("ours", ()):
            if name in KERNELS:
                spent[name] += microseconds
    kernel = spent.most_common()[place][0]
    command = [tool, "--csv", "--metrics", ",".join(METRICS), "--kernel-name-base", "function"]
    command += ["--kernel-name", kernel, "--launch-count", "1", sys.executable, "-c", CALL.format(SHAPE)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(found.stdout[-20000:], found.stderr[-5000:], flush=True)
    rows = list(csv.DictReader(line for line in found.stdout.splitlines() if line.startswith('"')))
    figures = {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}" for row in rows}
    if not figures:
        lines = [line for line in found.stdout.splitlines() if "==ERROR==" in line] or ["it measured nothing"]
        raise RuntimeError(f"exit status {found.returncode}: {lines[0]}")
    says = f"{kernel}: " + ", ".join(f"{figures[name]} {what}" for name, what in METRICS.items() if name in figures)
    return {"figures": figures, "says": says}


CASES = {f"memcheck-{case}": functools.partial(memcheck, case) for case in smoke.MEMCHECKED}
CASES |= {f"ncu-{place}": functools.partial(slow, place) for place in (0, 1)}


def cases() -> dict:
    return CASES
