"""Runs of a study summed up over their seeds."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import quantiles
from typing import NamedTuple

from .records import FROZEN, MAJORITY, Record

METHODS = (FROZEN, "head", "full", "lora", "prompt", "prefix")  # in this order, each before what adds parts to it
AHEAD, BEHIND, WITHIN, UNJUDGED = "ahead", "behind", "not apart", "not judged"


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1; None for one value) of `count` values."""

    mean: float
    sd: float | None
    count: int


def mean(values: list[float]) -> float:
    """Mean of one or more values, which need not be finite (statistics.fmean refuses infinities of both signs)."""
    return sum(values) / len(values)


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation of `values`; None without any."""
    values = list(values)
    if not values:
        return None
    return Spread(mean(values), math.sqrt(variance(values)) if len(values) > 1 else None, len(values))


def variance(values: list[float]) -> float:
    """Sample variance (n - 1) of two or more values; NaN if one of them is not finite."""
    middle = mean(values)
    if not math.isfinite(middle):
        return math.nan
    return math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)


def loss_variance(losses: list[float]) -> float | None:
    """Variance of the differences of consecutive losses over the second half of training; None below 3 losses in it."""
    second = losses[len(losses) // 2 :]
    if len(second) < 3:
        return None
    return variance([after - before for before, after in zip(second, second[1:], strict=False)])


def gradient_spread(norms: list[float]) -> float | None:
    """90th over 10th percentile, interpolated; None below 2 norms, NaN where one is not finite or the 10th is 0."""
    if len(norms) < 2:
        return None
    if not all(map(math.isfinite, norms)):
        return math.nan
    tenths = quantiles(norms, n=10, method="inclusive")
    return tenths[8] / tenths[0] if tenths[0] > 0 else math.nan


def block_means(values: list[float], blocks: int) -> list[float]:
    """Means of `values` in at most `blocks` consecutive blocks, as equal in length as they can be."""
    blocks = min(blocks, len(values))
    edges = [len(values) * block // blocks for block in range(blocks + 1)] if blocks else [0]
    return [mean(values[begin:end]) for begin, end in zip(edges, edges[1:], strict=False)]


def compare(ours: Spread, rival: Spread) -> str:
    """AHEAD or BEHIND if the means differ by more than the larger standard deviation, else WITHIN.

    UNJUDGED where one of the two has a single seed, hence no standard deviation.
    """
    if ours.sd is None or rival.sd is None:
        return UNJUDGED
    difference, bound = ours.mean - rival.mean, max(ours.sd, rival.sd)
    return AHEAD if difference > bound else BEHIND if difference < -bound else WITHIN


class Series(NamedTuple):
    """What the report follows over the number of examples: a method, trained on a variant of the data."""

    method: str
    variant: str

    @property
    def label(self) -> str:
        return f"{self.method} ({self.variant})" if self.variant else self.method

    @property
    def unaligned(self) -> "Series":
        """The same without alignment; itself, if it has none."""
        return self._replace(method=self.method.replace("+alignment", ""))


@dataclass(frozen=True)
class TaskResults:
    """The runs of one task, by series and number of examples."""

    name: str
    records: list[Record]

    @cached_property
    def metrics(self) -> list[str]:
        """The main metric first, the others as in the first run."""
        main = self.records[0].main
        return [main] + [metric for metric in self.records[0].metrics if metric != main]

    @cached_property
    def languages(self) -> list[str]:
        """The source language first, the others by name."""
        first = self.records[0]
        return sorted(first.scores, key=lambda language: (not first.is_source(language), language))

    @property
    def pairs(self) -> bool:
        """Whether all languages are pairs, such as "ar-de"."""
        return all("-" in language for language in self.languages)

    @cached_property
    def examples(self) -> list[int]:
        return sorted({record.examples for record in self.records})

    @cached_property
    def series(self) -> list[Series]:
        """Methods in the order of METHODS, others in that of their first run; so too the variants of each method."""
        methods = list(dict.fromkeys(record.method for record in self.records))

        def place(series: Series) -> tuple[int, int, int]:
            name, *parts = series.method.split("+")
            known = METHODS.index(name) if name in METHODS else len(METHODS)
            return known, len(parts), methods.index(series.method)

        return sorted(dict.fromkeys(Series(record.method, record.variant) for record in self.records), key=place)

    @cached_property
    def _cells(self) -> dict[tuple[Series, int], list[Record]]:
        cells: dict[tuple[Series, int], list[Record]] = {}
        for record in sorted(self.records, key=lambda record: record.seed):
            cells.setdefault((Series(record.method, record.variant), record.examples), []).append(record)
        return cells

    @cached_property
    def most_seeds(self) -> int:
        """The seeds of the cell that has most of them."""
        return max(map(len, self._cells.values()))

    def cell(self, series: Series, examples: int) -> list[Record]:
        """The runs of all seeds, by seed; empty where none is finished."""
        return self._cells.get((series, examples), [])

    def spread(self, series: Series, examples: int, value: Callable[[Record], float | None]) -> Spread | None:
        """`value` over the seeds, without those where it is None; None where nothing is left."""
        values = (value(record) for record in self.cell(series, examples))
        return spread(number for number in values if number is not None)

    def majority(self, examples: int, language: str | None = None) -> float | None:
        """Accuracy of the majority class in `language`, or its macro mean: the mean of the runs that state it."""
        stated = [
            record.baseline[MAJORITY] for record in self.records if record.examples == examples and record.baseline
        ]
        if not stated:
            return None
        return mean([mean(list(scores.values())) if language is None else scores[language] for scores in stated])


def by_task(records: list[Record]) -> list[TaskResults]:
    """The runs of each task, in the order of the tasks' first runs."""
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record)
    return [TaskResults(name, runs) for name, runs in tasks.items()]
