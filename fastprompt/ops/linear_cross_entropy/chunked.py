"""Cross-entropy of a frozen linear head, a piece of the vocabulary at a time, with the gradient in the same pass.

The softmax runs online, as in flash attention: the head's weight, which is larger than any cache, is read once for both
products.
"""

import torch
from torch import Tensor

from ._autograd import GradientWithLoss

ROWS = 1024  # at a time: their states stay in the cache
VOCABULARY = 1024  # the same for the weight between the two products that read it


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignored: Tensor, label_smoothing: float, softcap: float | None
) -> Tensor:
    needed = torch.is_grad_enabled() and hidden.requires_grad
    return _Chunked.apply(hidden, weight, target, ignored, label_smoothing, softcap, needed)[0]


class _Chunked(GradientWithLoss):
    @staticmethod
    def forward(ctx, hidden, weight, target, ignored, label_smoothing, softcap, needed) -> tuple[Tensor, Tensor]:
        options = label_smoothing, softcap, needed
        rows = zip(hidden.split(ROWS), target.split(ROWS), strict=True)
        losses, grads = zip(*(_of_rows(h, weight, t.unsqueeze(1), *options) for h, t in rows), strict=True)
        grad = torch.cat(grads).to(hidden.dtype) if needed else hidden.new_empty(0)
        loss = torch.cat(losses).masked_fill(ignored, 0).sum()
        return GradientWithLoss.finish(ctx, loss, grad)


def _of_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, softcap: float | None, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (R,) of hidden (R, E) for targets (R, 1), and the derivative of their sum by hidden."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    peak = hidden.new_full((len(hidden), 1), -torch.inf, dtype=dtype)  # greatest logit so far
    total, chosen, average = torch.zeros((3, len(hidden), 1), dtype=dtype, device=hidden.device)
    grad = hidden.new_zeros(hidden.shape, dtype=dtype)  # sum of e^(logit - peak) times its row of the weight
    spread = torch.zeros_like(grad)  # sum of the rows, for label_smoothing
    for begin in range(0, len(weight), VOCABULARY):
        part = weight[begin : begin + VOCABULARY]
        logits = (hidden @ part.T).to(dtype)
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        place = target - begin
        here = (place >= 0) & (place < len(part))
        chosen = torch.where(here, logits.gather(1, place.clamp(0, len(part) - 1)), chosen)
        slope = None if softcap is None or not needed else _slope(logits, softcap)
        if label_smoothing:
            average += logits.sum(1, keepdim=True) / len(weight)
            if needed:
                even = torch.ones_like(logits) if slope is None else slope
                spread += even.to(hidden.dtype) @ part
        before, peak = peak, torch.maximum(peak, logits.amax(1, keepdim=True))
        shrink = (before - peak).exp_()
        powers = logits.sub_(peak).exp_()
        total = total * shrink + powers.sum(1, keepdim=True)
        if needed:
            powers = powers if slope is None else powers.mul_(slope)
            grad.mul_(shrink).add_(powers.to(hidden.dtype) @ part)
    apart = (1 - label_smoothing) * (peak - chosen) + label_smoothing * (peak - average)
    loss = (total.log() + apart).squeeze(1)
    if not needed:
        return loss, None
    wanted = 1 - label_smoothing if softcap is None else (1 - label_smoothing) * _slope(chosen, softcap)
    grad.div_(total).sub_(wanted * weight[target.squeeze(1)])
    return loss, grad.sub_(spread, alpha=label_smoothing / len(weight)) if label_smoothing else grad


def _slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of c * tanh(x / c), from its value."""
    return 1 - (capped / softcap).square()
