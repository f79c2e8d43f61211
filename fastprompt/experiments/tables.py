"""The tables of a report."""

from collections.abc import Callable

from .aggregate import (
    Series,
    Spread,
    TaskResults,
    block_means,
    gradient_spread,
    loss_variance,
    mean,
)
from .document import Table
from .records import Record
from .wording import (
    MISSING,
    counted,
    digits,
    metric_with_unit,
    number,
    significant,
    spread_text,
)

MAJORITY_ROW = "majority class"
PARTS = 5  # of a training, in the table of losses


def score_table(task: TaskResults, metric: str) -> Table:
    """Series by number of examples: macro mean over all languages."""
    table = _by_examples(
        task, metric, lambda record: record.mean(metric), f"Mean {metric_with_unit(metric)} over all languages"
    )
    majority = [task.majority(examples) for examples in task.examples]
    if metric == "accuracy" and any(value is not None for value in majority):
        table.rows.append([MAJORITY_ROW, *(number(value, digits(metric)) for value in majority)])
    return table


def transfer_table(task: TaskResults, metric: str) -> Table:
    """Series by number of examples: macro mean over the languages other than the source."""
    title = f"Transfer: mean {metric_with_unit(metric)} over the languages other than the source"
    return _by_examples(task, metric, lambda record: record.transfer(metric), title)


def language_table(task: TaskResults, metric: str, examples: int) -> Table:
    """Series by language, for one number of examples."""
    series = _finished(task, examples)
    grid = [
        [
            *(task.spread(one, examples, lambda record, at=at: record.scores[at][metric]) for at in task.languages),
            task.spread(one, examples, lambda record: record.mean(metric)),
        ]
        for one in series
    ]
    columns = ["method", *task.languages, "mean"]
    title = f"{metric_with_unit(metric)} by language, {counted(examples, 'example')}"
    table = _scores(task, metric, title, columns, series, grid)
    if metric == "accuracy" and task.majority(examples) is not None:
        values = [*(task.majority(examples, at) for at in task.languages), task.majority(examples)]
        table.rows.append([MAJORITY_ROW, *(number(value, digits(metric)) for value in values)])
    return table


def cost_table(task: TaskResults) -> Table:
    """What a run of each series takes: means over the seeds."""
    rows = []
    for examples in task.examples:
        for series in _finished(task, examples):
            runs = task.cell(series, examples)
            parameters, seconds, steps, memory = (
                mean([getattr(run, name) for run in runs])
                for name in ("trained_parameters", "seconds", "steps", "peak_memory_mb")
            )
            rows.append(
                [
                    series.label,
                    f"{examples:,}",
                    number(parameters, 0),
                    number(seconds, 1),
                    number(steps, 0),
                    number(memory, 0),
                    str(len(runs)),
                ]
            )
    columns = ["method", "examples", "trained parameters", "seconds", "steps", "peak memory (MB)", "seeds"]
    return Table("Cost of one run: means over the seeds.", columns, rows)


def stability_table(task: TaskResults, examples: int) -> Table:
    """Series by mean, standard deviation and worst seed of the main metric, and how smooth their training was."""
    metric = task.metrics[0]
    places = digits(metric)
    rows = []
    for series in _finished(task, examples):
        scores = task.spread(series, examples, lambda record: record.mean(metric))
        worst = min(task.cell(series, examples), key=lambda record: record.mean(metric))
        variance = task.spread(series, examples, lambda record: loss_variance(record.losses))
        gradients = task.spread(series, examples, lambda record: gradient_spread(record.gradient_norms))
        rows.append(
            [
                series.label,
                number(scores.mean, places),
                number(scores.sd, places + 1),
                f"{number(worst.mean(metric), places)} (seed {worst.seed})",
                significant(variance and variance.mean),
                significant(gradients and gradients.mean),
                str(scores.count),
            ]
        )
    title = (
        f"Stability with {counted(examples, 'example')}: mean {metric_with_unit(metric)} over all languages, by seed."
    )
    columns = ["method", "mean", "sd", "worst seed", "loss-curve variance", "gradient-norm spread", "seeds"]
    return Table(title, columns, rows)


def loss_table(task: TaskResults, examples: int) -> Table:
    """Series by part of the training: the mean loss."""
    rows = []
    for series in _finished(task, examples):
        parts = [block_means(record.losses, PARTS) for record in task.cell(series, examples)]
        means = [mean(list(part)) for part in zip(*(part for part in parts if part), strict=False)]
        rows.append([series.label, *map(significant, means), *[MISSING] * (PARTS - len(means))])
    parts = [f"part {part}" for part in range(1, PARTS + 1)]
    title = f"Training loss with {counted(examples, 'example')}: mean of each of {PARTS} equal parts of the training."
    return Table(title, ["method", *parts], rows)


def _finished(task: TaskResults, examples: int) -> list[Series]:
    return [series for series in task.series if task.cell(series, examples)]


def _by_examples(task: TaskResults, metric: str, value: Callable[[Record], float | None], title: str) -> Table:
    grid = [[task.spread(series, examples, value) for examples in task.examples] for series in task.series]
    columns = ["method", *(counted(examples, "example") for examples in task.examples)]
    return _scores(task, metric, title, columns, task.series, grid)


def _scores(
    task: TaskResults,
    metric: str,
    title: str,
    columns: list[str],
    series: list[Series],
    grid: list[list[Spread | None]],
) -> Table:
    most, places = task.most_seeds, digits(metric)
    rows = [
        [one.label, *(spread_text(cell, places, most) for cell in cells)]
        for one, cells in zip(series, grid, strict=True)
    ]
    if most == 1:
        caption = f"{title}; 1 seed, so no standard deviation. Bold: the highest of its column."
    else:
        caption = f"{title}; mean ± standard deviation over {most} seeds. Bold: the highest mean of its column."
    if any(cell is not None and cell.count < most for cells in grid for cell in cells):
        caption += " (n=...): fewer seeds are finished."
    if any(cell is None for cells in grid for cell in cells):
        caption += f" {MISSING}: no finished run."
    return Table(caption, columns, rows, _best(grid, places))


def _best(grid: list[list[Spread | None]], places: int) -> set[tuple[int, int]]:
    """(row, column of the table) of the highest means of each column with two or more, as they are printed."""
    best = set()
    for column, cells in enumerate(zip(*grid, strict=True), start=1):
        means = {row: round(cell.mean, places) for row, cell in enumerate(cells) if cell is not None}
        if len(means) > 1:
            best |= {(row, column) for row, value in means.items() if value == max(means.values())}
    return best
