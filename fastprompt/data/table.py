"""Any table as rows, and a task's examples of them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .columns import SYNONYMS, check_columns, guess, how_to_name, names_in, value_of
from .reading import shorten, tell, tell_left_out
from .sources import placed_rows

Source = Any  # a name, a path, or rows: see `iter_rows`


class Tabular(Protocol):
    """What a table is read for: a `fastprompt.tasks.Task`, or what has these of it."""

    columns: Mapping[str, str]
    labels: tuple[str, ...]
    optional: tuple[str, ...]

    def example(self, row: Mapping[str, Any], where: str, number: int, *, labelled: bool = True) -> NamedTuple: ...


def iter_rows(
    source: Source,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    subset: str | None = None,
    format: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, a dictionary each, as they are read.

    Cells of CSV and TSV are strings, "NA" and "null" too. Text is UTF-8, or UTF-16 with its byte order mark.

    Args:
        source: one of
            a file: CSV and TSV with a header, JSON Lines, JSON (a list of objects, or SQuAD's form), Parquet, CoNLL, or
            plain text, one a line, in a column `text`;
            "-": standard input, in any of these formats but Parquet;
            a folder with a file for each split, or as `datasets` saves one; a dataset's name on the hub;
            a `datasets.Dataset`, or dictionaries.
            A slice may follow a name, as in "train.csv[:1400]".
        split: which split, of a folder or dataset with several; a slice may follow.
        columns: names to read columns under, and their names in the table; what is within a column is named with a dot:
            {"source": "translation.en"}.
        subset: the configuration of a dataset on the hub.
        format: what a file is, one of `fastprompt.data.files.FORMATS`, where its name and first lines do not tell.

    Example:
        >>> [row] = iter_rows([{"review": "Great!", "stars": 5}], columns={"text": "review"})
        >>> row
        {'review': 'Great!', 'stars': 5, 'text': 'Great!'}

    Raises:
        OSError: a file or dataset is not there.
        ImportError: the extra `train` is needed, and is not installed.
        ValueError: naming file and line, or row, what cannot be read; or a column, split or slice that there is not.
    """
    columns = check_columns(columns, columns or ())
    known = {name for names in SYNONYMS.items() for name in (names[0], *names[1])} | {*columns.values()}
    begun = False
    for _, where, row in placed_rows(source, split, subset, format, known):
        named = {}
        for name, column in columns.items():
            try:
                named[name] = value_of(row, column)
            except KeyError:
                if not begun:
                    raise ValueError(_absent(where, name, column, names_in(row))) from None
        begun = True
        yield {**row, **named}


def read_rows(source: Source, **options) -> list[dict[str, Any]]:
    """The rows of a table as a list of dictionaries by column.

    Args:
        source, options: as `iter_rows` takes them.

    Example:
        >>> read_rows("train.csv[:2]", columns={"text": "review"})
        [{'review': 'Great!', 'stars': '5', 'text': 'Great!'}, {'review': 'Dull.', 'stars': '2', 'text': 'Dull.'}]

    Raises:
        OSError, ImportError, ValueError: as `iter_rows`; also a ValueError if there are no rows.
    """
    return _not_empty(list(iter_rows(source, **options)), source)


