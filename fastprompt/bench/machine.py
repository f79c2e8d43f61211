"""Where something was measured: hardware, versions, load and clock. No names of people or hosts."""

import ctypes
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .case import dtype_of
from .timing import matrix_rate, memory_rate

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PACKAGES = ("fastprompt", "torch", "triton", "transformers", "peft", "liger-kernel", "flash-attn")


def keep_freed_memory() -> None:
    """Have glibc give the same pages again, or large cases on the CPU would time how Linux zeroes fresh ones.

    Processes that this one starts, which measure memory and whole jobs, do as they always do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, 2**31 - 1)


def describe(device: str) -> dict:
    """What does not change while the benchmark runs."""
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    dtype = dtype_of(device)
    return {
        "device": device,
        "name": gpu.name if gpu else f"{_cpu_name()}, {os.cpu_count()} cores, {_instructions()}",
        "memory_gib": round((gpu.total_memory if gpu else _memory()) / 2**30, 1),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_gflops": round(matrix_rate(device, dtype) / 1e9, 1),
        "memory_gbytes": round(memory_rate(device) / 1e9, 1),
        "cache_mib": round(cache_bytes(device) / 2**20, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
    }


def state(device: str) -> dict:
    """What does: load of the CPU, and clock in MHz, lowest and highest of the cores or of the GPU."""
    if device == "cuda":
        query = "clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            found = ""
        values = found.splitlines()[0].split(", ") if found else []
        return {"load": os.getloadavg()[0], **dict(zip(query.split(","), values, strict=False))}
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.MULTILINE)
    clock = sorted(map(float, found))
    return {"load": os.getloadavg()[0], "clock_mhz": [clock[0], clock[-1]] if clock else None}


def cache_bytes(device: str) -> int:
    """The largest cache of one CPU core, or the GPU's L2."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [_read(file).strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size), default=32 * 2**20)


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.machine()


def _instructions() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read(file: str | Path) -> str:
    return Path(file).read_text() if Path(file).is_file() else ""
