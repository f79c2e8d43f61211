"""What the readers share: text with errors that name the line, and files or rows found by the name of their source."""

import codecs
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastprompt._extras import require

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_BLOCK = 1 << 22
_SLICED = re.compile(r"(?P<name>.+?)(?:\[(?P<begin>\d*):(?P<end>\d*)\])?")


def iter_lines(stream: BinaryIO, where: str | Path) -> Iterator[str]:
    """Yield the lines of UTF-8, or of UTF-16 if a byte order mark says so, without what ends them, as they come in.

    A line ends with LF or CRLF; in a text that has none of them, with CR.

    Raises:
        ValueError: naming `where`, line and byte: what is not in that encoding, or a zero byte, as UTF-16 without its
            mark has them.
    """
    raw = stream.read1(_BLOCK)
    while 0 < len(raw) < 4 and (more := stream.read1(_BLOCK)):
        raw += more
    mark, encoding = next((each for each in _MARKS if raw.startswith(each[0])), (b"", "utf-8"))
    raw = raw.removeprefix(mark)
    decoder = codecs.getincrementaldecoder(encoding)()
    number, rest, end = 0, "", ""

    def fault(before: str, what: str) -> ValueError:
        last = end or "\n"
        line, byte = number + before.count(last) + 1, len(before.rpartition(last)[2].encode(encoding)) + 1
        return ValueError(f"{where}, line {line}, byte {byte}: {what}; expected UTF-8, or UTF-16 with its mark")

    is_last = False
    while not is_last:
        is_last = not raw
        try:
            text = decoder.decode(raw, final=is_last)
        except UnicodeDecodeError as error:
            before = rest + error.object[: error.start].decode(encoding)
            what = f"0x{error.object[error.start]:02x} is not {encoding[:6].upper()} ({error.reason})"
            raise fault(before, what) from error
        if "\0" in text:
            raise fault(rest + text[: text.index("\0")], "0x00 is no text")
        rest += text
        # A line that a CR ends may go on: with the LF that has not come in yet.
        end = end or ("\n" if "\n" in rest else "\r" if "\r" in (rest if is_last else rest[:-1]) else "")
        if end:
            *lines, rest = rest.split(end)
            number += len(lines)
            yield from (line.removesuffix("\r") for line in lines)
        raw = raw and stream.read1(_BLOCK)
    if rest:
        yield rest


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file, read as `iter_lines` reads them."""
    with Path(path).open("rb") as stream:
        return list(iter_lines(stream, path))


def read_text(path: str | Path) -> str:
    """The text of a file, its lines ending with LF, read as `iter_lines` reads them."""
    return "\n".join(read_lines(path))


def read_json(path: str | Path) -> Any:
    """Read a file with JSON. Errors are those of `read_text` and `parse_json`."""
    return parse_json(read_text(path), path)


def parse_json(text: str, where: str | Path, first_line: int = 1) -> Any:
    """Read JSON that begins in a line of `where`; a ValueError names line and column of what is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{where}, line {line}, column {error.colno}: not JSON: {error.msg}") from error
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise ValueError(f"{where}, line {first_line} on: {half} is half a character, and no text") from error
    return value


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
        ImportError, OSError: as `load_dataset`.
        ValueError: as `load_dataset`; also if there is no such column.
    """
    rows = load_dataset(dataset_name, config, split)
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        where = f"{dataset_name}, config {config}, split {split}"
        raise ValueError(f"{where}: no column {', '.join(missing)}, only {', '.join(rows.column_names)}")
    return rows.select_columns(list(columns))


def load_dataset(dataset_name: str | Path, config: str | None, split: str | None) -> Any:
    """Load a split, or without `split` all of them by name, through `datasets`; cells of a CSV that say "NA" stay so.

    Raises:
        ImportError: without the extra `train`.
        OSError: the dataset is not there or cannot be reached.
        ValueError: no such config or split, or files that cannot be read.
    """
    datasets = require("datasets", "train")
    name = str(dataset_name)
    try:
        builder = datasets.load_dataset_builder(name, config)
        cells = {"keep_default_na": False} if hasattr(builder.config, "keep_default_na") else {}
        return datasets.load_dataset(name, config, split=split, **cells)
    except OSError:  # some of them are DatasetsErrors, too
        raise
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        told = [f"{what} {value}" for what, value in (("config", config), ("split", split)) if value is not None]
        raise ValueError(f"{', '.join([name, *told])}: {error}") from error


def parse_split(split: str, name: str = "split") -> tuple[str, slice]:
    """Name and slice of a split: "dev", slice(None, 1400) for "dev[:1400]". A ValueError calls it `name`."""
    match = _SLICED.fullmatch(split)
    if match is None:
        raise ValueError(f"{name} must be a name or a file, with or without a slice such as [:1400], got {split!r}")
    begin, end = (int(match[part]) if match[part] else None for part in ("begin", "end"))
    return match["name"], slice(begin, end)


def tell_left_out(where: str | Path, count: int, total: int, what: str) -> None:
    """Say how much of what was read is not used."""
    if count:
        logging.getLogger("fastprompt").warning("%s: %d of %d %s are left out", where, count, total, what)


def tell(message: str, *values: Any) -> None:
    """Say what was decided, to those who want to know."""
    logging.getLogger("fastprompt").info(message, *values)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that lists `choices` unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is an integer, 1 or more."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def shorten(value: Any) -> str:
    """The value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 62 else text[:59] + "..."
