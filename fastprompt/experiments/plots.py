"""The plots of a report, as SVG elements to stand in an HTML page."""

import io
import math
import re
from collections.abc import Callable

from fastprompt._extras import require

from .aggregate import Series, TaskResults, block_means, mean, spread
from .records import Record
from .wording import counted, metric_with_unit

# Okabe and Ito's colours, which colour-blind readers tell apart, but for the yellow, too faint on white.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7")
_MARKERS = "osD^vPX*"  # one more than colours, so that they meet again late
_DASHES = ("-", "--", ":", "-.")
_POINTS = 60  # of a loss curve
_ACROSS = 4  # small multiples in a row
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names may hold dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def score_plot(task: TaskResults) -> str:
    """Main metric, mean over languages, against the number of examples: a line for each series, ± sd."""
    metric = task.metrics[0]

    def draw(figure) -> None:
        axes = figure.subplots()
        lines = _lines(axes, task, lambda record: record.mean(metric))
        axes.set(xlabel="labelled training examples", ylabel=f"mean {metric_with_unit(metric)}")
        _legend(figure, lines)

    return _svg(f"{task.name}: mean {metric_with_unit(metric)} by number of examples", (8, 4.5), draw)


def language_plot(task: TaskResults) -> str:
    """The same, a panel for each language; pairs of languages are averaged by the first."""
    metric = task.metrics[0]
    panels = _panels(task)
    across = min(_ACROSS, len(panels))
    rows = math.ceil(len(panels) / across)

    def draw(figure) -> None:
        grid = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, (name, keys) in zip(grid.flat, panels.items(), strict=False):
            lines = _lines(axes, task, lambda record, keys=keys: mean([record.scores[key][metric] for key in keys]))
            axes.set_title(name, fontsize=10)
            axes.tick_params(axis="x", labelrotation=60, labelbottom=True)
        figure.supxlabel("labelled training examples", fontsize=10)
        figure.supylabel(metric_with_unit(metric), fontsize=10)
        _legend(figure, lines)

    title = f"{task.name}: {metric_with_unit(metric)} by number of examples, for each language"
    return _svg(title, (9.5, 2.2 * rows + 0.8), draw)


def seed_plot(task: TaskResults, examples: int) -> str:
    """Main metric, mean over languages: a dot for each seed of each series, a bar from mean - sd to mean + sd."""
    metric = task.metrics[0]
    found = [series for series in task.series if task.cell(series, examples)]

    def draw(figure) -> None:
        axes = figure.subplots()
        for row, series in enumerate(found):
            values = [record.mean(metric) for record in task.cell(series, examples)]
            colour, marker, _ = _look(task, series)
            middle = spread(values)
            axes.plot([middle.mean] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2)
            if middle.sd is not None:
                axes.barh(row, 2 * middle.sd, 0.5, left=middle.mean - middle.sd, color=colour, alpha=0.18)
            # Seeds stand one below the other, lest equal scores hide each other.
            offsets = [0.4 * (index + 0.5) / len(values) - 0.2 for index in range(len(values))]
            axes.plot(values, [row + offset for offset in offsets], marker, color=colour, markersize=5)
        axes.set_yticks(range(len(found)), [series.label for series in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"mean {metric_with_unit(metric)}")

    title = f"{task.name}: {metric_with_unit(metric)} of each seed, {counted(examples, 'example')}"
    return _svg(title, (8, 0.5 * len(found) + 1), draw)


def loss_plot(task: TaskResults, examples: int) -> str | None:
    """Training loss of each series, mean over the seeds ± sd, as far as all seeds went; None without any loss."""
    curves = {}
    for series in task.series:
        runs = [record.losses for record in task.cell(series, examples) if record.losses]
        if runs:
            shortest = min(map(len, runs))
            ends = [shortest * (part + 1) / min(_POINTS, shortest) for part in range(min(_POINTS, shortest))]
            blocks = [block_means(losses[:shortest], _POINTS) for losses in runs]
            curves[series] = (ends, [spread(values) for values in zip(*blocks, strict=True)])
    if not curves:
        return None

    def draw(figure) -> None:
        axes = figure.subplots()
        lines = {series.label: _line(axes, task, series, *curve, mark=False) for series, curve in curves.items()}
        axes.set(xlabel="training step", ylabel="training loss")
        _legend(figure, lines)

    return _svg(f"{task.name}: training loss, {counted(examples, 'example')}", (8, 4.5), draw)


def _lines(axes, task: TaskResults, value: Callable[[Record], float]) -> dict[str, object]:
    """Draw `value` of every series against the number of examples; label -> line."""
    lines = {}
    for series in task.series:
        found = [examples for examples in task.examples if task.cell(series, examples)]
        spreads = [task.spread(series, examples, value) for examples in found]
        lines[series.label] = _line(axes, task, series, found, spreads)
    if task.examples[0] > 0:
        axes.set_xscale("log", base=2)
    else:  # a logarithm has no 0
        axes.set_xscale("symlog", base=2, linthresh=task.examples[1])
    axes.set_xticks(task.examples, [f"{examples:,}" for examples in task.examples])
    axes.minorticks_off()
    return lines


def _line(axes, task: TaskResults, series: Series, x: list[float], spreads: list, mark: bool = True) -> object:
    colour, marker, dash = _look(task, series)
    (line,) = axes.plot(
        x, [one.mean for one in spreads], dash, color=colour, marker=marker if mark else "", markersize=4, linewidth=1.5
    )
    low, high = ([one.mean + side * (one.sd or 0.0) for one in spreads] for side in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    return line


def _look(task: TaskResults, series: Series) -> tuple[str, str, str]:
    """Colour and marker by method, dashes by variant."""
    methods = list(dict.fromkeys(one.method for one in task.series))
    variants = list(dict.fromkeys(one.variant for one in task.series))
    method, variant = methods.index(series.method), variants.index(series.variant)
    return _COLOURS[method % len(_COLOURS)], _MARKERS[method % len(_MARKERS)], _DASHES[variant % len(_DASHES)]


def _panels(task: TaskResults) -> dict[str, list[str]]:
    """Title of a panel -> its languages: each one, or the pairs of each first language."""
    panels: dict[str, list[str]] = {}
    for language in task.languages:
        panels.setdefault(f"{language.split('-')[0]}-*" if task.pairs else language, []).append(language)
    return panels


def _legend(figure, lines: dict[str, object]) -> None:
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=3, fontsize=9)


def _svg(title: str, size: tuple[float, float], draw: Callable) -> str:
    """The figure that `draw` fills, named `title` for who cannot see it: the same text for the same numbers."""
    matplotlib = require("matplotlib", "train")
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    file = io.StringIO()
    # The salt differs by figure: ids, such as those of clip paths, are then unique in the page.
    with matplotlib.rc_context({"svg.hashsalt": title, **_STYLE}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # nothing refers to groups
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(title)}"', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
