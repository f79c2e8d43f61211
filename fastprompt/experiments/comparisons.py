"""Which series is ahead of which, and the sentences and the table that say so."""

from collections import Counter
from dataclasses import dataclass

from .aggregate import (
    AHEAD,
    BEHIND,
    UNJUDGED,
    WITHIN,
    Series,
    Spread,
    TaskResults,
    compare,
    spread,
)
from .document import Table
from .records import FROZEN
from .wording import MISSING, counted, digits, listed, metric_name, number, spread_text

RIVALS = ("prompt", "head", FROZEN)  # of a method with alignment, beside itself without
REAL = "real"  # the variant that the others are held to
_PHRASES = {AHEAD: "ahead of", WITHIN: "not apart from", BEHIND: "behind", UNJUDGED: "not judged against"}


@dataclass(frozen=True)
class Comparison:
    """`ours` against `rival` with the same number of examples, by the main metric."""

    examples: int
    ours: Series
    rival: Series
    difference: float  # of the means over languages
    bound: float | None  # the larger of the two standard deviations
    by_seed: Spread | None  # of the differences seed by seed: the same examples, in the same order
    verdict: str
    by_language: Counter  # verdict -> languages


def compare_methods(task: TaskResults) -> list[Comparison]:
    """Each method with alignment against itself without and each of RIVALS, trained on the same variant."""
    pairs = []
    for own in task.series:
        if own.unaligned != own:
            rivals = dict.fromkeys((own.unaligned.method, *RIVALS))
            pairs += [(own, Series(rival, own.variant)) for rival in rivals]
    return _compared(task, pairs)


def compare_with_frozen(task: TaskResults) -> list[Comparison]:
    """Each other method against FROZEN."""
    others = [series for series in task.series if series.method != FROZEN]
    return _compared(task, [(own, Series(FROZEN, own.variant)) for own in others])


def compare_variants(task: TaskResults) -> list[Comparison]:
    """Each method, trained on each variant but REAL, against itself trained on REAL."""
    others = [series for series in task.series if series.variant != REAL]
    return _compared(task, [(series, Series(series.method, REAL)) for series in others])


def _compared(task: TaskResults, pairs: list[tuple[Series, Series]]) -> list[Comparison]:
    metric = task.metrics[0]
    comparisons = []
    for examples in task.examples:
        for ours, rival in pairs:
            if not (task.cell(ours, examples) and task.cell(rival, examples)):
                continue

            def both(value, cells=((ours, examples), (rival, examples))) -> list[Spread]:
                return [task.spread(*cell, value) for cell in cells]

            own, other = both(lambda record: record.mean(metric))
            theirs = {record.seed: record.mean(metric) for record in task.cell(rival, examples)}
            paired = spread(
                record.mean(metric) - theirs[record.seed]
                for record in task.cell(ours, examples)
                if record.seed in theirs
            )
            verdicts = (
                compare(*both(lambda record, language=language: record.scores[language][metric]))
                for language in task.languages
            )
            bound = None if own.sd is None or other.sd is None else max(own.sd, other.sd)
            difference = own.mean - other.mean
            comparisons.append(
                Comparison(examples, ours, rival, difference, bound, paired, compare(own, other), Counter(verdicts))
            )
    return comparisons


def total_sentence(task: TaskResults, comparisons: list[Comparison], subject: str, rivals: str) -> str:
    """In how many of `comparisons` `subject` is ahead, not apart, behind and not judged."""
    if not comparisons:
        whole = f"{subject} against {rivals}: no finished runs with the same number of examples, so nothing to compare."
        return whole[0].upper() + whole[1:]
    count = Counter(comparison.verdict for comparison in comparisons)
    text = (
        f"By mean {metric_name(task.metrics[0])} over {counted(len(task.languages), 'language')}, {subject} against "
        f"{rivals}: of {counted(len(comparisons), 'comparison')}, ahead by more than one standard deviation in "
        f"{count[AHEAD]}, within one in {count[WITHIN]}, behind by more than one in {count[BEHIND]}"
    )
    return f"{text}, not judged for want of a second seed in {count[UNJUDGED]}." if count[UNJUDGED] else f"{text}."


def sentences(task: TaskResults, comparisons: list[Comparison]) -> list[str]:
    """One for each number of examples and series: what it is ahead of, not apart from and behind, with differences."""
    places = digits(task.metrics[0])
    groups: dict[tuple[int, Series], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.examples, comparison.ours), []).append(comparison)
    items = []
    for (examples, ours), group in groups.items():
        parts = []
        for verdict, phrase in _PHRASES.items():
            rivals = [
                f"{comparison.rival.label} ({number(comparison.difference, places, '+')})"
                for comparison in group
                if comparison.verdict == verdict
            ]
            if rivals:
                parts.append(f"{phrase} {listed(rivals)}")
        items.append(f"{counted(examples, 'example')}, {ours.label}: {'; '.join(parts)}.")
    return items


def comparison_table(task: TaskResults, comparisons: list[Comparison]) -> Table:
    """A row for each comparison; the verdicts language by language are counted."""
    places = digits(task.metrics[0])
    headings = ["comparison", "examples", "difference", "larger sd", "seed by seed", "verdict"]
    verdicts = (AHEAD, WITHIN, BEHIND, UNJUDGED)
    rows = []
    for comparison in comparisons:
        rows.append(
            [
                f"{comparison.ours.label} against {comparison.rival.label}",
                f"{comparison.examples:,}",
                number(comparison.difference, places, "+"),
                number(comparison.bound, places),
                spread_text(comparison.by_seed, places, task.most_seeds, "+"),
                comparison.verdict,
                *(str(comparison.by_language[verdict] or MISSING) for verdict in verdicts),
            ]
        )
    return Table(
        f"Difference of mean {metric_name(task.metrics[0])}, the larger of the two standard deviations, mean ± sd of "
        "the differences seed by seed (a seed trains both on the same examples in the same order), and the number of "
        "languages in which the method is ahead, not apart, behind and not judged by the same rule.",
        [*headings, *(f"languages {name}" for name in verdicts)],
        rows,
    )
