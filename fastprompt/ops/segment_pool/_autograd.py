"""What autograd needs to know of the operators, whatever device they are for."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload


def differentiable(pool: OpOverload, spread: OpOverload) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Register the derivatives of a pooling and of its backward, which are each other; returns the pooling.

    Args:
        pool: (hidden (T, E), cu_seqlens, take) -> (B, E).
        spread: (grad (B, E), cu_seqlens, T, take) -> (T, E).
    """

    def save(ctx, inputs: tuple, output: Tensor) -> None:
        hidden, cu_seqlens, ctx.take = inputs
        ctx.rows = hidden.shape[0]
        ctx.save_for_backward(cu_seqlens)

    def differentiate(ctx, grad: Tensor) -> tuple:
        return spread(grad, *ctx.saved_tensors, ctx.rows, ctx.take), None, None

    def save_spread(ctx, inputs: tuple, output: Tensor) -> None:
        _, cu_seqlens, _, ctx.take = inputs
        ctx.save_for_backward(cu_seqlens)

    def differentiate_spread(ctx, grad: Tensor) -> tuple:
        return pool(grad, *ctx.saved_tensors, ctx.take), None, None, None

    torch.library.register_autograd(pool.name(), differentiate, setup_context=save)
    torch.library.register_autograd(spread.name(), differentiate_spread, setup_context=save_spread)

    class SegmentPool(torch.autograd.Function):
        """The same as the registered autograd, at less cost per call."""

        @staticmethod
        def forward(ctx, *inputs) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():  # not the registered autograd inside of this one
                pooled = pool(*inputs)
            save(ctx, inputs, pooled)
            return pooled

        backward = staticmethod(differentiate)

    def segment_pool(hidden: Tensor, cu_seqlens: Tensor, take: int) -> Tensor:
        run = pool if torch.compiler.is_compiling() else SegmentPool.apply
        return run(hidden, cu_seqlens, take)

    return segment_pool