def iter_examples(
    task: Tabular,
    source: Source,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    subset: str | None = None,
    format: str | None = None,
    labelled: bool = True,
    usual: Mapping[str, str] | None = None,
) -> Iterator[NamedTuple]:
    """Yield the examples of a task in the rows of a table, as they are read.

    A labelled row with null, or None, in a column that is needed is left out; the logger "fastprompt" tells how many
    were. Without labels such a row is an error: predictions are to be those of the rows, one by one.

    Args:
        task: the task, which says which columns it reads and makes the examples.
        source, split, subset, format: as `iter_rows` takes them.
        columns: what the table calls columns of the task. Those left out are found by the task's own name for them, or
            by one that is usual; the logger "fastprompt" tells which were taken.
        labelled: whether there must be labels.

    Raises:
        OSError, ImportError: as `iter_rows`.
        ValueError: as `iter_rows`; also if it cannot be told which column is which, or a row is not as the task reads
            it.
    """
    wanted = [*dict.fromkeys([*task.columns, *task.labels, *task.optional])]
    columns = check_columns(columns, wanted)
    needed = [name for name in wanted if name not in task.optional and (labelled or name not in task.labels)]
    known = {name for each in wanted for name in (each, *SYNONYMS.get(each, ()))} | {*columns.values()}
    known |= {*(usual or {}).values()}
    resolved: dict[tuple[str, ...], dict[str, str]] = {}
    without, total, told = [], 0, []
    for number, where, row in placed_rows(source, split, subset, format, known):
        names = names_in(row)
        if not resolved and usual:
            there = {name: column for name, column in usual.items() if column.split(".")[0] in row}
            columns = check_columns(there, wanted) | columns
        if names not in resolved:
            found, unclear = guess(names, wanted, columns)
            asked = [name for name in columns if labelled or name not in task.labels] if not resolved else []
            missing = [name for name in (*asked, *needed) if name not in found]
            _check_found(where, names, columns, unclear, missing)
            if found and found.items() not in told:
                _tell_found(where, names, found)
                told.append(found.items())
            resolved[names] = found
        named = {name: value for name, value in row.items() if name not in columns}
        for name, column in resolved[names].items():
            with suppress(KeyError):
                named[name] = value_of(row, column)
        if empty := [name for name in needed if name in named and named[name] is None]:
            if not labelled:
                raise ValueError(f"{where}, column {empty[0]}: got null, expected a value to predict for")
            without.append(f"{empty[0]} (the first is {where.rpartition(', ')[2]})")
            continue
        total += 1
        try:
            example = task.example(named, where, number, labelled=labelled)
        except (KeyError, ValueError) as error:
            lacking = _lacking(str(error), where, names, [name for name in wanted if name not in named], needed)
            if lacking is None:
                raise
            raise ValueError(lacking) from error
        yield example
    if without:
        tell_left_out(where.rpartition(", ")[0], len(without), total + len(without), f"rows, without {without[0]},")


def read_examples(task: Tabular, source: Source, **options) -> list[NamedTuple]:
    """The examples of a task in the rows of a table, as a list.

    Args:
        task, source, options: as `iter_examples` takes them.

    Example:
        >>> rows = [{"sentence": "Great!", "label": "good"}]
        >>> read_examples(tasks.get("classification"), rows)
        [Text(id=0, text='Great!', text_pair=None, label='good')]

    Raises:
        OSError, ImportError, ValueError: as `iter_examples`; also a ValueError if there are no rows.
    """
    return _not_empty(list(iter_examples(task, source, **options)), source)


def _check_found(
    where: str, names: Sequence[str], columns: Mapping[str, str], unclear: Mapping[str, list[str]], missing: list[str]
) -> None:
    """Errors about columns that were named and are not there, and about such as might be one or the other."""
    for name in missing:
        if name in columns:
            raise ValueError(_absent(where, name, columns[name], names))
        if name in unclear:
            several = " and ".join(unclear[name])
            raise ValueError(f"{where}: {several} could each be {name}, of {_listed(names)}; {how_to_name(name)}")


def _lacking(fault: str, where: str, names: Sequence[str], absent: Sequence[str], needed: Sequence[str]) -> str | None:
    """What to say, with the columns that there are, where a task's fault with a row is that it lacks a column."""
    for name in absent:
        how = f"only {_listed(names)}; {how_to_name(name)}"
        if name in needed:
            return f"{where}: no column for {name}, {how}"
        if re.match(rf"{re.escape(where)}, (column )?{name}\b", fault):  # for which the task may take others
            return f"{fault}. There are {how}"
    return None


def _tell_found(where: str, names: Sequence[str], found: Mapping[str, str]) -> None:
    taken = [name if name == column else f"{column} as {name}" for name, column in found.items()]
    used = [f"{column}." for column in found.values()]
    over = [
        name for name in names if not any(f"{name}.".startswith(each) or each.startswith(f"{name}.") for each in used)
    ]
    tell("%s: read %s; not read: %s", where.rpartition(", ")[0], ", ".join(taken), ", ".join(over) or "none")


def _absent(where: str, name: str, column: str, names: Sequence[str]) -> str:
    return f"{where}: no column {column!r} for {name}, only {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(shorten, names)) or "none"


def _not_empty(found: list, source: Source) -> list:
    if not found:
        name = source if isinstance(source, str | Path) else "source"
        raise ValueError(f"{name}: no rows in it, expected at least one")
    return found
