"""The table that grows while a benchmark runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fastprompt._extras import require

from .wording import best_text, line, ours_text, rate_text


@contextmanager
def live_table(groups: Sequence[str]) -> Iterator[Callable[[dict], None]]:
    """Give a function that shows a record: on a terminal in a table below the others, else as a line of its own.

    While it runs the table has its last rows, as many as the terminal has room for; in the end all of them.
    """
    console = require("rich.console", "train").Console()
    if not console.is_terminal:
        yield lambda record: print(line(record), flush=True)
        return
    live = require("rich.live", "train").Live
    records: list[dict] = []
    recent: list[dict] = []
    with live(console=console) as shown:

        def show(record: dict) -> None:
            records.append(record)
            recent.append(record)
            while len(recent) > 1 and len(console.render_lines(_table(groups, recent))) >= console.height:
                del recent[0]
            shown.update(_table(groups, recent))

        try:
            yield show
        finally:
            shown.update(_table(groups, records))


def _table(groups: Sequence[str], records: Sequence[dict]):
    rich = require("rich.table", "train")
    text = require("rich.text", "train").Text
    table = rich.Table(title=", ".join(groups))
    for name in ("case", "ours", "best rival", "GFLOP/s"):
        table.add_column(name, justify="left" if name == "case" else "right", overflow="fold")
    for record in records:
        # Text: in a string rich would take what stands in brackets for markup.
        cells = map(text, (ours_text(record), best_text(record), rate_text(record)))
        style = "red" if record.get("wrong") else None
        table.add_row(text(record["name"]), *cells, style=style)
    return table
