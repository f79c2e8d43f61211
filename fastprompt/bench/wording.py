"""How times, ratios, bytes and errors are written in a report and on a terminal: with three digits."""

from .case import OURS
from .records import best_rival, rivals, seconds, useful_flops
from .timing import Interval

MISSING = "–"


def number(value: float) -> str:
    """Three significant digits, never with an exponent above 1."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def duration_text(seconds: float) -> str:
    """In ms or us."""
    unit, scale = _unit(seconds)
    return f"{number(scale * seconds)} {unit}"


def time_text(interval: Interval) -> str:
    """Seconds, in ms or us."""
    unit, scale = _unit(interval.median)
    return interval_text(Interval(*(scale * value for value in interval)), f" {unit}")


def interval_text(interval: Interval, unit: str = "") -> str:
    return f"{number(interval.median)}{unit} [{number(interval.low)}, {number(interval.high)}]"


def bytes_text(count: int) -> str:
    return f"{number(count / 2**20)} MiB"


def error_text(error: float) -> str:
    return f"wrong: error {error:.0e}"


def share_text(part: float) -> str:
    return f"{100 * part:.0f} %"


def line(record: dict) -> str:
    """A record in one line: our time, the best rival's over it, and useful GFLOP/s beside the machine's."""
    best, rate = best_text(record), rate_text(record)
    parts = [f"ours {ours_text(record)}"]
    if best != MISSING:
        parts.append(f"best rival {best}")
    if rate != MISSING:
        parts.append(f"{rate} GFLOP/s")
    parts += [f"{way} {error_text(error)}" for way, error in record.get("wrong", {}).items() if way != OURS]
    return f"{record['name']}: {', '.join(parts)}"


def ours_text(record: dict) -> str:
    ours = seconds(record, OURS)
    if OURS in record.get("wrong", {}):
        return error_text(record["wrong"][OURS])
    return time_text(ours) if ours else MISSING


def best_text(record: dict) -> str:
    best = best_rival(record)
    return f"{best} {interval_text(rivals(record)[best], 'x')}" if best else MISSING


def rate_text(record: dict) -> str:
    flops = useful_flops(record)
    return f"{number(flops / 1e9)} of {number(record['matrix_gflops'])}" if flops else MISSING


def _unit(seconds: float) -> tuple[str, float]:
    return ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
