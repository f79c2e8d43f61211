"""linear_cross_entropy: the loss of a frozen language-model head, without its logits in memory."""

import importlib.util
from numbers import Integral

import torch
from torch import Tensor

from .._checks import check_number, check_targets
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
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `target`, as `torch.nn.functional.cross_entropy` defines it.

    A row whose target is ignore_index is left out: it adds no loss, its gradient is zero, and NaN in it stays there.
    It costs as much as any other: whoever has many of them picks the others first. Only the reference has second
    derivatives; the others refuse to be differentiated twice.

    Args:
        hidden: (R, E), floating point.
        weight: (V, E) of hidden's dtype, frozen.
        target: (R,) int64, each in [0, V), or ignore_index.
        label_smoothing: share of the target that is spread over the whole vocabulary, in [0, 1].
        softcap: c, logits become c * tanh(logits / c).
        ignore_index: the target of rows to leave out. It may be a class, which is then none.
        backend: None chooses; "cut_cross_entropy" (that package's kernel, on a GPU, 16-bit, no smoothing), "chunked"
            (a piece of the vocabulary at a time, gradient with the loss), or "reference".

    Returns:
        A scalar: float32, or float64 for float64 inputs; 0 if all rows are left out.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, or a weight that wants a gradient.
        IndexError: a target out of range. (On a GPU values are not read on the host: there this is a device assert, as
            in torch's own cross_entropy. In a function that torch.compile compiled for a CPU it is a RuntimeError.)
    """
    _check(hidden, weight, target)
    label_smoothing = check_number(label_smoothing, "label_smoothing", "in [0, 1]", lambda share: 0 <= share <= 1)
    if softcap is not None:
        limits = torch.finfo(torch.promote_types(hidden.dtype, torch.float32))  # what the logits are capped in
        expected = f"positive, of torch.{limits.dtype}'s range"
        softcap = check_number(softcap, "softcap", expected, lambda cap: limits.tiny <= cap <= limits.max)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral) or not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an integer of 64 bits, got {ignore_index!r}")
    backend = _choose(backend, hidden, label_smoothing)
    check_targets(target, len(weight), ignore_index, "target")
    ignored = target == ignore_index
    # Their hidden rows become zero and their targets some word: what follows is finite, and then left out.
    hidden, target = hidden.masked_fill(ignored[:, None], 0), target.masked_fill(ignored, 0)
    if backend == "cut_cross_entropy" and len(hidden):  # it takes no empty batch
        from . import cut  # here, not at the top: it imports the package cut_cross_entropy

        return cut.linear_cross_entropy(hidden, weight, target, ignored, softcap)
    run = reference if backend == "reference" else chunked
    return run.linear_cross_entropy(hidden, weight, target, ignored, label_smoothing, softcap)


def _check(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Raise a ValueError unless the inputs fit each other, whatever their values."""
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
    if len(weight) == 0:
        raise ValueError(f"weight must have a row for each of V >= 1 words, got {tuple(weight.shape)}")


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
