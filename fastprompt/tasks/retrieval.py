"""Sentence retrieval: does a translation find its own English sentence?"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024  # queries at a time: the (N, N) scores of a large test set need not exist at once


def sentence_groups(sentences: Sequence[Sequence[int]]) -> Tensor:
    """(N,) int64: which sentences of token ids are the same. Others of the same tokens would have the same vectors:
    texts need not be equal, as "..." and "…" are for many a tokenizer.
    """
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(map(int, tokens)), len(numbers)) for tokens in sentences])


def firsts(groups: Sequence[int]) -> list[bool]:
    """Of a batch's groups: whether each is the first of its own. Of one group all but one would be its rivals."""
    return [group not in groups[:n] for n, group in enumerate(groups)]


def retrieval_scores(queries: Tensor, targets: Tensor, groups: Tensor | None = None) -> dict[str, float]:
    """Score the retrieval of target n by query n, among all targets, by cosine.

    Query n finds its target within k if fewer than k other targets are at least as near: a tie counts against it, so
    that vectors which cannot be told apart score nothing.

    Args:
        queries: (N, D), any floating dtype and device.
        targets: (N, D), on the same device.
        groups: (N,) integers; targets of one group are the same sentence and no rivals of each other. Without it, every
            target is a sentence of its own.

    Returns:
        "r@1", "r@5": fraction of the queries that find their target within 1 and 5; "cosine": mean over the true pairs.

    Raises:
        TypeError: `queries` or `targets` not floating point.
        ValueError: shapes that do not fit, no rows, or a value that is not finite.
    """
    for name, vectors in (("queries", queries), ("targets", targets)):
        if not vectors.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {vectors.dtype}")
        if vectors.ndim != 2 or len(vectors) == 0:
            raise ValueError(f"{name} must have shape (N, D) with N > 0, got {tuple(vectors.shape)}")
        if not vectors.isfinite().all():
            bad = int((~vectors.isfinite()).any(1).sum())
            raise ValueError(f"{name} must be finite, got NaN or infinity in {bad} of {len(vectors)} rows")
    if queries.shape != targets.shape:
        raise ValueError(f"queries and targets must be alike, got {tuple(queries.shape)} and {tuple(targets.shape)}")
    count = len(queries)
    if groups is None:
        groups = torch.arange(count)
    elif groups.shape != (count,):
        raise ValueError(f"groups must have shape ({count},), got {tuple(groups.shape)}")
    groups = groups.to(targets.device)

    # float64: vectors that differ in float32 stay apart
    queries, targets = F.normalize(queries.double(), dim=1), F.normalize(targets.double(), dim=1)
    ranks, cosines = [], []
    for begin in range(0, count, _ROWS):
        rows = torch.arange(begin, min(begin + _ROWS, count), device=targets.device)
        scores = queries[rows] @ targets.T
        own = scores.gather(1, rows[:, None])
        rivals = groups[rows, None] != groups
        # A rounding error apart is a tie too: a product need not give equal columns equal results.
        ranks.append(((scores >= own - 1e-12) & rivals).sum(1))
        cosines.append(own[:, 0])
    rank = torch.cat(ranks)
    return {
        "r@1": (rank < 1).double().mean().item(),
        "r@5": (rank < 5).double().mean().item(),
        "cosine": torch.cat(cosines).mean().item(),
    }
