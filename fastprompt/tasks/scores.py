"""Scores of classes and of numbers, in plain formulas."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .metrics import check_equally_many


def f1_scores(truth: Sequence[set], predictions: Sequence[set]) -> dict[str, float]:
    """ "micro_f1" and "macro_f1", 0 to 100, of the classes of each example.

    Micro counts over all classes together; macro is the mean over the classes that occur in truth or predictions.
    Without any class at all both are 0.
    """
    classes = sorted({each for group in (*truth, *predictions) for each in group})
    hits, sizes = dict.fromkeys(classes, 0), dict.fromkeys(classes, 0)
    for true, predicted in zip(truth, predictions, strict=True):
        for each in true & predicted:
            hits[each] += 1
        for each in (*true, *predicted):
            sizes[each] += 1
    if not classes:
        return {"micro_f1": 0.0, "macro_f1": 0.0}
    return {
        "micro_f1": 200.0 * sum(hits.values()) / sum(sizes.values()),
        "macro_f1": sum(200.0 * hits[each] / sizes[each] for each in classes) / len(classes),
    }


def regression_scores(truth: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """ "pearson" and "spearman", -1 to 1, 0 where either side is all one number, and "mse", the mean squared error."""
    check_equally_many("truth", truth, predictions)
    true, predicted = (torch.tensor(values, dtype=torch.float64) for values in (truth, predictions))
    return {
        "pearson": _correlation(true, predicted),
        "spearman": _correlation(_ranks(true), _ranks(predicted)),
        "mse": (true - predicted).square().mean().item(),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return (a @ b / norm).item() if norm > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """The rank of each; equal values share the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]
