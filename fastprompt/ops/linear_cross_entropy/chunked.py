"""Cross-entropy of a frozen linear head, a piece of the logits at a time, with the gradient in the same pass.

A piece is cut for the device. On a CPU the softmax runs online over the vocabulary, as in flash attention: the head's
weight, which is larger than any cache, is read once for both products. On a GPU a piece is some rows and the whole
vocabulary: few launches, each large.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import GradientWithLoss

ROWS = 1024  # at a time on a CPU: their states stay in the cache
VOCABULARY = 1024  # the same for the weight between the two products that read it
LOGITS = 2**29  # bytes of a piece's logits elsewhere, in the type that they are computed in
HALF_SCALE = 1024  # keeps float16's probabilities, 1e-6 in a large vocabulary, among the numbers of full precision


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignored: Tensor, label_smoothing: float, softcap: float | None
) -> Tensor:
    needed = torch.is_grad_enabled() and hidden.requires_grad
    return _Chunked.apply(hidden, weight, target, ignored, label_smoothing, softcap, needed)[0]


def piece(device_type: str, rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and words of a piece of the logits of `rows` rows of hidden states in `dtype`."""
    if device_type == "cpu":
        return ROWS, VOCABULARY
    most = max(1, LOGITS // (vocabulary * torch.promote_types(dtype, torch.float32).itemsize))
    pieces = max(1, -(-rows // most))
    return max(1, -(-rows // pieces)), vocabulary  # all of them about as large: a small one reads the whole weight, too


class _Chunked(GradientWithLoss):
    @staticmethod
    def forward(ctx, hidden, weight, target, ignored, label_smoothing, softcap, needed) -> tuple[Tensor, Tensor]:
        rows, words = piece(hidden.device.type, len(hidden), len(weight), hidden.dtype)
        run = partial(_online, words=words) if words < len(weight) else _at_once
        pieces = zip(hidden.split(rows), target.unsqueeze(1).split(rows), strict=True)
        found = [run(h, weight, t, label_smoothing, softcap, needed) for h, t in pieces]
        losses, grads = zip(*found, strict=True)
        grad = _joined(grads) if needed else hidden.new_empty(0)
        loss = _joined(losses).masked_fill(ignored, 0).sum()
        return GradientWithLoss.finish(ctx, loss, grad, hidden.dtype)


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _at_once(
    hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, softcap: float | None, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (R,) of hidden (R, E) for targets (R, 1), and the derivative of their sum by hidden."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden @ weight.T
    if softcap is not None:
        capped = logits.to(dtype).div_(softcap).tanh_()
        logits = capped * softcap
    log_probability = logits.log_softmax(1, dtype=dtype)
    del logits
    chosen = log_probability.gather(1, target)
    loss = chosen.squeeze(1) * (label_smoothing - 1)
    if label_smoothing:
        loss = loss - label_smoothing * log_probability.mean(1)
    if not needed:
        return loss, None
    # By the logits: probability less what is wanted of it, at the target without cancellation.
    slope = log_probability.exp_()
    wrong = chosen.expm1_()
    if label_smoothing:
        slope.sub_(label_smoothing / len(weight))
        wrong += label_smoothing - label_smoothing / len(weight)
    slope.scatter_(1, target, wrong)
    if softcap is not None:
        slope = torch.ops.aten.tanh_backward(slope, capped)
    if hidden.dtype != torch.float16:
        return loss, slope.to(hidden.dtype) @ weight
    return loss, (slope.mul_(HALF_SCALE).to(hidden.dtype) @ weight).to(dtype).div_(HALF_SCALE)


def _online(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    label_smoothing: float,
    softcap: float | None,
    needed: bool,
    words: int,
) -> tuple[Tensor, Tensor | None]:
    """As _at_once, `words` of the vocabulary at a time."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    peak = hidden.new_full((len(hidden), 1), -torch.inf, dtype=dtype)  # greatest logit so far
    total, chosen, average = torch.zeros((3, len(hidden), 1), dtype=dtype, device=hidden.device)
    least = math.log(torch.finfo(dtype).tiny)
    grad = hidden.new_zeros(hidden.shape, dtype=dtype)  # sum of e^(logit - peak) times its row of the weight
    spread = torch.zeros_like(grad)  # sum of the rows, for label_smoothing
    for begin in range(0, len(weight), words):
        part = weight[begin : begin + words]
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
        # Nothing beside the peak's, but a CPU multiplies numbers below the normal ones a hundred times as slowly.
        powers = F.threshold_(logits.sub_(peak), least, -torch.inf).exp_()
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
