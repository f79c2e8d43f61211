"""The plots of a benchmark, as SVG files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastprompt._extras import require
from fastprompt._files import write_aside

from .case import OURS
from .growth import Fit, Growth, growths
from .records import over_ours, seconds, useful_flops

# Okabe and Ito's colours, which colour-blind readers tell apart, but for the yellow, too faint on white.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7")
_MARKERS = "osD^vPX"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastprompt",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def write_plots(result: dict, folder: Path) -> list[Path]:
    """Write the plots for which there is data.

    For each group GROUP-rivals.svg, time over ours by size, and GROUP-rate.svg, useful FLOP/s by size; for each sweep
    growth-GROUP-SWEEP-OTHERS.svg, time and peak memory by what grows.

    Returns:
        Their paths.

    Raises:
        ImportError: no matplotlib.
    """
    records = result["cases"]
    figures: dict[str, tuple[tuple[float, float], Callable]] = {}
    for group in dict.fromkeys(record["group"] for record in records):
        own = [record for record in records if record["group"] == group and _size(record)]
        if any(_others(record) for record in own):
            figures[f"{group}-rivals"] = (8, 4.5), lambda figure, own=own: _rivals(figure, own)
        rated = [record for record in own if useful_flops(record)]
        if rated:
            figures[f"{group}-rate"] = (8, 4), lambda figure, rated=rated: _rate(figure, rated)
    for growth in growths(records):
        name = "-".join(["growth", growth.group, growth.sweep, *growth.label.split()[1:]])
        figures[name] = (9.5, 4.5), lambda figure, growth=growth: _growth(figure, growth)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / f"{name}.svg", *figure) for name, figure in figures.items()]


def _rivals(figure, records: Sequence[dict]) -> None:
    axes = figure.subplots()
    for number, way in enumerate(dict.fromkeys(way for record in records for way in _others(record)), start=1):
        found = sorted((_size(record), over_ours(record, way)) for record in records if way in _others(record))
        sizes, overs = zip(*found, strict=True)
        medians = [over.median for over in overs]
        below = [over.median - over.low for over in overs]
        above = [over.high - over.median for over in overs]
        look = {"color": _look(number)[0], "marker": _look(number)[1], "markersize": 5}
        axes.errorbar(sizes, medians, [below, above], linestyle="", elinewidth=1, label=way, **look)
    axes.axhline(1, color="#666666", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=_size_label(records), ylabel="time over ours (above 1: ours is faster)")
    _plain_numbers(axes.yaxis)
    axes.set_title(records[0]["group"])
    figure.legend(loc="outside upper center", ncols=4)


def _rate(figure, records: Sequence[dict]) -> None:
    axes = figure.subplots()
    found = sorted((_size(record), useful_flops(record) / record["matrix_gflops"] / 1e7) for record in records)
    axes.plot(*zip(*found, strict=True), _MARKERS[0], color=_COLOURS[0], markersize=5)
    axes.set(xscale="log", xlabel=_size_label(records), ylabel="useful FLOP/s of ours, % of the matrix rate")
    axes.set_ylim(bottom=0)
    axes.set_title(records[0]["group"])


def _growth(figure, growth: Growth) -> None:
    drawn = [
        (label, scale, fits)
        for label, scale, fits in (("ms", 1e3, growth.seconds), ("peak MiB", 2**-20, growth.peak_bytes))
        if fits
    ]
    ways = list(dict.fromkeys([*growth.seconds, *growth.peak_bytes]))
    for axes, (label, scale, fits) in zip(figure.subplots(1, len(drawn), squeeze=False).flat, drawn, strict=True):
        for way, fit in fits.items():
            sizes, values = zip(*fit.points, strict=True)
            colour, marker = _look(ways.index(way))
            axes.plot(
                sizes, [scale * value for value in values], marker=marker, color=colour, label=_exponent(way, fit)
            )
        axes.set(xscale="log", yscale="log", xlabel=growth.sweep, ylabel=label)
        _plain_numbers(axes.yaxis)
        sizes = sorted({size for fit in fits.values() for size, _ in fit.points})
        axes.set_xticks(sizes, map(str, sizes))
        axes.xaxis.minorticks_off()
        axes.legend(fontsize=8)
    figure.suptitle(f"{growth.label}: exponents of {growth.sweep}, in brackets over the upper half", fontsize=10)


def _plain_numbers(axis) -> None:
    ticker = require("matplotlib.ticker", "train")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _exponent(way: str, fit: Fit) -> str:
    return f"{way}: {fit.exponent:.2f} [{fit.upper:.2f}]"


def _others(record: dict) -> list[str]:
    return [way for way in record["ways"] if way != OURS and over_ours(record, way)]


def _size(record: dict) -> int | None:
    """FLOPs, or bytes where there are none; None: ours has no time, or the case tells no size."""
    return (record.get("flops") or record.get("bytes")) if seconds(record, OURS) else None


def _size_label(records: Sequence[dict]) -> str:
    return "FLOPs that any way must do" if records[0]["flops"] else "bytes that any way must move"


def _look(number: int) -> tuple[str, str]:
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]


def _write(path: Path, size: tuple[float, float], draw: Callable) -> Path:
    matplotlib = require("matplotlib", "train")
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        # Without the date the same result gives the same file.
        write_aside(path, lambda aside: figure.savefig(aside, metadata={"Date": None}))
    return path
