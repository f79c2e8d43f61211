"""rms_norm: root-mean-square normalisation in one pass, forward and backward."""

from torch import Tensor

from fastprompt import _native

from .._checks import check_like, check_number, choose_elementwise
from . import reference

if _native.available("cpu"):
    from . import native

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), the mean over the last dimension.

    It is computed in float32 (float64 for float64) and rounded once, at the end. Only the reference has second
    derivatives; the other paths refuse to be differentiated twice.

    Args:
        x: (..., D), floating point.
        weight: (D,), of x's dtype.
        eps: added to the mean square, a finite number of at least 0.
        offset: added to the weight: 1 for a Gemma, 0 for a Llama.
        backend: None chooses; "native" (CPU), "triton" (GPUs, no float64, D up to 16384), both without a gradient of
            the weight, or "reference".

    Returns:
        (..., D), of x's dtype.

    Raises:
        ValueError: a shape, dtype, device, number or backend that does not fit.
    """
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != len(weight):
        raise ValueError(f"x must be (..., D) and weight (D,), got {tuple(x.shape)} and {tuple(weight.shape)}")
    check_like({"x": x, "weight": weight})
    eps = check_number(eps, "eps", "a finite number of at least 0", lambda number: number >= 0)
    offset = check_number(offset, "offset", "a finite number")
    backend = choose_elementwise(backend, x, {"weight": weight}, len(weight))
    if backend == "native":
        return native.rms_norm(x, weight, eps, offset)
    if backend == "triton":
        from . import triton  # here, not at the top: it imports the package triton

        return triton.rms_norm(x, weight, eps, offset)
    return reference.rms_norm(x, weight, eps, offset)
