"""rotary: position embedding by rotation, of query and key in one pass."""

from torch import Tensor

from fastprompt import _native

from .._checks import check_like, choose_elementwise
from . import reference

if _native.available("cpu"):
    from . import native

__all__ = ["rotary"]


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Turn each pair (x_d, x_{d + D/2}) of every head by the angle of its row and of d.

    It is computed in float32 (float64 for float64) and rounded once.

    Args:
        query: (T, H, D), D even, floating point.
        key: (T, Hkv, D), of query's dtype, as cos and sin are.
        cos, sin: (T, D), of the angles. Both halves are the same, as in transformers: the first is read.
        backend: None chooses; "native" (CPU), "triton" (GPUs, no float64, D up to 16384), both without gradients of cos
            and sin, or "reference".

    Returns:
        The two rotated tensors, contiguous.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit.
    """
    if query.ndim != 3 or query.shape[-1] % 2:
        raise ValueError(f"query must be (T, H, D) with D even, got {tuple(query.shape)}")
    rows, _, features = query.shape
    if key.ndim != 3 or key.shape[::2] != (rows, features):
        raise ValueError(f"key must be ({rows}, Hkv, {features}), as query is, got {tuple(key.shape)}")
    if cos.shape != (rows, features) or sin.shape != (rows, features):
        raise ValueError(f"cos and sin must be {(rows, features)}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    check_like({"query": query, "key": key, "cos": cos, "sin": sin})
    backend = choose_elementwise(backend, query, {"cos": cos, "sin": sin}, features)
    if backend == "native":
        return native.rotary(query, key, cos, sin)
    if backend == "triton":
        from . import triton  # here, not at the top: it imports the package triton

        return triton.rotary(query, key, cos, sin)
    return reference.rotary(query, key, cos, sin)
