"""Cross-entropy of a linear head in plain PyTorch, with all logits in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignored: Tensor, label_smoothing: float, softcap: float | None
) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    return losses.masked_fill(ignored, 0).sum()
