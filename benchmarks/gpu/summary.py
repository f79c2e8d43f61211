"""What a run came to, for the end of the screen: what failed first, then the figures."""

from collections import Counter
from collections.abc import Sequence

from . import records

MANY = 8  # cases that say nothing of their own are counted; so many errors of a phase are shown


def of(run: str, phases: Sequence[str], left: dict[str, list[str]]) -> tuple[str, bool]:
    """The text, and whether something failed in this run."""
    lines, failed = ["", "== summary"], False
    for phase in dict.fromkeys(phases):
        known = [record for record in records.Records(phase).known if "passed" not in record]
        mine = [record for record in known if record["run"] == run]
        latest = {record["case"]: record for record in known}  # the last of each case
        counts = Counter(_kind(record) for record in latest.values())
        before = len({record["case"] for record in known} - {record["case"] for record in mine})
        notes = [f"{counts[kind]} {kind}" for kind in ("passed", "failed", "not there", "partly") if counts[kind]]
        if before:
            notes.append(f"{before} of them held from before")
        if waiting := left.get(phase):
            notes.append(f"{len(waiting)} had no turn: {' '.join(waiting)[:100]}")
        lines.append(f"{phase}: {', '.join(notes) or 'nothing'}")
        errors = [record for record in mine if "error" in record]
        failed |= bool(errors)
        lines += [f"  FAILED {record['case']}: {record['error'][:150]}" for record in errors[:MANY]]
        if len(errors) > MANY:
            lines.append(f"  FAILED {len(errors) - MANY} more")
        lines += [f"  {case}: {record['says'][:150]}" for case, record in latest.items() if "says" in record]
        missing = {record["missing"] for record in latest.values() if "missing" in record}
        lines += [f"  not there: {why[:150]}" for why in sorted(missing)]
    return "\n".join(lines), failed


def _kind(record: dict) -> str:
    kinds = {"error": "failed", "missing": "not there", "partial": "partly"}
    return next((kind for name, kind in kinds.items() if name in record), "passed")
