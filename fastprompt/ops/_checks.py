"""Checks that several operators share."""

import importlib.util
import sys
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastprompt import _native

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported only when it runs
ELEMENTWISE = {"cpu": "native", "cuda": "triton"}  # what runs an elementwise operator unless asked otherwise
TRITON_FEATURES = 2**14  # of a row that one program holds


def choose_elementwise(backend: str | None, tensor: Tensor, constants: dict[str, Tensor], features: int = 0) -> str:
    """The backend of an operator that stands between a layer's products: "native", "triton" or "reference".

    Args:
        backend: None (the fast one of the device, where it can), or one of them.
        tensor: what the operator works on.
        constants: by name, tensors that only the reference has a gradient of.
        features: that are needed at once.

    Raises:
        ValueError: an unknown backend, or one that cannot run.
    """
    if backend not in (None, "native", "triton", "reference"):
        raise ValueError(f"backend must be None, 'native', 'triton' or 'reference', got {backend!r}")
    chosen = backend or ELEMENTWISE.get(tensor.device.type, "reference")
    if chosen == "reference":
        return chosen
    why_not = (_why_not_native if chosen == "native" else _why_not_triton)(tensor, features)
    if why_not is None and torch.is_grad_enabled():
        trains = [name for name, constant in constants.items() if constant.requires_grad]
        why_not = f"it has no gradient of {trains[0]}" if trains else None
    if why_not and backend:
        raise ValueError(f"backend {backend!r} is not available: {why_not}")
    return "reference" if why_not else chosen


def _why_not_native(tensor: Tensor, features: int) -> str | None:
    if tensor.device.type != "cpu" or not _native.available("cpu"):
        return _native.why_not("cpu") or f"it needs tensors on the CPU, got {tensor.device}"
    return None if tensor.dtype in NATIVE_DTYPES else f"it needs one of {NATIVE_DTYPES}, got {tensor.dtype}"


def _why_not_triton(tensor: Tensor, features: int) -> str | None:
    if not HAS_TRITON:
        return "it needs the package triton, which is not installed"
    from . import _triton

    if reason := _triton.why_not(tensor):
        return f"it {reason}"
    return None if features <= TRITON_FEATURES else f"it takes up to {TRITON_FEATURES} features, got {features}"


def check_like(tensors: dict[str, Tensor]) -> None:
    """Raise a ValueError unless all tensors are floating point, of the first one's dtype and on its device."""
    (first, example), *others = tensors.items()
    if not example.is_floating_point():
        raise ValueError(f"{first} must be floating point, got {example.dtype}")
    for name, tensor in others:
        if tensor.dtype != example.dtype or tensor.device != example.device:
            raise ValueError(
                f"{name} must be {example.dtype} on {example.device}, as {first} is, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def check_number(value: float, argument: str, expected: str, fits: Callable[[float], bool] = lambda _: True) -> float:
    """As a float. Raises a ValueError unless it is a finite number that `fits`, which `expected` puts in words."""
    limit = sys.float_info.max
    if (
        isinstance(value, bool)
        or not isinstance(value, (float, Real))
        or not -limit <= value <= limit
        or not fits(value)
    ):
        raise ValueError(f"{argument} must be {expected}, got {value!r}")
    return float(value)


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, read_values: bool = True, argument: str = "cu_seqlens") -> int:
    """Check the bounds of packed segments and return their number B.

    Segment b is rows cu_seqlens[b]:cu_seqlens[b+1]; segments may be empty. The values are read only where that costs no
    device synchronisation: on the CPU, outside of torch.compile.

    Args:
        cu_seqlens: (B+1,) int32, from 0 to `rows`, non-decreasing.
        rows: number of packed rows T.
        read_values: False leaves the values to a native operator, which checks them itself.
        argument: what the caller calls it.

    Raises:
        TypeError: not a tensor, or not int32.
        ValueError: another shape, or values that do not divide `rows` rows into segments.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{argument} must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{argument} must have shape (B+1,), got {tuple(cu_seqlens.shape)}")
    if read_values and _is_readable(cu_seqlens):
        check_bounds(cu_seqlens.tolist(), rows, argument)
    elif len(cu_seqlens) == 1 and rows:  # whatever is in it
        raise ValueError(f"{argument} must end at {rows}, the number of packed rows, got the bounds of no segment")
    return len(cu_seqlens) - 1


def check_bounds(bounds: list[int], rows: int, argument: str = "cu_seqlens") -> None:
    """Raise a ValueError unless the values of cu_seqlens divide `rows` rows into segments."""
    if bounds[0] != 0:
        raise ValueError(f"{argument} must begin at 0, got {bounds[0]}")
    if bounds[-1] != rows:
        raise ValueError(f"{argument} must end at {rows}, the number of packed rows, got {bounds[-1]}")
    for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end < begin:
            raise ValueError(f"{argument} must not decrease, got {end} after {begin} at index {b + 1}")


def check_max_seqlen(cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raise a ValueError if a segment is longer, where reading that costs no synchronisation."""
    if _is_readable(cu_seqlens) and len(cu_seqlens) > 1 and (longest := int(cu_seqlens.diff().max())) > max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest segment's {longest} rows, got {max_seqlen}")


def check_indices(indices: Tensor, bound: int, argument: str, read_values: bool = True) -> None:
    """Check that `indices` are int32 or int64 and, where reading them costs no synchronisation, in [0, bound).

    Raises:
        TypeError: another dtype.
        IndexError: a value out of range.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{argument} must be torch.int32 or torch.int64, got {indices.dtype}")
    if read_values and _is_readable(indices) and indices.numel():
        low, high = (int(value) for value in indices.aminmax())
        if low < 0 or high >= bound:
            raise IndexError(f"{argument} must be in [0, {bound}), got {low if low < 0 else high}")


def check_targets(targets: Tensor, classes: int, ignore_index: int, argument: str) -> None:
    """Check that each target is a class in [0, classes), or ignore_index, which stands for none.

    Where reading them costs a synchronisation, or torch.compile traces, the check is an assert on the device.

    Raises:
        IndexError: a value that is neither.
    """
    if is_fake(targets):
        return
    fits = ((targets >= 0) & (targets < classes)) | (targets == ignore_index)
    expected = f"{argument} must be in [0, {classes}), or {ignore_index} for none"
    if not _is_readable(targets):
        torch._assert_async(fits.all(), expected)
    elif not fits.all():
        raise IndexError(f"{expected}, got {int(targets[~fits][0])}")


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape and no values: on the device meta, or under FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _is_readable(tensor: Tensor) -> bool:
    """Whether the values may be read here: on the CPU, not while torch.compile traces, and if there are any."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)
