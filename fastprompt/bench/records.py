"""The file a benchmark leaves behind: one JSON object.

    {"format": 1,
     "machine": of `machine.describe`: {"device", "name", "threads", "dtype", "matrix_gflops", "versions": {...}, ...},
     "state": {"before": of `machine.state`, "after": the same},
     "settings": {"groups": [...], "quick": true | false, "budget": seconds of timing for each case},
     "cases": [record, ...]}

A record, of `run.measure`:

    {"name", "group", "sizes": {"B": 8, ...}, "sweep": one of sizes | null, "flops", "bytes",
     "missing": {rival: why}, "wrong": {way: error}, "ways": {way: {...}, ...},
     "sets", "matrix_gflops", "floor_seconds"}

"ours" is our way; a name that ends in "(ours)" is another backend of our own, the others are rivals. An error that is
not a number is null in the file. If ours is wrong there are no ways, else each that is right has

    {"seconds": {"median", "low", "high"}, "turns", "error", "over_ours": {"median", "low", "high"} (all but ours),
     "peak_bytes", "resident_bytes" (some), "launch_seconds", "graph_seconds": {...} | "graph": why not (on a GPU)}

and in the group "end-to-end"

    {"seconds_per_step": {"median", "low", "high"}, "tokens_per_second", "flops_per_step",
     "seconds_to": {target: seconds | null}, "resident_bytes", "scores": {...}}

and what else `end_to_end` tells of it. Intervals hold the median with 95 % confidence.
"""

import json
import math
from pathlib import Path

from fastprompt._files import write_text

from .case import OURS
from .timing import Interval

FORMAT = 1
END_TO_END = "end-to-end"  # the group of whole trainings


def write(path: Path, result: dict) -> None:
    """Write a result; what is not finite becomes null, as other readers of JSON know no NaN."""
    finite = json.loads(json.dumps(result), parse_constant=lambda name: None)
    write_text(path, json.dumps(finite, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> dict:
    """Read a result; an error in "wrong" that is null is NaN again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: must be the JSON file of a benchmark, got no file")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON: {error}") from error
    found = result.get("format") if isinstance(result, dict) else type(result).__name__
    if found != FORMAT:
        raise ValueError(f"{path}: must be the result of a benchmark with format {FORMAT}, got {found!r}")
    for record in result["cases"]:
        wrong = record.get("wrong", {})
        record["wrong"] = {way: math.nan if error is None else error for way, error in wrong.items()}
    return result


def is_ours(way: str) -> bool:
    """Whether a way is our own: the one that is measured, or another backend."""
    return way == OURS or way.endswith("(ours)")


def seconds(record: dict, way: str) -> Interval | None:
    """Of one run, or of one step of a training; None: it is missing or wrong."""
    about = record["ways"].get(way, {})
    found = about.get("seconds") or about.get("seconds_per_step")
    return Interval(**found) if found else None


def over_ours(record: dict, way: str) -> Interval | None:
    """Seconds of a way over ours; None: one of the two has no time."""
    found = record["ways"].get(way, {}).get("over_ours")
    if found:
        return Interval(**found)
    theirs, ours = seconds(record, way), seconds(record, OURS)
    return quotient(theirs, ours) if theirs and ours else None


def rivals(record: dict) -> dict[str, Interval]:
    """Rival -> its seconds over ours, of those that have a time; none if ours has none."""
    found = {way: over_ours(record, way) for way in record["ways"] if not is_ours(way)}
    return {way: over for way, over in found.items() if over}


def best_rival(record: dict) -> str | None:
    """The fastest rival; None: no rival has a time."""
    found = rivals(record)
    return min(found, key=lambda way: found[way].median, default=None)


def useful_flops(record: dict) -> float | None:
    """FLOP/s of ours, of those that any way must do; None: it does none, or ours has no time."""
    ours, flops = seconds(record, OURS), record.get("flops")
    return flops / ours.median if ours and flops else None


def quotient(a: Interval, b: Interval) -> Interval:
    """a / b, between the extremes that the two intervals allow."""
    return Interval(a.median / b.median, a.low / b.high, a.high / b.low)
