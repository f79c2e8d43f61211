"""Examples of rows in any form; and what the tasks share in reading one, and in telling what of it is not used."""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastprompt.data.reading import shorten, tell
from fastprompt.data.table import iter_examples

from .base import Item, Task

_SHOWN = 20  # names of classes in one line


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: nothing, a blank text, or NaN, as tables of numbers have it."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value of a column that must be there; a ValueError names the others if it is not."""
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}, only {', '.join(map(repr, row)) or 'none'}")
    return row[column]


def text_in(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column, as it stands."""
    value = cell(row, column, where)
    if not isinstance(value, str) or is_missing(value):
        raise ValueError(f"{where}, {column}: must be a text, got {shorten(value)}")
    return value


def id_in(row: Mapping[str, Any], number: int) -> Any:
    """The id of a row: its number, where it has none of its own."""
    return number if is_missing(row.get("id")) else row["id"]


def tell_cut(items: Sequence[Item], max_length: int, total: int) -> None:
    """Say how many of the examples that are predicted for were cut."""
    cut = len({item.example for item in items if item.cut})
    if cut:
        text = "%d of %d examples have more than max_length %d tokens, and are cut"
        logging.getLogger("fastprompt").warning(text, cut, total, max_length)


def tell_names(what: str, counts: Counter[str]) -> None:
    """Say which classes or tags the examples have, and how often: a stray line of a file is one of the rarest."""
    names = [f"{shorten(name)} {count}" for name, count in sorted(counts.items(), key=lambda each: (-each[1], each[0]))]
    if len(names) > _SHOWN:
        names[_SHOWN - 3 : -2] = ["..."]
    tell("%d %s: %s", len(counts), what, ", ".join(names))


def examples_of(
    task: Task, data: Any, columns: Mapping[str, str] | None = None, *, labelled: bool = True
) -> Iterator[NamedTuple]:
    """The task's examples in rows of whatever form, as they are read.

    Args:
        data: texts, where the task reads one; tuples with a value for each column, the label last; dicts by column; the
            task's own examples, which are taken as they are; a `datasets.Dataset`, a pandas DataFrame, or the path of
            a table.
        columns, labelled: as `fastprompt.data.table.iter_examples` takes them.

    Raises:
        TypeError, ValueError: no rows, or one that is not as the task reads it: which, and what came.
    """
    if hasattr(data, "iterrows"):  # a DataFrame
        data = data.to_dict("records")
    if not isinstance(data, str | Path | Mapping):
        if not isinstance(data, Iterable):
            raise TypeError(f"data must be rows, or the path of a table, got {shorten(data)}")
        rows = iter(data)
        first = next(rows, None)
        data = itertools.chain([first], rows) if rows is data else data  # what is an iterator itself begins only once
        if first is None:
            return iter(())
        if hasattr(first, "_fields"):
            return iter(data)
        if not isinstance(first, Mapping):
            data = (_row(task, each, number, labelled) for number, each in enumerate(data))
    return iter_examples(task, data, columns=columns, labelled=labelled)


def _row(task: Task, value, number: int, labelled: bool) -> dict[str, Any]:
    """A row by column of a text, or of a tuple of what stands in the columns."""
    names = [name for name in task.columns if name != "id" and (labelled or name not in task.labels)]
    needed = [name for name in names if name not in task.optional or name in task.labels]
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "messages" in names:
        return {"messages": value}
    if isinstance(value, str) or len(names) == 1:
        value = (value,)
    if isinstance(value, list | tuple):
        chosen = needed if len(value) == len(needed) else names[: len(value)]
        if len(chosen) == len(value) and set(needed) <= set(chosen):
            return dict(zip(chosen, value, strict=True))
    raise ValueError(
        f"data must have {', '.join(needed or names[:1])} in each row, got {shorten(value)} in row {number}"
    )
