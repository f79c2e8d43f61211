"""What the readers share: text with errors that name the line, and files or rows found by the name of their source."""

import codecs
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastprompt._extras import require


def read_text(path: str | Path) -> str:
    """Read UTF-8, a byte order mark passed over; a ValueError names file, line and byte of what is not UTF-8."""
    raw = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}, byte {column}: 0x{raw[error.start]:02x} is not UTF-8 ({error.reason})"
        ) from error


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of UTF-8 text, which end with LF or CRLF; errors as of `read_text`."""
    # Not splitlines(), which also breaks at characters that belong to a sentence, such as U+2028.
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json(path: str | Path) -> Any:
    """Read JSON; a ValueError names file, line and column of what is none, or as of `read_text`."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error


def find_file(data: str | Path, names: Sequence[str]) -> Path | None:
    """Return the first of `names` that is a file in the folder `data`.

    None if `data` is for `load_rows`: no folder but a dataset's name on the hub, or a folder with parquet files.

    Raises:
        FileNotFoundError: a folder with neither.
    """
    folder = Path(data)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if folder.is_dir() and next(folder.rglob("*.parquet"), None) is None:
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(names)}, nor parquet files of a dataset")
    return None


def load_rows(dataset_name: str | Path, config: str, split: str, columns: Sequence[str]) -> Any:
    """Load a split through `datasets`, with the given columns alone; iterating over it gives dictionaries.

    Raises:
        ImportError: without the extra `hub`.
        OSError: the dataset is not there or cannot be reached.
        ValueError: no such config, split or column, or files that cannot be read.
    """
    datasets = require("datasets", "hub")
    where = f"{dataset_name}, config {config}, split {split}"
    try:
        rows = datasets.load_dataset(str(dataset_name), config, split=split)
    except OSError:  # some of them are DatasetsErrors, too
        raise
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(f"{where}: no column {', '.join(missing)}, only {', '.join(rows.column_names)}")
    return rows.select_columns(list(columns))


def tell_left_out(where: str | Path, count: int, total: int, what: str) -> None:
    """Say how much of what was read is not used."""
    if count:
        logging.getLogger("fastprompt").warning("%s: %d of %d %s are left out", where, count, total, what)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that lists `choices` unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def shorten(value: Any) -> str:
    """The value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 62 else text[:59] + "..."
