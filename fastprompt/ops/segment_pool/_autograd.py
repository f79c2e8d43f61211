"""What autograd needs to know of the operators, whatever device they are for."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from .._autograd import direct, with_derivative


def differentiable(
    pool: OpOverload, spread: OpOverload, launch: Callable | None = None, launch_spread: Callable | None = None
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Register the derivatives of a pooling and of its backward, which are each other; returns the pooling.

    Args:
        pool: (hidden (T, E), cu_seqlens, take) -> (B, E).
        spread: (grad (B, E), cu_seqlens, T, take) -> (T, E).
        launch, launch_spread: where the operators are Python's, what they run; see `direct`.
    """

    below_spread = spread if launch_spread is None else direct(spread, launch_spread)

    def save(ctx, inputs: tuple, output: Tensor) -> None:
        hidden, cu_seqlens, ctx.take = inputs
        ctx.rows = hidden.shape[0]
        ctx.save_for_backward(cu_seqlens)

    def differentiate(ctx, grad: Tensor) -> tuple:
        run = spread if torch.is_grad_enabled() else below_spread
        return run(grad, *ctx.saved_tensors, ctx.rows, ctx.take), None, None

    def save_spread(ctx, inputs: tuple, output: Tensor) -> None:
        _, cu_seqlens, _, ctx.take = inputs
        ctx.save_for_backward(cu_seqlens)

    def differentiate_spread(ctx, grad: Tensor) -> tuple:
        return pool(grad, *ctx.saved_tensors, ctx.take), None, None, None

    torch.library.register_autograd(spread.name(), differentiate_spread, setup_context=save_spread)
    return with_derivative(pool, save, differentiate, launch)
