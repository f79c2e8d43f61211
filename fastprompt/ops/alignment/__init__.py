"""alignment_loss: projection, normalisation and distance between two sets of vectors."""

import importlib.util
import sys
from numbers import Real

import torch
from torch import Tensor

from fastprompt import _native

from . import reference

if _native.available("cpu"):
    from . import native

__all__ = ["alignment_loss"]

NORMALIZATIONS = ("l2", "layer", "none")
DISTANCES = ("cosine", "mse", "smooth_l1", "infonce")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported only when it runs
BACKENDS = ("native", "triton", "reference")
LEAST_TEMPERATURE = 1e-6
# On a GPU. Up to here launches are the cost, and the C++ path has fewer: counted in benchmarks/NOTES.md, not measured.
FEW_ROWS = 1024


def alignment_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    normalize: str = "l2",
    distance: str = "cosine",
    temperature: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Distance between the projected student rows and the teacher rows.

    For each row, z = W h + b; u = norm(z), v = norm(t); the loss is the weighted mean of d(u, v) over the rows.
    The formula is fastprompt's own (the paper that names a knowledge alignment loss does not print one).

    Args:
        student: h, (N, Ds), float16, bfloat16, float32 or float64.
        teacher: t, (N, Dt), of the student's dtype. It gets a gradient only if it asks for one.
        weight: W, (Dt, Ds).
        bias: b, (Dt,), or None.
        row_weight: (N,), or None for equal weights. A row of weight 0 is left out altogether: no loss, no gradient,
            and in "infonce" nobody's negative.
        normalize: "l2" (unit norm), "layer" (as `torch.nn.functional.layer_norm`, with its eps and no affine) or
            "none", for u and v alike. Under "l2" a row of norm at most 1e-12 becomes zero and gets zero gradient.
        distance: "cosine" (1 - u.v / (|u| |v|), with a cosine of 0 and no gradient where a norm is at most 1e-12),
            "mse" (mean over the features of (u - v)^2), "smooth_l1" (mean over the features, beta 1), "infonce"
            (cross-entropy of u.v / temperature against the row's own partner among all N, averaged over both
            directions; u.v is the cosine under "l2" alone), or several joined by "+", whose losses are added.
        temperature: of "infonce", a finite number of at least 1e-6 (cosines over less than that are not exact to
            one decimal place in float32); None is 0.05.
        reduction: "mean" (weighted sum over the sum of weights; 0 if all weights are 0), "sum" (weighted), or "none".
        backend: None chooses; "native" (C++; on a GPU for few rows), "triton" (GPUs, no float64) or "reference". The
            first two find loss and gradients in one pass and raise an error where a second derivative is asked for.

    Returns:
        A scalar, or (N,) weighted rows for reduction "none"; float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument that is no tensor, or a temperature that is no number.
        ValueError: a shape, dtype, device, name or number that does not fit. Both come before anything is computed.
    """
    _check_tensors(student=student, teacher=teacher, weight=weight, bias=bias, row_weight=row_weight)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
    check_distance(distance)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    temperature = check_temperature(temperature)
    args = student, teacher, weight, bias, row_weight, normalize, distance, temperature, reduction
    backend = _choose(backend, student)
    if backend == "triton":
        from . import triton  # here, not at the top: it imports the package triton

        return triton.alignment_loss(*args)
    return native.alignment_loss(*args) if backend == "native" else reference.alignment_loss(*args)


def _check_tensors(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "row_weight")):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    student, teacher, weight, _, row_weight = tensors.values()
    if student.ndim != 2 or teacher.ndim != 2 or weight.ndim != 2:
        raise ValueError(
            "student, teacher and weight must have two dimensions, got shapes "
            f"{tuple(student.shape)}, {tuple(teacher.shape)}, {tuple(weight.shape)}"
        )
    if student.dtype not in DTYPES:
        raise ValueError(f"student must be of one of {DTYPES}, got {student.dtype}")
    rows, features = teacher.shape
    shapes = {
        "teacher": (len(student), features),
        "weight": (features, student.shape[1]),
        "bias": (features,),
        "row_weight": (rows,),
    }
    for name, shape in shapes.items():
        if (tensor := tensors[name]) is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} (student {tuple(student.shape)}, teacher {tuple(teacher.shape)}), "
                f"got {tuple(tensor.shape)}"
            )
        if name != "row_weight" and tensor.dtype != student.dtype:
            raise ValueError(f"{name} must be {student.dtype}, as student is, got {tensor.dtype}")
        if tensor.device != student.device:
            raise ValueError(f"{name} must be on {student.device}, where student is, got {tensor.device}")
    if row_weight is not None and row_weight.is_complex():
        raise ValueError(f"row_weight must be real, got {row_weight.dtype}")
    for name in "student", "teacher":
        if 0 in tensors[name].shape:
            raise ValueError(f"{name} must have at least one row and feature, got shape {tuple(tensors[name].shape)}")


def _choose(backend: str | None, student: Tensor) -> str:
    """The backend that runs: the fastest that can, or the one asked for."""
    native_fits = _native.available(student.device.type)
    if backend is None:
        on_gpu = student.device.type == "cuda"
        if native_fits and not (on_gpu and len(student) > FEW_ROWS):
            return "native"
        return "triton" if on_gpu and _why_not_triton(student) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if backend == "native" and not native_fits:
        raise ValueError(f"backend 'native' is not available: {_native.why_not(student.device.type)}")
    if backend == "triton" and (reason := _why_not_triton(student)):
        raise ValueError(f"backend 'triton' {reason}")
    return backend


def _why_not_triton(student: Tensor) -> str | None:
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    from . import triton

    return triton.why_not(student)


def check_distance(distance: str) -> None:
    """Raise a ValueError unless `distance` is a known distance or a sum of different ones."""
    names = distance.split("+") if isinstance(distance, str) else [repr(distance)]
    if not set(names) <= set(DISTANCES) or len(set(names)) != len(names):
        raise ValueError(f"distance must be one of {DISTANCES}, or different ones joined by '+', got {distance!r}")


def check_temperature(temperature: float | None) -> float:
    """The temperature as a float, None being 0.05.

    Raises:
        TypeError: not a number.
        ValueError: not finite, or less than LEAST_TEMPERATURE.
    """
    if temperature is None:
        return 0.05
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number or None, got {temperature!r}")
    if not LEAST_TEMPERATURE <= temperature <= sys.float_info.max:
        raise ValueError(f"temperature must be at least {LEAST_TEMPERATURE} and finite, got {temperature}")
    return float(temperature)
