"""PAWS-X: is one sentence a paraphrase of the other?"""

import re
from pathlib import Path

from .examples import Text
from .reading import check_choice, find_file, load_rows, read_lines, shorten, tell_left_out

LANGUAGES = ("en", "fr", "es", "de", "zh", "ja", "ko")

_COLUMNS = ("id", "sentence1", "sentence2", "label")
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def read(data: str | Path, language: str, split: str, rows: slice | None = None) -> list[Text]:
    """Read the pairs of a language, in file order, those without a translation left out.

    Args:
        data: a folder in one of two layouts, official: x-final, or the folder that holds it; XTREME's:
            {split}-{language}.tsv; or a dataset with a config for each language: its name on the hub, such as
            "google-research-datasets/paws-x", or a folder laid out like it.
        split: "train" (which the official layout has machine-translated), "dev" or "test".
        rows: which rows of the file to take, counted from 0, before any is left out: of dev and test, row n is the same
            pair in every language.

    Raises:
        ValueError: an unknown language or split, or as `read_file` has it.
        FileNotFoundError: a folder without the file.
        ImportError, OSError: as `load_rows`.
    """
    check_choice("language", language, LANGUAGES)
    check_choice("split", split, tuple(_HUB_SPLITS))
    official = {"train": "train" if language == "en" else "translated_train", "dev": "dev_2k", "test": "test_2k"}
    name = f"{language}/{official[split]}.tsv"
    file = find_file(data, [f"x-final/{name}", name, f"{split}-{language}.tsv"])
    if file:
        return read_file(file, rows)
    where = f"{data}, config {language}, split {_HUB_SPLITS[split]}"
    examples = [
        _example(f"{where}, row {number}", [str(row[column]) for column in _COLUMNS])
        for number, row in enumerate(load_rows(data, language, _HUB_SPLITS[split], _COLUMNS))
    ]
    return _translated(where, examples, rows)


def read_file(path: str | Path, rows: slice | None = None) -> list[Text]:
    """Read a file of either layout; the first line tells which. `rows` chooses rows as for `read`.

    official: a header, id, sentence1, sentence2 and label, text as it stands;
    XTREME's: no header, sentence1, sentence2 and label, a text with quotation marks put into quotation marks and those
    inside doubled; the id is the number of the row, from 1.

    Surrounding white space is removed. A pair is left out where a sentence is empty or "NS", which stands for a
    translation that was not made.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: naming file, line and field: bytes that are not UTF-8, another number of columns, a label other than
            0 and 1; or no rows at all.
    """
    path = Path(path)
    lines = read_lines(path)
    has_header = bool(lines) and tuple(lines[0].split("\t")) == _COLUMNS
    columns = _COLUMNS if has_header else _COLUMNS[1:]
    examples = []
    for number, line in enumerate(lines[has_header:], 1):
        where = f"{path}, line {number + has_header}"
        cells = line.split("\t")
        if len(cells) != len(columns):
            count = f"{len(cells)} column{'s' if len(cells) > 1 else ''}"
            raise ValueError(f"{where}: {count} in {shorten(line)}, expected {len(columns)}: {', '.join(columns)}")
        if not has_header:
            cells = [str(number), *map(_unquote, cells)]
        examples.append(_example(where, cells))
    if not examples:
        raise ValueError(f"{path}: no rows in it, expected at least one")
    return _translated(path, examples, rows)


def _example(where: str, cells: list[str]) -> Text:
    id, sentence1, sentence2, label = (cell.strip() for cell in cells)
    if label not in ("0", "1"):
        raise ValueError(f"{where}, label: got {shorten(label)}, expected 0 or 1")
    return Text(id, sentence1, sentence2, label)


def _translated(where: str | Path, examples: list[Text], rows: slice | None) -> list[Text]:
    chosen = examples if rows is None else examples[rows]
    kept = [example for example in chosen if not {example.text, example.text_pair} & {"", "NS"}]
    tell_left_out(where, len(chosen) - len(kept), len(chosen), "pairs, with NS or without a text,")
    return kept


def _unquote(cell: str) -> str:
    # As csv.writer, which wrote XTREME's files, quotes. What merely begins with a quotation mark stays as it is.
    quoted = _QUOTED.fullmatch(cell)
    return quoted[1].replace('""', '"') if quoted else cell
