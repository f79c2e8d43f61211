"""Cross-entropy of a frozen linear head, some rows of logits at a time, with the gradient in the same pass."""

import torch
from torch import Tensor

CHUNK = 1 << 23  # logits held at a time: 32 MiB in float32, and enough rows that the product runs at its rate


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, softcap: float | None
) -> Tensor:
    needed = torch.is_grad_enabled() and hidden.requires_grad
    return _LinearCrossEntropy.apply(hidden, weight, target, label_smoothing, softcap, needed)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, label_smoothing, softcap, needed) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows, vocabulary = len(hidden), len(weight)
        grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        step = max(1, CHUNK // vocabulary)
        for part in (slice(begin, begin + step) for begin in range(0, rows, step)):
            loss, slope = _chunk(hidden[part] @ weight.T, target[part, None], label_smoothing, softcap, needed)
            total += loss
            if needed:
                grad[part] = slope.to(hidden.dtype) @ weight
        ctx.save_for_backward(grad)
        return total, grad

    @staticmethod
    def backward(ctx, grad: Tensor | None, second: Tensor | None) -> tuple:
        if second is not None:  # somebody differentiates the gradient that came with the loss
            raise RuntimeError("linear_cross_entropy has no second derivative, but for backend 'reference'")
        (found,) = ctx.saved_tensors
        return None if grad is None else found * grad, None, None, None, None, None


def _chunk(
    product: Tensor, target: Tensor, label_smoothing: float, softcap: float | None, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of rows of logits (R, V), before the softcap, for targets (R, 1); and its derivative by them."""
    logits = product.to(torch.promote_types(product.dtype, torch.float32))
    capped = None
    if softcap is not None:
        logits = logits.div_(softcap).tanh_()
        capped = logits.square() if needed else None
        logits.mul_(softcap)
    logits.sub_(logits.amax(1, keepdim=True))
    chosen = logits.gather(1, target)
    average = logits.mean(1, keepdim=True) if label_smoothing else 0.0
    sums = logits.exp_().sum(1, keepdim=True)
    loss = (sums.log() - (1 - label_smoothing) * chosen - label_smoothing * average).sum()
    if not needed:
        return loss, None
    slope = logits.div_(sums)
    if label_smoothing:
        slope.sub_(label_smoothing / slope.shape[1])
    slope.scatter_add_(1, target, torch.full_like(chosen, label_smoothing - 1))
    return loss, slope if capped is None else slope.mul_(1 - capped)
