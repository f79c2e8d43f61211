"""What autograd needs to know of a loss whose gradient is computed along with it."""

import torch
from torch import Tensor


class GradientWithLoss(torch.autograd.Function):
    """A function of the hidden states, its first input. Its forward returns what `finish` returns."""

    @staticmethod
    def finish(ctx, loss: Tensor, grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """grad may be wider than the hidden states' dtype: it is scaled first, and rounded then."""
        ctx.set_materialize_grads(False)
        ctx.dtype = dtype
        ctx.save_for_backward(grad)
        return loss, grad

    @staticmethod
    def backward(ctx, grad: Tensor | None, second: Tensor | None) -> tuple:
        if second is not None:  # somebody differentiates the gradient that came with the loss
            raise RuntimeError("linear_cross_entropy has no second derivative, but for backend 'reference'")
        (found,) = ctx.saved_tensors
        return None if grad is None else (found * grad).to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)
