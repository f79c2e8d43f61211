"""gated through csrc/. Imported only where the library is loaded."""

import torch
from torch import Tensor

from fastprompt.ops._autograd import once_differentiable, with_derivative

ACTIVATIONS = ("silu", "gelu_tanh")  # the order gives the numbers of csrc/cpu/gated.cpp

_backward = torch.ops.fastprompt.gated_backward.default


@torch.library.register_fake("fastprompt::gated")
def _(gate: Tensor, *_) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("fastprompt::gated_backward")
def _(grad: Tensor, gate: Tensor, *_) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, grad: Tensor) -> tuple:
    return *_backward(grad, *ctx.saved_tensors, ctx.activation), None


_run = with_derivative(torch.ops.fastprompt.gated.default, _save, once_differentiable("gated", _differentiate))


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _run(gate, up, ACTIVATIONS.index(activation))
