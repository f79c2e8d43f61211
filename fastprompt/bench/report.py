"""The report of a benchmark, as Markdown."""

import statistics
from collections import Counter
from collections.abc import Sequence

from fastprompt.experiments.document import Block, Bullets, Heading, Paragraph, Table, to_markdown
from fastprompt.experiments.wording import counted, listed

from .case import OURS
from .growth import Fit, growths
from .records import END_TO_END, best_rival, is_ours, over_ours, rivals, seconds, useful_flops
from .timing import Interval
from .wording import (
    MISSING,
    bytes_text,
    duration_text,
    error_text,
    interval_text,
    number,
    ours_text,
    share_text,
    time_text,
)


def markdown(result: dict) -> str:
    """The report of a result as `fastprompt.bench.records` describes it."""
    records = result["cases"]
    blocks: list[Block] = [Heading(f"Benchmark on {result['machine']['name']}", 1), Bullets(_machine(result))]
    for group in dict.fromkeys(record["group"] for record in records):
        own = [record for record in records if record["group"] == group]
        blocks += [Heading(group, 2), _jobs(own) if group == END_TO_END else _cases(own), Bullets(_summary(own))]
    blocks += [Heading("Where a rival is faster", 2), *_lost(records)]
    wrong = [
        f"{record['name']}: {way} {error_text(error)}"
        for record in records
        for way, error in record.get("wrong", {}).items()
    ]
    for title, items in (("Wrong", wrong), ("Missing rivals", _missing(records))):
        if items:
            blocks += [Heading(title, 2), Bullets(items)]
    table = _growth(records)
    if table.rows:
        blocks += [Heading("Growth", 2), table]
    return to_markdown(blocks)


def _machine(result: dict) -> list[str]:
    machine, settings = result["machine"], result["settings"]
    versions = [f"{name} {version}" for name, version in machine.get("versions", {}).items() if version]
    states = [f"{when} {_state(state)}" for when, state in result["state"].items()]
    return [
        f"{counted(machine['threads'], 'thread')}, {machine['dtype']}, on {machine['device']}",
        f"matrix product: {number(machine['matrix_gflops'])} GFLOP/s; copy: {number(machine['memory_gbytes'])} GB/s",
        ", ".join(versions),
        "; ".join(states),
        f"groups: {listed(settings['groups'])}; {number(settings['budget'])} s of timing for each case"
        + (", a few cases of each" if settings["quick"] else ""),
    ]


def _state(state: dict) -> str:
    clock = state.get("clock_mhz")
    parts = [f"load {state['load']:.1f}"] + ([f"{clock[0]:.0f} to {clock[1]:.0f} MHz"] if clock else [])
    return ", ".join(parts + [f"{name} {value}" for name, value in state.items() if name not in ("load", "clock_mhz")])


def _cases(records: Sequence[dict]) -> Table:
    """A row for each case; columns that would be empty are left out."""
    others = sorted(_ways(records), key=is_ours)
    columns = {
        "case": lambda record: record["name"].removeprefix(f"{record['group']}/"),
        "ours": ours_text,
        "of the floor": lambda record: _of_ours(record, record.get("floor_seconds")),
        "GFLOP/s": lambda record: number(useful_flops(record) / 1e9) if useful_flops(record) else MISSING,
        "of the matrix rate": lambda record: (
            share_text(useful_flops(record) / record["matrix_gflops"] / 1e9) if useful_flops(record) else MISSING
        ),
        **{way: lambda record, way=way: _over(record, way) for way in others},
        "launch": _launch,
        "in a graph": _in_graph,
        "peak memory": _peaks,
    }
    rows = [[text(record) for text in columns.values()] for record in records]
    kept = [at for at, cells in enumerate(zip(*rows, strict=True)) if set(cells) != {MISSING}]
    names = list(columns)
    lost = {
        (row, kept.index(names.index(way)))
        for row, record in enumerate(records)
        for way, over in rivals(record).items()
        if over.median < 1
    }
    caption = (
        "Ours: median with its 95 % interval; the floor (the FLOPs and bytes that any way must do and move, at the "
        "machine's rates) over it. Others: their time over ours, measured in turns; bold: faster than ours."
    )
    return Table(caption, [names[at] for at in kept], [[row[at] for at in kept] for row in rows], lost)


