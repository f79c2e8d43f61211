"""Files, and standard input, as rows with their places: CSV, TSV, JSON, JSON Lines, Parquet, CoNLL, plain text."""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from fastprompt._extras import require

from . import conll
from .reading import check_choice, iter_lines, parse_json, shorten, tell, tell_left_out
from .squad import question_rows

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "conll", "text")
SUFFIXES = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet", ".conll": "conll", ".bio": "conll", ".iob": "conll", ".iob2": "conll",
}  # fmt: skip
_QUOTED = re.compile(r'"([^"]*(?:""[^"]*)*)"')
_LOOK = 1000  # lines at the beginning that tell CoNLL from plain text

Placed = tuple[str, dict[str, Any]]


def file_rows(path: Path, format: str | None, known: Collection[str]) -> Iterator[Placed]:
    """Yield the rows of a file and their places, such as "train.csv, line 7".

    Args:
        format: one of `FORMATS`; None: as the name ends, or, where that does not tell, as the first lines look: CoNLL,
            or what `stdin_rows` takes them for.

    Raises:
        OSError, ImportError: the file cannot be opened, or its reader is not installed.
        ValueError: naming file and line, or row: what is not of that format.
    """
    if format is not None:
        check_choice("format", format, FORMATS)
    format = format or SUFFIXES.get(path.suffix.lower())
    if format == "parquet":
        yield from _parquet_rows(path)
        return
    with path.open("rb") as stream:
        lines = iter_lines(stream, path)
        if format is None:
            first = list(islice(lines, _LOOK))
            format = "conll" if conll.is_tagged(first) else _format_of("".join(first[:1]), known)
            lines = chain(first, lines)
            tell("%s: read as %s", path, format)
        if format == "tsv":
            quoted = is_quoted(lambda: _reopened(stream, path))
            yield from _table_rows(_reopened(stream, path), path, "\t", quoted)
            return
        yield from _rows_of(format, lines, path)


def stdin_rows(format: str | None, known: Collection[str]) -> Iterator[Placed]:
    """Yield the rows of standard input as they come in, and their places.

    Args:
        format: one of `FORMATS` but parquet; None: the first line tells. JSON begins it, or it is a header of short
            names, one of `known` among them, parted by commas or tabs; else it is plain text.
    """
    if format is not None:
        check_choice("format, of standard input,", format, [each for each in FORMATS if each != "parquet"])
    where = "standard input"
    lines = iter_lines(_stdin(), where)
    if format is None:
        first = list(islice(lines, 1))
        format, lines = _format_of("".join(first), known), chain(first, lines)
        tell("%s: read as %s", where, format)
    if format == "tsv":
        held = list(lines)
        return _table_rows(held, where, "\t", is_quoted(lambda: held))
    return _rows_of(format, lines, where)


def is_quoted(lines: Callable[[], Iterable[str]]) -> bool:
    """Whether cells of a TSV stand in quotation marks as in a CSV, or quotation marks are part of the text.

    Both are usual. Cells are quoted if each that begins with a quotation mark also ends with one and has those within
    doubled, and if this is more than chance: if the header's are, or a doubled one does occur. Who quotes only where he
    must has no other reason, in a line without tabs within cells; a cell that is a quotation stays one. Where rows have
    as many cells as the header only if quoted cells hold line ends or tabs, they are quoted.

    Args:
        lines: gives all lines, once more at each call.
    """
    width, even, well_formed, told = None, True, True, False
    for line in lines():
        cells = line.split("\t")
        even &= not line or width in (None, len(cells))
        for cell in cells:
            if cell.startswith('"'):
                quoted = _QUOTED.fullmatch(cell)
                well_formed &= quoted is not None
                told |= width is None or (quoted is not None and '""' in quoted[1])
        width = width or len(cells)
    if even:
        return well_formed and told
    try:
        return len({len(cells) for cells in _cells(lines(), "\t", True) if cells}) == 1
    except csv.Error:
        return False


def _reopened(stream: BinaryIO, where: Path) -> Iterator[str]:
    stream.seek(0)
    return iter_lines(stream, where)


def _stdin() -> BinaryIO:
    return getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())


def _format_of(line: str, known: Collection[str]) -> str:
    if re.match(r'\s*(\{\s*("|$)|\[\s*(\{|$))', line):
        return "json"
    for format, delimiter in (("tsv", "\t"), ("csv", ",")):
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        if any(name in known for name in names) and all(re.fullmatch(r"\w[\w .-]{0,30}", name) for name in names):
            return format
    return "text"


def _rows_of(format: str, lines: Iterable[str], where: str | Path) -> Iterator[Placed]:
    if format == "csv":
        first = list(islice(lines, 1))
        header = "".join(first)
        # Spreadsheets write a semicolon where the comma is in numbers.
        delimiter = next((each for each in ",;\t" if each in header), ",")
        return _table_rows(chain(first, lines), where, delimiter, True)
    if format == "conll":
        return conll.sentences(list(lines), where)
    return {"jsonl": _jsonl_rows, "json": _json_rows, "text": _text_rows}[format](lines, where)


