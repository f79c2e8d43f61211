"""segment_mean, segment_first, segment_last: one vector for each segment of a packed batch."""

import importlib.util

import torch
from torch import Tensor

from fastprompt import _native

from .._checks import check_cu_seqlens
from . import reference

if _native.available("cpu"):
    from . import native

__all__ = ["segment_first", "segment_last", "segment_mean"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported only when it runs


def segment_mean(hidden: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean of each segment's rows; an empty segment's is zero, and it has no gradient.

    Sums are in float32 (float64 for float64) and rounded once, as is the gradient, grad[b] / length in each row of
    segment b. Both are the same in each run (the reference's forward on a GPU: only under
    torch.use_deterministic_algorithms). Second derivatives work.

    Args:
        hidden: (T, E), the rows of all segments one after the other, float32, float64, bfloat16 or float16.
        cu_seqlens: (B+1,) int32, on hidden's device: segment b is rows cu_seqlens[b]:cu_seqlens[b+1]; it may be empty.
        backend: None chooses; "native" (C++, CPU only), "triton" (GPUs, no float64) or "reference".

    Returns:
        (B, E) of hidden's dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device, cu_seqlens or backend that does not fit. (On a GPU the values of cu_seqlens are
            not read on the host: wrong ones are not found.)
    """
    return _pool(hidden, cu_seqlens, 0, backend)


def segment_first(hidden: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """The first row of each segment; the gradient of all others is zero. Else as segment_mean."""
    return _pool(hidden, cu_seqlens, 1, backend)


def segment_last(hidden: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """The last row of each segment; the gradient of all others is zero. Else as segment_mean."""
    return _pool(hidden, cu_seqlens, -1, backend)


def _pool(hidden: Tensor, cu_seqlens: Tensor, take: int, backend: str | None) -> Tensor:
    if hidden.ndim != 2:
        raise ValueError(f"hidden must have shape (T, E), got {tuple(hidden.shape)}")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden must be one of {DTYPES}, got {hidden.dtype}")
    backend = _choose(backend, hidden)
    check_cu_seqlens(cu_seqlens, len(hidden), read_values=backend != "native")
    if cu_seqlens.device != hidden.device:
        raise ValueError(f"cu_seqlens must be on {hidden.device}, where hidden is, got {cu_seqlens.device}")
    if backend == "native":
        return native.segment_pool(hidden, cu_seqlens, take)
    if backend == "triton":
        from . import triton  # here, not at the top: it imports the package triton

        return triton.segment_pool(hidden, cu_seqlens, take)
    return reference.segment_pool(hidden, cu_seqlens, take)


def _choose(backend: str | None, hidden: Tensor) -> str:
    """The backend that runs: the fastest that can, or the one asked for."""
    on_cpu = hidden.device.type == "cpu"
    if backend is None:
        if on_cpu and _native.available("cpu"):
            return "native"
        return "triton" if hidden.device.type == "cuda" and _why_not_triton(hidden) is None else "reference"
    if backend not in ("native", "triton", "reference"):
        raise ValueError(f"backend must be None, 'native', 'triton' or 'reference', got {backend!r}")
    if backend == "native" and not on_cpu:
        raise ValueError(f"backend 'native' needs tensors on the CPU, got {hidden.device}")
    if backend == "native" and not _native.available("cpu"):
        raise ValueError(f"backend 'native' is not available: {_native.why_not('cpu')}")
    if backend == "triton" and (reason := _why_not_triton(hidden)):
        raise ValueError(f"backend 'triton' {reason}")
    return backend


def _why_not_triton(hidden: Tensor) -> str | None:
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    from . import triton

    return triton.why_not(hidden)
