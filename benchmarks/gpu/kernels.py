"""Which kernels ran, and for how long: the profiler's sums by name."""

from collections.abc import Callable
from typing import NamedTuple

from .records import DEVICE


class Kernel(NamedTuple):
    name: str
    launches: float  # of one call
    seconds: float


def profiled(way: Callable[[], object], repeat: int = 3) -> list[Kernel]:
    """Of one call, the longest first. On a CPU they are the operators."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    gpu = DEVICE == "cuda"
    synchronize = torch.cuda.synchronize if gpu else lambda: None
    way()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        for _ in range(repeat):
            way()
        synchronize()
    kernels = []
    for event in found.key_averages():
        if not gpu or event.device_type == DeviceType.CUDA:
            spent = event.self_device_time_total if gpu else event.self_cpu_time_total
            kernels.append(Kernel(event.key[:90], event.count / repeat, spent / repeat / 1e6))
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def brief(kernels: list[Kernel], most: int = 4) -> list[tuple[str, float, float]]:
    """(name, launches, microseconds) of the longest."""
    return [(each.name, round(each.launches, 2), round(each.seconds * 1e6, 2)) for each in kernels[:most]]
