"""What changed from one benchmark to another, beyond noise and beyond what the machine itself drifted."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .case import OURS
from .records import is_ours, quotient, rivals, seconds
from .timing import Interval
from .wording import MISSING, bytes_text, error_text, interval_text, time_text

REGRESSION, FASTER, SAME, GONE, NEW = "regression", "faster", "same", "gone", "new"
SLOWER, QUICKER = 1.03, 0.97  # beyond these a change counts, with its whole interval
LARGER, LEAST_BYTES = 1.05, 2**20  # peak memory that counts as grown: by both


class Change(NamedTuple):
    """What became of one case.

    `time` is new seconds of ours over old, over `drift`: the same of the rivals, None where none can be relied on.
    """

    name: str
    kind: str
    why: str = ""
    old: Interval | None = None
    new: Interval | None = None
    drift: Interval | None = None
    time: Interval | None = None


def compare(old: dict, new: dict) -> list[Change]:
    """The changes of all cases of two results, as `fastprompt.bench.records` describes them.

    Raises:
        ValueError: they were measured on devices of two kinds, or in two dtypes.
    """
    for name in ("device", "dtype"):
        before, after = (result["machine"][name] for result in (old, new))
        if before != after:
            raise ValueError(f"new must be measured with the {name} of old, {before}, got {after}")
    steady = not _other_versions(old, new)
    olds, news = ({record["name"]: record for record in result["cases"]} for result in (old, new))
    found = [
        _change(record, news[name], steady) if name in news else Change(name, GONE) for name, record in olds.items()
    ]
    return found + [Change(name, NEW) for name in news if name not in olds]


def notes(old: dict, new: dict) -> list[str]:
    """What makes two results less comparable, a line each."""
    lines = []
    for name in ("name", "threads"):
        before, after = (result["machine"].get(name) for result in (old, new))
        if before != after:
            lines.append(f"warning: another machine: {name} was {before}, is {after}")
    versions = _other_versions(old, new)
    if versions:
        lines.append(f"warning: not corrected for drift, the rivals may have changed: {', '.join(versions)}")
    return lines


def table(changes: Sequence[Change]) -> str:
    """Counts, and a line for each case, those that matter first; for a terminal of any kind."""
    order = (REGRESSION, FASTER, NEW, GONE, SAME)
    rows = [("case", "kind", "old", "new", "drift", "new / old", "why")]
    for change in sorted(changes, key=lambda change: order.index(change.kind)):
        times = [time_text(each) if each else MISSING for each in (change.old, change.new)]
        ratios = [interval_text(each) if each else MISSING for each in (change.drift, change.time)]
        rows.append((change.name, change.kind, *times, *ratios, change.why))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = Counter(change.kind for change in changes)
    return "\n".join([", ".join(f"{kind}: {counts[kind]}" for kind in order), "", *lines])


def _other_versions(old: dict, new: dict) -> list[str]:
    """What the rivals rely on and has another version; our own may."""
    before, after = ({**result["machine"].get("versions", {}), "fastprompt": None} for result in (old, new))
    return [
        f"{name} was {before.get(name)}, is {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _change(old: dict, new: dict, steady: bool) -> Change:
    wrong = [
        f"{way} {error_text(error)}"
        for way, error in new.get("wrong", {}).items()
        if is_ours(way) and way not in old.get("wrong", {})
    ]
    times = seconds(old, OURS), seconds(new, OURS)
    if None in times:
        if wrong:
            return Change(new["name"], REGRESSION, ", ".join(wrong), *times)
        return Change(new["name"], NEW, "was wrong", *times) if times[1] else Change(new["name"], SAME, "wrong still")
    drift = _drift(old, new) if steady else None
    ratio = quotient(times[1], times[0])
    time = quotient(ratio, drift) if drift else ratio
    worse = wrong + ["slower"] * (time.low > SLOWER) + _grown(old, new)
    kind = REGRESSION if worse else FASTER if time.high < QUICKER else SAME
    return Change(new["name"], kind, ", ".join(worse), *times, drift, time)


def _drift(old: dict, new: dict) -> Interval | None:
    """Geometric mean over the rivals of both, of new seconds over old."""
    ratios = [quotient(seconds(new, way), seconds(old, way)) for way in rivals(old) if way in rivals(new)]
    return Interval(*map(statistics.geometric_mean, zip(*ratios, strict=True))) if ratios else None


def _grown(old: dict, new: dict) -> list[str]:
    before, after = (_memory(record) for record in (old, new))
    if before is None or after is None or after <= LARGER * before or after - before <= LEAST_BYTES:
        return []
    return [f"memory from {bytes_text(before)} to {bytes_text(after)}"]


def _memory(record: dict) -> int | None:
    """Peak bytes of ours; of a whole training what was resident."""
    about = record["ways"][OURS]
    return about.get("peak_bytes", about.get("resident_bytes"))