def _jobs(records: Sequence[dict]) -> Table:
    rows = []
    for record in records:
        for way in [*record["ways"], *(way for way in record.get("wrong", {}) if way not in record["ways"])]:
            about = record["ways"].get(way, {})
            step, resident = seconds(record, way), about.get("resident_bytes")
            flops, tokens = about.get("flops_per_step"), about.get("tokens_per_second")
            reached = {
                name: MISSING if at is None else f"{at:.1f} s" for name, at in about.get("seconds_to", {}).items()
            }
            rows.append(
                [
                    f"{record['name'].removeprefix(f'{END_TO_END}/')}, {way}",
                    time_text(step) if step else _wrong_text(record, way),
                    MISSING if way == OURS else _over(record, way),
                    number(tokens) if tokens else MISSING,
                    number(flops / 1e9) if flops else MISSING,
                    number(flops / step.median / 1e9) if flops and step else MISSING,
                    ", ".join(f"{name}: {text}" for name, text in reached.items()) or MISSING,
                    bytes_text(resident) if resident else MISSING,
                    ", ".join(f"{name} {number(score)}" for name, score in about.get("scores", {}).items()) or MISSING,
                ]
            )
    columns = ["job, way", "a step", "over ours", "tokens/s", "GFLOP a step", "GFLOP/s", "time to", "memory", "scores"]
    return Table(f"Whole trainings. {MISSING}: not reached, or not measured.", columns, rows)


def _summary(records: Sequence[dict]) -> list[str]:
    """Of the best rival and of each: geometric mean, least and most of its time over ours."""
    best = [rivals(record)[name].median for record in records if (name := best_rival(record))]
    medians = {"best rival": best} if best else {}
    for record in records:
        for way, over in rivals(record).items():
            medians.setdefault(way, []).append(over.median)
    return [
        f"{way} over ours: geometric mean {number(statistics.geometric_mean(values))}, least {number(min(values))}, "
        f"most {number(max(values))}, of {counted(len(values), 'case')}"
        for way, values in medians.items()
    ] or ["no rival has a time"]


def _lost(records: Sequence[dict]) -> list[Block]:
    items = [
        f"{record['name']}: {way} takes {interval_text(over)} of our time, {time_text(seconds(record, way))} against "
        f"{time_text(seconds(record, OURS))}" + (", which may be noise" if over.high >= 1 else "")
        for record in records
        for way, over in rivals(record).items()
        if over.median < 1
    ]
    if items:
        return [Bullets(items)]
    return [Paragraph(f"Nowhere, of {counted(sum(bool(rivals(record)) for record in records), 'case')} with a rival.")]


def _missing(records: Sequence[dict]) -> list[str]:
    """A line for each rival and reason, with its cases; of a whole group only the group."""
    count = Counter(record["group"] for record in records)
    found: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        for rival, why in record.get("missing", {}).items():
            found.setdefault((record["group"], rival, why), []).append(record["name"])
    return [
        f"{rival}, {group if len(names) == count[group] else listed(names)}: {why}"
        for (group, rival, why), names in found.items()
    ]


def _growth(records: Sequence[dict]) -> Table:
    rows = []
    for growth in growths(records):
        for way in dict.fromkeys([*growth.seconds, *growth.peak_bytes]):
            fits = growth.seconds.get(way), growth.peak_bytes.get(way)
            sizes = [size for found in fits if found for size, _ in found.points]
            rows.append(
                [f"{growth.label}, {way}", f"{growth.sweep} {min(sizes)} to {max(sizes)}", *map(_exponents, fits)]
            )
    caption = (
        "Exponent e of size^e that fits best, by least squares in log-log; in brackets over the upper half of sizes."
    )
    return Table(caption, ["others, way", "what grows", "time", "peak memory"], rows)


def _exponents(fit: Fit | None) -> str:
    return f"{fit.exponent:.2f} [{fit.upper:.2f}]" if fit else MISSING


def _ways(records: Sequence[dict]) -> list[str]:
    """All but ours that have a time or are wrong somewhere."""
    found = dict.fromkeys(way for record in records for way in [*record["ways"], *record.get("wrong", {})])
    return [way for way in found if way != OURS]


def _of_ours(record: dict, part: float | None) -> str:
    ours = seconds(record, OURS)
    return share_text(part / ours.median) if ours and part else MISSING


def _over(record: dict, way: str) -> str:
    over = over_ours(record, way)
    return interval_text(over) if over else _wrong_text(record, way)


def _wrong_text(record: dict, way: str) -> str:
    return error_text(record["wrong"][way]) if way in record.get("wrong", {}) else MISSING


def _launch(record: dict) -> str:
    found = record["ways"].get(OURS, {}).get("launch_seconds")
    return duration_text(found) if found else MISSING


def _in_graph(record: dict) -> str:
    about = record["ways"].get(OURS, {})
    return time_text(Interval(**about["graph_seconds"])) if "graph_seconds" in about else about.get("graph", MISSING)


def _peaks(record: dict) -> str:
    peaks = {way: about["peak_bytes"] for way, about in record["ways"].items() if "peak_bytes" in about}
    return ", ".join(f"{way} {bytes_text(peak)}" for way, peak in peaks.items()) or MISSING
