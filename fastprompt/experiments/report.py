"""The report of a study: one HTML page and one Markdown file, of whatever runs are finished."""

import json
from pathlib import Path

from fastprompt._files import write_text

from . import plots, tables
from .aggregate import TaskResults, by_task
from .comparisons import (
    REAL,
    RIVALS,
    Comparison,
    compare_methods,
    compare_variants,
    compare_with_frozen,
    comparison_table,
    sentences,
    total_sentence,
)
from .document import (
    Block,
    Bullets,
    Code,
    Details,
    Figure,
    Heading,
    Paragraph,
    to_html,
    to_markdown,
)
from .records import FROZEN, read_results
from .wording import counted, digits, listed, metric_name, number

HTML = "report.html"
MARKDOWN = "report.md"

_DEFINITIONS = [
    "Mean over languages: the unweighted mean of the score in each language, taken for each run; then mean and "
    "standard deviation over the runs of the seeds. Pairs of languages count as a language each.",
    "Standard deviation (sd): of the sample, with n - 1; none for a single seed. It is that of the runs: the test "
    "sentences are the same in each.",
    "Ahead, behind: the means differ by more than the larger of the two standard deviations; not apart: they do not. "
    "This is a rule of thumb and no test of significance; with few seeds the standard deviations themselves are rough. "
    "Where a method has one seed, nothing is judged.",
    "Transfer: the mean over the languages other than the one trained on; of pairs, all but that language with itself.",
    "Worst seed: the lowest mean over languages of any finished seed.",
    "Loss-curve variance: the variance (n - 1) of the differences of consecutive losses over the second half of the "
    "steps, for each run; then the mean over seeds. It grows with the scale of the loss, so methods whose loss has "
    "other terms do not compare by it.",
    "Gradient-norm spread: the 90th over the 10th percentile of the norms of all steps, interpolated, for each run; "
    "then the mean over seeds. 1 is a norm that never changes.",
    "Loss curves: the steps all seeds reached, in up to 60 blocks of which each point is the mean; line and band are "
    "mean and standard deviation over seeds. Parts of the training: a fifth of the steps of each run.",
    "Cost: means over the seeds of what the runs recorded.",
    "Majority class: the accuracy of always answering the most frequent class, as the runs recorded it.",
]


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write report.html, which needs no other file, and report.md, without the plots, into the folder of a study.

    The same study gives the same bytes.

    Returns:
        The two paths.

    Raises:
        FileNotFoundError, ValueError: as read_results.
        ImportError: no matplotlib.
    """
    study, records = read_results(folder)
    tasks = by_task(records)
    blocks: list[Block] = [Heading(study["title"], 1), Paragraph(_state(study, tasks))]
    for task in tasks:
        blocks += _task(task, study["study"])
    blocks += _appendix(study)
    html_path, markdown_path = folder / HTML, folder / MARKDOWN
    write_text(html_path, to_html(study["title"], blocks))
    write_text(markdown_path, to_markdown(blocks))
    return html_path, markdown_path


def _state(study: dict, tasks: list[TaskResults]) -> str:
    if not tasks:
        return f"Study of {study['study']}: no run is finished."
    runs = [f"{task.name} ({counted(len(task.records), 'run')})" for task in tasks]
    return f"Study of {study['study']}. Finished so far: {listed(runs)}."


def _task(task: TaskResults, study: str) -> list[Block]:
    blocks: list[Block] = [Heading(task.name, 2), *_summary(task, study)]
    metric = task.metrics[0]
    blocks.append(Heading("Scores", 3))
    blocks += [tables.score_table(task, name) for name in task.metrics]
    if len({task.records[0].is_source(language) for language in task.languages}) > 1:  # else it is the same table
        blocks += [tables.transfer_table(task, name) for name in task.metrics]
    several = len(task.examples) > 1
    if several:
        blocks.append(Figure(plots.score_plot(task), f"{metric_name(metric)}: mean over seeds, band ± sd."))
    if study == "stability":
        blocks.append(Heading("Stability", 3))
        blocks.append(Paragraph(_least_and_most(task)))
    if study == "stability" or not several:
        for examples in task.examples:
            text = f"{metric_name(metric)} with {counted(examples, 'example')}"
            blocks.append(
                Figure(plots.seed_plot(task, examples), f"{text}: a dot for each seed, mean (line) ± sd (box).")
            )
            if study == "stability":
                blocks.append(tables.stability_table(task, examples))
    blocks += _languages(task, several)
    blocks += _training(task)
    return blocks


def _summary(task: TaskResults, study: str) -> list[Block]:
    blocks: list[Block] = []
    if any(series.unaligned != series for series in task.series):
        rivals = f"itself without, {listed(list(RIVALS))}"
        blocks = _comparison(task, compare_methods(task), "each method with alignment", rivals)
    elif any(series.method == FROZEN for series in task.series):  # as for retrieval, where all methods align
        blocks = _comparison(task, compare_with_frozen(task), "each method", "the frozen backbone")
    if study == "pseudo":
        blocks += _comparison(task, compare_variants(task), "each other variant", REAL)
    below = _not_above_majority(task)
    if below:
        blocks.append(Paragraph("Mean accuracy is not above that of always answering the majority class in:"))
        blocks.append(Bullets(below))
    return blocks


def _comparison(task: TaskResults, comparisons: list[Comparison], subject: str, rivals: str) -> list[Block]:
    blocks: list[Block] = [Paragraph(total_sentence(task, comparisons, subject, rivals))]
    if comparisons:
        blocks.append(Bullets(sentences(task, comparisons)))
        blocks.append(Details("Each comparison", [comparison_table(task, comparisons)]))
    return blocks


def _not_above_majority(task: TaskResults) -> list[str]:
    if task.metrics[0] != "accuracy":
        return []
    items = []
    for examples in task.examples:
        majority = task.majority(examples)
        if majority is None:
            continue
        cells = {
            series: task.spread(series, examples, lambda record: record.mean("accuracy")) for series in task.series
        }
        below = [
            f"{series.label} ({number(cell.mean, 1)})"
            for series, cell in cells.items()
            if cell and cell.mean <= majority
        ]
        if below:
            items.append(f"{counted(examples, 'example')} (majority class {number(majority, 1)}): {listed(below)}.")
    return items


def _least_and_most(task: TaskResults) -> str:
    """Which series vary least and most over seeds, by number of examples."""
    metric, parts = task.metrics[0], []
    for examples in task.examples:
        cells = {series: task.spread(series, examples, lambda record: record.mean(metric)) for series in task.series}
        deviations = {series.label: cell.sd for series, cell in cells.items() if cell and cell.sd is not None}
        if len(deviations) > 1:
            least, most = min(deviations, key=deviations.get), max(deviations, key=deviations.get)
            low, high = (number(deviations[label], digits(metric) + 1) for label in (least, most))
            parts.append(f"{counted(examples, 'example')}: smallest for {least} ({low}), largest for {most} ({high})")
    if not parts:
        return "Fewer than two methods have a second seed: standard deviations cannot be compared yet."
    return f"Standard deviation over seeds of mean {metric_name(metric)}, {'; '.join(parts)}."


def _languages(task: TaskResults, several: bool) -> list[Block]:
    blocks: list[Block] = [Heading("By language", 3)]
    if several:
        caption = f"{metric_name(task.metrics[0])} by language: mean over seeds, band ± sd."
        if task.pairs:
            caption += " A panel is the mean of the pairs that begin with its language."
        blocks.append(Figure(plots.language_plot(task), caption))
    main, *others = task.metrics
    blocks += [tables.language_table(task, main, examples) for examples in task.examples]
    for metric in others:
        inner = [tables.language_table(task, metric, examples) for examples in task.examples]
        blocks.append(Details(f"{metric_name(metric)} by language", inner))
    return blocks


def _training(task: TaskResults) -> list[Block]:
    # The number of examples that most series have reached; the largest of several.
    examples = max(task.examples, key=lambda count: (sum(bool(task.cell(one, count)) for one in task.series), count))
    blocks: list[Block] = [Heading("Training and cost", 3)]
    svg = plots.loss_plot(task, examples)
    if svg is not None:
        text = f"Training loss with {counted(examples, 'example')}: mean over seeds, band ± sd. "
        blocks.append(Figure(svg, text + "Losses of methods with other terms do not compare in height."))
        blocks.append(tables.loss_table(task, examples))
    blocks.append(tables.cost_table(task))
    return blocks


def _appendix(study: dict) -> list[Block]:
    blocks: list[Block] = [Heading("How each number was computed", 2), Bullets(_DEFINITIONS)]
    blocks.append(Heading("Configuration and machine", 2))
    for name in ("config", "versions", "machine"):
        text = json.dumps(study[name], indent=2, ensure_ascii=False)
        blocks.append(Details({"config": "configuration"}.get(name, name), [Code(text)]))
    return blocks
