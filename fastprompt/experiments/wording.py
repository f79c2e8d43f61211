"""How metrics, numbers and lists are written in a report."""

import math

from .aggregate import Spread

MISSING = "–"
_METRICS = {  # name, unit, digits
    "f1": ("F1", "%", 1),
    "exact_match": ("exact match", "%", 1),
    "accuracy": ("accuracy", "%", 1),
    "r@1": ("R@1", "0 to 1", 3),
    "r@5": ("R@5", "0 to 1", 3),
}


def metric_name(metric: str) -> str:
    return _METRICS[metric][0] if metric in _METRICS else metric


def metric_with_unit(metric: str) -> str:
    return "{} ({})".format(*_METRICS[metric][:2]) if metric in _METRICS else metric


def digits(metric: str) -> int:
    return _METRICS[metric][2] if metric in _METRICS else 3


def number(value: float | None, places: int, sign: str = "") -> str:
    """`value` with `places` digits after the point, with its sign if `sign` is "+"."""
    if value is None:
        return MISSING
    return f"{value:{sign},.{places}f}" if math.isfinite(value) else "not finite"


def significant(value: float | None) -> str:
    """`value` with three significant digits, for what may be of any size."""
    if value is None:
        return MISSING
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def spread_text(spread: Spread | None, places: int, most_seeds: int, sign: str = "") -> str:
    """Mean ± standard deviation, marked with the seeds if they are fewer than `most_seeds`; `sign` as for `number`."""
    if spread is None:
        return MISSING
    text = number(spread.mean, places, sign)
    if spread.sd is not None:
        text += f" ± {number(spread.sd, places)}"
    return text if spread.count == most_seeds else f"{text} (n={spread.count})"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
