"""fastprompt predict: a task's predictions of new texts, any number of them."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer

from .app import Adapter, Backbone, BatchSize, Columns, Device, Option, app, quiet
from .data import recorded_columns
from .options import columns_of
from .progress import counting
from .rows import written

_CHUNK = 4096  # rows in memory, among which batches of like length are made


@app.command()
def predict(
    adapter: Adapter,
    input: Annotated[str, Option(help="Texts without labels: CSV, TSV, JSON lines, Parquet, text; - for stdin.")],
    output: Annotated[str, Option(help="CSV, TSV or JSON lines: your columns and the prediction; - for stdout.")] = "-",
    columns: Columns = None,
    batch_size: BatchSize = 32,
    backbone: Backbone = None,
    device: Device = None,
) -> None:
    """Predict with the task of a run: the input's rows, with prediction and probability or score."""
    from fastprompt.inference import load

    named, count = columns_of("columns", columns), 0
    with written(output) as write:  # an output that cannot be written is told before the model is loaded
        quiet()
        loaded = load(adapter, backbone=backbone, device=device)
        with counting("inputs") as on_batch:
            usual = None if named else recorded_columns(loaded)
            for row in predictions(loaded, input, named, batch_size, on_batch, usual):
                write(row)
                count += 1
        if count == 0:
            raise ValueError(f"{input}: no rows in it, expected at least one")
    if output != "-":
        typer.echo(f"{count} predictions are in {output}")


def predictions(
    loaded,
    source: str,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
    usual: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a table with what is predicted of each, some thousands read at a time.

    Raises:
        OSError, ValueError: as `fastprompt.data.table.iter_examples`; also for a column of a prediction's name.
    """
    from fastprompt.data.columns import SYNONYMS
    from fastprompt.data.sources import placed_rows
    from fastprompt.data.table import iter_examples

    if loaded.task is None:
        raise ValueError("adapter must be the run of a task: this one has none; embed and search are what it can do")
    task = loaded.learner.task
    known = {each for name in task.columns for each in (name, *SYNONYMS.get(name, ()))} | {*(columns or {}).values()}
    known |= {*(usual or {}).values()}
    held: list[tuple[str, dict[str, Any]]] = []

    def holding() -> Iterator[dict[str, Any]]:
        for _, where, row in placed_rows(source, None, None, None, known):
            held.append((where, row))
            yield row

    examples = iter_examples(task, holding(), columns=columns, labelled=False, usual=usual)
    while True:
        try:
            chunk = list(itertools.islice(examples, _CHUNK))
        except ValueError as error:
            what = re.fullmatch(r"rows, row \d+(.*)", str(error), re.DOTALL)
            raise (ValueError(held[-1][0] + what[1]) if what and held else error) from error
        if not chunk:
            return
        found = loaded.predict(chunk, batch_size=batch_size, on_batch=on_batch)
        for (where, row), made in zip(held, found, strict=True):
            twice = sorted(row.keys() & made.keys())
            if twice:
                raise ValueError(f"{where}: must have no column {twice[0]!r}: what is predicted gets that name")
            yield row | made
        held.clear()
