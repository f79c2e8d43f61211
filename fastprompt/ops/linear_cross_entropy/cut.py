"""Cross-entropy of a frozen linear head through the package cut_cross_entropy. Imported only where it is there."""

import torch
from cut_cross_entropy import linear_cross_entropy as fused
from torch import Tensor

from ._autograd import GradientWithLoss


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignored: Tensor, softcap: float | None
) -> Tensor:
    needed = torch.is_grad_enabled() and hidden.requires_grad
    return _Cut.apply(hidden, weight, target, ignored, softcap, needed)[0]


class _Cut(GradientWithLoss):
    """The gradient comes with the loss because the package's own backward takes it for a constant."""

    @staticmethod
    def forward(ctx, hidden, weight, target, ignored, softcap, needed) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(needed):
            leaf = hidden.detach().requires_grad_(needed)
            losses = fused(leaf, weight, target, softcap=softcap, reduction="none")
            losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
            loss = losses.masked_fill(ignored, 0).sum()
        grad = torch.autograd.grad(loss, leaf)[0] if needed else hidden.new_empty(0)
        return GradientWithLoss.finish(ctx, loss.detach(), grad, hidden.dtype)
