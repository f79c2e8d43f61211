"""Rows written one by one: CSV, TSV or JSON lines, to a file or to standard output."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}


@contextmanager
def written(output: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a row; a file is there, whole, when all are written. To "-" go JSON lines.

    Raises:
        ValueError: another suffix than .csv, .tsv and .jsonl.
    """
    if output == "-":
        yield _writer(sys.stdout, None)
        return
    path = Path(output)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"output must end in {', '.join(_SUFFIXES)} or be -, got {output!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            yield _writer(file, _SUFFIXES[path.suffix.lower()])
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _writer(file: TextIO, delimiter: str | None) -> Callable[[dict[str, Any]], None]:
    if delimiter is None:
        return lambda row: print(json.dumps(row, ensure_ascii=False, default=str), file=file)
    table: csv.DictWriter | None = None

    def write(row: dict[str, Any]) -> None:
        nonlocal table
        if table is None:
            table = csv.DictWriter(file, list(row), delimiter=delimiter, lineterminator="\n")
            table.writeheader()
        table.writerow({name: _cell(value) for name, value in row.items()})

    return write


def _cell(value: Any) -> Any:
    """Lists, and names and values, as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
