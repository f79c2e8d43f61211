"""linear_cross_entropy: the loss of a frozen language-model head, without its logits in memory."""

import importlib.util

import torch
from torch import Tensor

from . import chunked, reference

__all__ = ["linear_cross_entropy"]

BACKENDS = ("cut_cross_entropy", "chunked", "reference")
HAS_CUT_CROSS_ENTROPY = importlib.util.find_spec("cut_cross_entropy") is not None  # imported only when it runs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `target`, as `torch.nn.functional.cross_entropy` defines it.

    Args:
        hidden: (R, E), floating point.
        weight: (V, E) of hidden's dtype, frozen.
        target: (R,) int64, each in [0, V).
        label_smoothing: share of the target that is spread over the whole vocabulary, in [0, 1].
        softcap: c, logits become c * tanh(logits / c).
        backend: None chooses; "cut_cross_entropy" (that package's kernel, on a GPU, 16-bit, no smoothing), "chunked"
            (a piece of the vocabulary at a time, gradient with the loss), or "reference".

    Returns:
        A scalar: float32, or float64 for float64 inputs.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, or a weight that wants a gradient.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden (R, E) and weight (V, E) must agree, got {tuple(hidden.shape)}, {tuple(weight.shape)}"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be ({len(hidden)},) torch.int64, one a row, got {tuple(target.shape)} {target.dtype}"
        )
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype:
        raise ValueError(f"hidden and weight must be of one floating dtype, got {hidden.dtype} and {weight.dtype}")
    for name, tensor in (("weight", weight), ("target", target)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device}, where hidden is, got {tensor.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen (requires_grad False): its gradient is not computed")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    backend = _choose(backend, hidden, label_smoothing)
    if backend == "cut_cross_entropy":
        from cut_cross_entropy import linear_cross_entropy as fused

        return fused(hidden, weight, target, softcap=softcap, reduction="sum").float()
    run = chunked if backend == "chunked" else reference
    return run.linear_cross_entropy(hidden, weight, target, label_smoothing, softcap)


def _choose(backend: str | None, hidden: Tensor, label_smoothing: float) -> str:
    fits = hidden.device.type == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16) and not label_smoothing
    if backend is None:
        return "cut_cross_entropy" if fits and HAS_CUT_CROSS_ENTROPY else "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if backend == "cut_cross_entropy" and not (fits and HAS_CUT_CROSS_ENTROPY):
        raise ValueError(
            "backend 'cut_cross_entropy' needs that package, a GPU, bfloat16 or float16 and no label smoothing, "
            f"got {hidden.device}, {hidden.dtype}, {label_smoothing}"
        )
    return backend
