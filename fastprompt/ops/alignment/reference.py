"""The alignment loss in plain PyTorch: the formula every faster path is held to."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # a row whose norm is at most this counts as zero: its unit vector is zero, with zero gradient


def of_unit_norm(x: Tensor) -> Tensor:
    square = x.square().sum(-1, keepdim=True)
    zero = square <= EPS * EPS
    return x * square.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)


def normalized(x: Tensor, normalize: str) -> Tensor:
    """Rows of x (N, D) brought to unit norm ("l2"), to mean 0 and variance 1 ("layer"), or as they are ("none")."""
    if normalize == "layer":
        return F.layer_norm(x, x.shape[-1:])
    return of_unit_norm(x) if normalize == "l2" else x


def infonce_rows(u: Tensor, v: Tensor, row_weight: Tensor | None, temperature: float) -> Tensor:
    """(N,) symmetric in-batch contrastive loss; a row of weight 0 is nobody's negative."""
    similarity = u @ v.T / temperature  # (N, N)
    if row_weight is not None:
        left_out = (row_weight == 0)[None, :] & ~torch.eye(len(u), dtype=torch.bool, device=u.device)
        forward, backward = similarity.masked_fill(left_out, -torch.inf), similarity.T.masked_fill(left_out, -torch.inf)
    else:
        forward, backward = similarity, similarity.T
    return -(forward.log_softmax(1) + backward.log_softmax(1)).diagonal() / 2


def alignment_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    normalize: str,
    distance: str,
    temperature: float,
    reduction: str,
) -> Tensor:
    if row_weight is not None:  # left out, not multiplied by 0: what stands there may be no number
        left_out = (row_weight == 0)[:, None]
        student, teacher = student.masked_fill(left_out, 0.0), teacher.masked_fill(left_out, 0.0)
    accumulate = torch.promote_types(student.dtype, torch.float32)
    u = normalized(F.linear(student, weight, bias).to(accumulate), normalize)
    v = normalized(teacher.to(accumulate), normalize)
    # A weight of 0 has no gradient: the row is not there.
    w = None if row_weight is None else torch.where(row_weight == 0, 0.0, row_weight.to(accumulate))
    rows = u.new_zeros(len(u))
    for name in distance.split("+"):
        if name == "cosine":
            unit_u, unit_v = (u, v) if normalize == "l2" else (of_unit_norm(u), of_unit_norm(v))
            rows = rows + (1 - (unit_u * unit_v).sum(-1))
        elif name == "mse":
            rows = rows + (u - v).square().mean(-1)
        elif name == "smooth_l1":
            rows = rows + F.smooth_l1_loss(u, v, reduction="none").mean(-1)
        else:
            rows = rows + infonce_rows(u, v, w, temperature)
    if w is not None:
        rows = rows * w
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if w is None:
        return rows.mean()
    total = w.sum()
    return rows.sum() / torch.where(total == 0, 1.0, total)
