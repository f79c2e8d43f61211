"""gated: activation(gate) * up, as the MLP of a Llama or a Gemma, in one pass."""

from torch import Tensor

from fastprompt import _native

from .._checks import check_like, runs_native
from . import reference

if _native.available("cpu"):
    from . import native

__all__ = ["gated"]

ACTIVATIONS = ("silu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, activation: str, *, backend: str | None = None) -> Tensor:
    """activation(gate) * up, elementwise, computed in float32 (float64 for float64) and rounded once.

    Only gate and up are kept for the backward. Only the reference has second derivatives; the native path refuses to be
    differentiated twice.

    Args:
        gate: any shape, floating point.
        up: of gate's shape and dtype.
        activation: "silu" (x / (1 + e^-x)) or "gelu_tanh" (gelu in its tanh approximation).
        backend: None (native where it can), "native" (CPU) or "reference".

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
    """
    if gate.shape != up.shape:
        raise ValueError(f"up must be {tuple(gate.shape)}, as gate is, got {tuple(up.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_like({"gate": gate, "up": up})
    run = native.gated if runs_native(backend, gate, {}) else reference.gated
    return run(gate, up, activation)
