"""Sentence retrieval: does a translation find its own English sentence?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.data.examples import Pair

from .base import InputConfig, Item, Model, Task
from .metrics import check_equally_many
from .rows import text_in

_ROWS = 1024  # queries at a time: the (N, N) scores of a large test set need not exist at once


def sentence_groups(sentences: Sequence[Sequence[int]]) -> Tensor:
    """(N,) int64: the group of each sentence of token ids; sentences of the same tokens are one group.

    They have the same vectors, although their texts may differ: "..." and "…" are the same for many a tokenizer.
    """
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(map(int, tokens)), len(numbers)) for tokens in sentences])


def firsts(groups: Sequence[int]) -> list[bool]:
    """Whether each sentence of a batch is the first of its group: the others of the group would be its own rivals."""
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
    found = _found(queries, targets, groups)
    return {
        "r@1": (found.rank < 1).double().mean().item(),
        "r@5": (found.rank < 5).double().mean().item(),
        "cosine": found.own.mean().item(),
    }


class Found(NamedTuple):
    """What each query finds: the cosine of its own target, how many rivals are at least as near, and the nearest
    target of all with its cosine.
    """

    own: Tensor
    rank: Tensor
    nearest: Tensor
    cosine: Tensor


def _found(queries: Tensor, targets: Tensor, groups: Tensor | None = None) -> Found:
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
    found = []
    for begin in range(0, count, _ROWS):
        rows = torch.arange(begin, min(begin + _ROWS, count), device=targets.device)
        scores = queries[rows] @ targets.T
        own = scores.gather(1, rows[:, None])
        rivals = groups[rows, None] != groups
        # A rounding error apart is a tie too: a product need not give equal columns equal results.
        rank = ((scores >= own - 1e-12) & rivals).sum(1)
        cosine, nearest = scores.max(1)
        found.append((own[:, 0], rank, nearest, cosine))
    return Found(*map(torch.cat, zip(*found, strict=True)))


class Retrieval(Task):
    """Finding an English sentence by the vector of its translation. Nothing but the alignment trains for it.

    Sentences of the same tokens are no rivals of each other.

    Example:
        >>> pairs = [{"source": "Good morning.", "target": "Bore da."}, {"source": "Thanks.", "target": "Diolch."}]
        >>> args = TrainingArguments("run")
        >>> Trainer("intfloat/multilingual-e5-small", args, task="retrieval", train_dataset=pairs).train()
    """

    name = "retrieval"
    columns: ClassVar[Mapping[str, str]] = {"source": "a sentence in English", "target": "its translation"}
    optional: ClassVar[tuple[str, ...]] = ()
    metric = "r@1"

    def settings(self) -> dict[str, Any]:
        return {}

    def example(self, row: Mapping[str, Any], where: str, number: int, *, labelled: bool = True) -> Pair:
        return Pair(text_in(row, "source", where), text_in(row, "target", where))

    def build(self, backbone: nn.Module, tokenizer: Callable, inputs: InputConfig) -> None:
        """There is no head to make."""

    def encode(self, examples: Sequence[Pair]) -> list[Item]:
        return []

    def predict(
        self,
        model: Model,
        examples: Sequence[Pair],
        batch_size: int = 32,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """The number of the nearest source for each translation, "prediction", and its cosine, "score".

        Beside them are "cosine", that of the translation's own source, and "rank", how many other sentences are at
        least as near as that one.

        Args:
            model: also has `tokenize(texts)` and `vectors(texts, *, source, batch_size)`, as a learner has.
            examples, batch_size, on_batch: as every task takes them.
        """
        if not examples:
            return []
        sources = model.vectors([pair.source for pair in examples], source=True, batch_size=batch_size)
        targets = model.vectors([pair.target for pair in examples], batch_size=batch_size)
        if on_batch is not None:
            on_batch(len(examples))
        groups = sentence_groups(model.tokenize([pair.source for pair in examples]))
        columns = [each.tolist() for each in _found(targets, sources, groups)]
        return [
            {"prediction": nearest, "score": score, "cosine": own, "rank": rank}
            for own, rank, nearest, score in zip(*columns, strict=True)
        ]

    def scores(self, examples: Sequence[Pair], predictions: Sequence[dict], language: str = "en") -> dict[str, float]:
        """ "r@1", "r@5" and "cosine", as `retrieval_scores` has them."""
        check_equally_many("examples", examples, predictions)
        count = len(predictions)
        return {
            "r@1": sum(each["rank"] < 1 for each in predictions) / count,
            "r@5": sum(each["rank"] < 5 for each in predictions) / count,
            "cosine": sum(each["cosine"] for each in predictions) / count,
        }
