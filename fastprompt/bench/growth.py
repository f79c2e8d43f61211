"""How time and memory grow with one size while the others stay: exponents fitted in log-log."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .case import OURS
from .records import seconds

FEWEST = 3  # sizes


class Fit(NamedTuple):
    """Values (size, seconds or bytes), smallest size first, and the exponent e of size ** e that fits them best.

    `upper` is the exponent over the upper half of the sizes alone, two at least: nearer to that of very large ones.
    """

    points: list[tuple[int, float]]
    exponent: float
    upper: float


class Growth(NamedTuple):
    """One sweep: what grows, what stays, and the fits by way."""

    group: str
    sweep: str
    others: dict[str, int]
    seconds: dict[str, Fit]
    peak_bytes: dict[str, Fit]

    @property
    def label(self) -> str:
        return " ".join([self.group, *(f"{name}{size}" for name, size in self.others.items())])


def fit(values: Iterable[tuple[int, float]]) -> Fit | None:
    """The fit of (size, value); what has no logarithm is left out. None: fewer than three sizes are left."""
    points = sorted(point for point in values if min(point) > 0)
    sizes = sorted({size for size, _ in points})
    if len(sizes) < FEWEST:
        return None
    middle = sizes[len(sizes) // 2]
    return Fit(points, _slope(points), _slope([point for point in points if point[0] >= middle]))


def growths(records: Sequence[dict]) -> list[Growth]:
    """The sweeps among records, those without a fit left out.

    A way is fitted in time if it has one at every size where ours has, in memory where it was measured.
    """
    sweeps: dict[tuple, list[dict]] = {}
    for record in records:
        sweep = record.get("sweep")
        if sweep and record["sizes"][sweep] and seconds(record, OURS):
            others = tuple((name, size) for name, size in record["sizes"].items() if name != sweep)
            sweeps.setdefault((record["group"], sweep, others), []).append(record)
    found = [
        Growth(group, sweep, dict(others), _times(own, sweep), _peaks(own, sweep))
        for (group, sweep, others), own in sweeps.items()
    ]
    return [growth for growth in found if growth.seconds or growth.peak_bytes]


def _times(records: list[dict], sweep: str) -> dict[str, Fit]:
    ways = [way for way in _ways(records) if all(seconds(record, way) for record in records)]
    return _fits({way: [(record["sizes"][sweep], seconds(record, way).median) for record in records] for way in ways})


def _peaks(records: list[dict], sweep: str) -> dict[str, Fit]:
    return _fits(
        {
            way: [
                (record["sizes"][sweep], record["ways"][way]["peak_bytes"])
                for record in records
                if "peak_bytes" in record["ways"].get(way, {})
            ]
            for way in _ways(records)
        }
    )


def _ways(records: list[dict]) -> list[str]:
    return list(dict.fromkeys(way for record in records for way in record["ways"]))


def _fits(values: dict[str, list[tuple[int, float]]]) -> dict[str, Fit]:
    fits = {way: fit(points) for way, points in values.items()}
    return {way: found for way, found in fits.items() if found}


def _slope(points: Sequence[tuple[int, float]]) -> float:
    x, y = zip(*((math.log(size), math.log(value)) for size, value in points), strict=True)
    return statistics.linear_regression(x, y).slope
