"""rms_norm: root-mean-square normalisation in one pass, forward and backward."""

from torch import Tensor

from fastprompt import _native

from .._checks import check_like, check_number, runs_native
from . import reference

if _native.available("cpu"):
    from . import native

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), the mean over the last dimension.

    It is computed in float32 (float64 for float64) and rounded once, at the end. Only the reference has second
    derivatives; the native path refuses to be differentiated twice.

    Args:
        x: (..., D), floating point.
        weight: (D,), of x's dtype.
        eps: added to the mean square, a finite number of at least 0.
        offset: added to the weight: 1 for a Gemma, 0 for a Llama.
        backend: None (native where it can), "native" (CPU; no gradient of the weight) or "reference".

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
    run = native.rms_norm if runs_native(backend, x, {"weight": weight}) else reference.rms_norm
    return run(x, weight, eps, offset)
