"""gated: activation(gate) * up, as the MLP of a Llama or a Gemma, in one pass."""

from torch import Tensor

from fastprompt import _native

from .._checks import check_like, choose_elementwise
from . import reference

if _native.available("cpu"):
    from . import native

__all__ = ["gated"]

ACTIVATIONS = ("silu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, activation: str, *, backend: str | None = None) -> Tensor:
    """activation(gate) * up, elementwise, computed in float32 (float64 for float64) and rounded once.

    Only gate and up are kept for the backward. Only the reference has second derivatives; the other paths refuse to
    be differentiated twice.

    Args:
        gate: any shape, floating point.
        up: of gate's shape and dtype.
        activation: "silu" (x / (1 + e^-x)) or "gelu_tanh" (gelu in its tanh approximation).
        backend: None chooses; "native" (CPU), "triton" (GPUs, no float64) or "reference".

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
    """
    if gate.shape != up.shape:
        raise ValueError(f"up must be {tuple(gate.shape)}, as gate is, got {tuple(up.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_like({"gate": gate, "up": up})
    backend = choose_elementwise(backend, gate, {})
    if backend == "native":
        return native.gated(gate, up, activation)
    if backend == "triton":
        from . import triton  # here, not at the top: it imports the package triton

        return triton.gated(gate, up, activation)
    return reference.gated(gate, up, activation)
