"""What `fastprompt info` prints: versions, devices, native libraries, and the backends of every operator."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from fastprompt import _native
from fastprompt._version import __version__

PACKAGES = ("transformers", "peft", "triton")
DEVICE_TYPES = ("cpu", "cuda")  # those a native library may exist for
OPTIONAL_PACKAGES = ("triton", "cut_cross_entropy")  # backends that are named for what they need
SEGMENT_POOL = {"native": ("cpu",), "triton": (), "reference": ()}
# Backends of each operator, in the order of preference, and the native libraries that have it.
OPERATORS = {
    "prefix_attention": {"native": DEVICE_TYPES, "flash": (), "triton": (), "cpu": (), "reference": ()},
    "pack_prompt": {"native": DEVICE_TYPES, "reference": ()},
    "alignment_loss": {"native": DEVICE_TYPES, "triton": (), "reference": ()},
    "linear_cross_entropy": {"cut_cross_entropy": (), "chunked": (), "reference": ()},
    "segment_mean": SEGMENT_POOL,
    "segment_first": SEGMENT_POOL,
    "segment_last": SEGMENT_POOL,
}


def describe() -> None:
    """Print versions, devices and what is available here, with the reason where something is not."""
    print(f"fastprompt {__version__}, python {platform.python_version()}, torch {torch.__version__}")
    print(", ".join(f"{package} {_version(package)}" for package in PACKAGES))

    print("\ndevices")
    print(f"  cpu     {platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"  cuda:{index}  {properties.name}, {properties.total_memory / 2**30:.0f} GiB")

    print("\nnative libraries")
    for device_type in DEVICE_TYPES:
        print(f"  {device_type:6}  {_state(_native.why_not(device_type))}")

    print("\noperators and their backends")
    for operator, backends in OPERATORS.items():
        for backend, devices in backends.items():
            package = "triton" if backend == "flash" else backend
            if package in OPTIONAL_PACKAGES:
                state = _state(None if find_spec(package) else f"the package {package} is not installed")
            elif devices:
                state = "; ".join(f"{device}: {_state(_native.why_not(device))}" for device in devices)
            else:
                state = _state(None)
            print(f"  {operator:20}  {backend:17}  {state}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _state(reason: str | None) -> str:
    return "available" if reason is None else f"not available ({reason})"
