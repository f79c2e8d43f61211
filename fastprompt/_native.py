"""Loads the native libraries and remembers why one is not there."""

from pathlib import Path

import torch

__all__ = ["available", "why_not"]

FOLDER = Path(__file__).parent
OLDEST_GPU = 8  # of compute capability, that setup.py compiles for


def _load(device_type: str) -> str | None:
    """Load the library for one device type. Returns None, or why that cannot be done."""
    library = FOLDER / f"_C_{device_type}.so"
    if device_type == "cuda" and torch.version.cuda is None:
        return "this torch has no CUDA"
    if not library.exists():
        reason = library.with_suffix(".txt")  # left by the build
        return reason.read_text().strip() if reason.exists() else "not built: fastprompt was not installed with pip"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return str(error)
    return None


_why_not = {"cpu": _load("cpu")}
# The schemas are in the CPU library.
_why_not["cuda"] = _load("cuda") if _why_not["cpu"] is None else f"needs the CPU library ({_why_not['cpu']})"


def why_not(device_type: str) -> str | None:
    """Why there are no native operators for tensors on `device_type` ("cpu", "cuda", ...); None if there are."""
    reason = _why_not.get(device_type, f"there is no native library for {device_type}")
    # A tensor on a GPU has started CUDA; asking only then, an import or `info` does not.
    if reason is None and device_type == "cuda" and torch.cuda.is_initialized():
        found = torch.cuda.get_device_properties()
        if found.major < OLDEST_GPU:
            return f"needs a GPU of compute capability {OLDEST_GPU}.0 or newer, found {found.major}.{found.minor}"
    return reason


def available(device_type: str) -> bool:
    """Whether the native operators for tensors on `device_type` are loaded."""
    return why_not(device_type) is None