def _table_rows(lines: Iterable[str], where: str | Path, delimiter: str, quoted: bool) -> Iterator[Placed]:
    reader = _cells(lines, delimiter, quoted)
    header: list[str] = []
    number = blank = count = 0
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fault = str(error).partition(" - ")[0]
            raise ValueError(f"{where}, line {number}: not {'quoted as in ' * quoted}CSV: {fault}") from error
        if cells is None:
            break
        if not header:
            header = _header(cells, f"{where}, line {number}")
        elif not cells:
            blank += 1
        elif len(cells) != len(header):
            fault = f"{len(cells)} cell{'s' * (len(cells) > 1)}, {shorten(delimiter.join(cells))}"
            raise ValueError(f"{where}, line {number}: {fault}, expected {len(header)}: {', '.join(header)}")
        else:
            count += 1
            yield f"{where}, line {number}", dict(zip(header, cells, strict=True))
    tell_left_out(where, blank, blank + count, "lines, blank,")


def _cells(lines: Iterable[str], delimiter: str, quoted: bool) -> Any:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the limit that there is
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader((line + "\n" for line in lines), delimiter=delimiter, quoting=quoting, strict=True)


def _header(cells: list[str], where: str) -> list[str]:
    names = [name.strip() or f"column {n}" for n, name in enumerate(cells, 1)]  # pandas leaves that of its index empty
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names:
        raise ValueError(f"{where}: blank, expected the names of the columns")
    if twice is not None:
        raise ValueError(f"{where}: the column {shorten(twice)} twice, expected a name of its own for each")
    return names


def _text_rows(lines: Iterable[str], where: str | Path) -> Iterator[Placed]:
    blank = number = 0
    for number, line in enumerate(lines, 1):  # noqa: B007
        if line.strip():
            yield f"{where}, line {number}", {"text": line}
        else:
            blank += 1
    tell_left_out(where, blank, number, "lines, blank,")


def _jsonl_rows(lines: Iterable[str], where: str | Path) -> Iterator[Placed]:
    blank = number = 0
    for number, line in enumerate(lines, 1):  # noqa: B007
        if not line.strip():
            blank += 1
            continue
        row = parse_json(line, where, number)
        if type(row) is not dict:
            raise ValueError(f"{where}, line {number}: got {shorten(row)}, expected an object, one a line")
        yield f"{where}, line {number}", row
    tell_left_out(where, blank, number, "lines, blank,")


def _json_rows(lines: Iterable[str], where: str | Path) -> Iterator[Placed]:
    """Rows of JSON: a list of objects, or one as `data` of an object, SQuAD's form, or objects one a line."""
    lines = iter(lines)
    begun = []
    for line in lines:
        begun.append(line)
        if line.strip():
            break
    try:
        alone = json.loads(begun[-1]) if begun else None
    except json.JSONDecodeError:
        alone = None
    if type(alone) is dict:
        second = list(islice(lines, 1)) if "data" in alone else []  # which may be all of a file in SQuAD's form
        begun += second
        if "".join(second).strip() or "data" not in alone:
            return _jsonl_rows(chain(begun, lines), where)
    content = parse_json("\n".join(chain(begun, lines)), where)
    if type(content) is dict and type(content.get("data")) is list:
        if any(type(each) is dict and "paragraphs" in each for each in content["data"]):
            return question_rows(content, where)
        content = content["data"]
    if type(content) is not list:
        expected = "a list of objects, objects one a line, or SQuAD's form"
        raise ValueError(f"{where}: got {shorten(content)}, expected {expected}")
    return object_rows(content, where)


def object_rows(rows: Iterable, where: str | Path, features: Mapping[str, Any] | None = None) -> Iterator[Placed]:
    """Yield dictionaries as rows, and their places; numbers of classes as names, where `features` have them.

    Args:
        features: of `datasets`, by column. A class of -1, which there stands for an unknown one, becomes None.

    Raises:
        ValueError: naming `where` and row: something else than a dictionary, or a class that there is not.
    """
    classes = {name: each for name, each in (features or {}).items() if hasattr(_inner(each), "int2str")}
    for number, row in enumerate(rows):
        place = f"{where}, row {number}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: got {shorten(row)}, expected an object, or dict")
        try:
            yield place, {**row, **{name: _class_name(each, row[name]) for name, each in classes.items()}}
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _inner(feature: Any) -> Any:
    return getattr(feature, "feature", feature)


def _class_name(feature: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_class_name(_inner(feature), each) for each in value]
    return None if value in (None, -1) else feature.int2str(value)


def _parquet_rows(path: Path) -> Iterator[Placed]:
    pyarrow, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    with path.open("rb") as stream:
        try:
            file = parquet.ParquetFile(stream)
            schema = file.schema_arrow
            features = {}
            if b"huggingface" in (schema.metadata or {}):
                features = require("datasets", "train").Features.from_arrow_schema(schema)
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            yield from object_rows(rows, path, features)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
