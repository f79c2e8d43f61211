"""Parallel text: pairs of an English sentence and its translation."""

import gettext
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprompt._extras import require

from .examples import Pair
from .files import SUFFIXES
from .reading import parse_split, read_lines, shorten, tell_left_out
from .table import read_examples

THIRD_COLUMNS = ("label", "ignore")
_NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*([eE][-+]?\d+)?%?")
_ID = re.compile(r"(?=.*\d)[\w.:#/-]+")


def read_pairs(
    path: str | Path,
    target_path: str | Path | None = None,
    *,
    third_column: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Pair]:
    """Read parallel sentences, in file order, surrounding white space removed.

    Args:
        path: one of
            a gettext catalogue `.po`: the entries that are translated (not with mere white space), neither fuzzy nor
            obsolete, of plural entries the form for one; msgid is the English side;
            a table of named columns, source and target: CSV, JSON, JSON Lines or Parquet, and with `columns` whatever
            `fastprompt.data.table.iter_rows` reads;
            any other name, alone: English, tab, translation, and in every row or in none a tab and a third column;
            any other name, with `target_path`: English, one sentence a line.
        target_path: the translations, line by line those of `path`.
        third_column: what it is, where there is one: a "label", or something to "ignore", such as a licence.
            None: there is none.
        columns: the table's names for source, target and, if the pairs have one, label, which is not read unless it is
            named here: {"source": "translation.en", "target": "translation.yor"}.

    Text is UTF-8 or, by its byte order mark, UTF-16, of a catalogue whatever its header declares. Of files other than
    catalogues nothing is left out, but rows of a table with null for a side: a row that cannot be used is an error.

    Example:
        >>> read_pairs("pairs.tsv")[0]  # a line of it: Good morning.<tab>Bore da.
        Pair(source='Good morning.', target='Bore da.', label=None)

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: naming file and line: bytes that are not UTF-8, a row without a tab or with more than two, a side or
            label that is empty, a third column in some rows only or not asked for, numbers or ids instead of English in
            all rows, files of different length, or no pairs at all.
    """
    if third_column not in (None, *THIRD_COLUMNS):
        raise ValueError(f"third_column must be one of {THIRD_COLUMNS}, got {third_column!r}")
    is_table = columns is not None or SUFFIXES.get(Path(parse_split(str(path))[0]).suffix.lower(), "tsv") != "tsv"
    if is_table and (target_path or third_column):
        raise ValueError(f"{path}: a table of named columns, got target_path or third_column with it: name the columns")
    if is_table:
        pairs = read_examples(_Columns("label" in (columns or ())), str(path), columns=columns)
    elif target_path is not None:
        pairs = _read_aligned(Path(path), Path(target_path))
    elif Path(path).suffix == ".po":
        pairs = read_catalogue(path)
    else:
        pairs = _read_table(Path(path), third_column)
    if not pairs:
        raise ValueError(f"{path}: no pairs in it, expected at least one")
    _check_english(path, pairs)
    return pairs


class _Columns:
    """What is read of a table; a label only if it was named."""

    columns = {"source": "the English sentence", "target": "its translation"}
    labels = ()
    optional = ()

    def __init__(self, has_label: bool):
        if has_label:
            self.columns = self.columns | {"label": "of the pair"}

    def example(self, row: Mapping[str, Any], where: str, number: int, *, labelled: bool = True) -> Pair:
        for name in self.columns:
            if type(row.get(name)) is not str:
                raise ValueError(f"{where}, column {name}: got {shorten(row.get(name))}, expected a string")
        return _pair(where, *(row[name] for name in self.columns))


def read_catalogue(path: str | Path) -> list[Pair]:
    """Read a gettext catalogue as `read_pairs` does, except that it may hold no translation."""
    path = Path(path)
    polib = require("polib", "train")
    if not path.is_file():  # polib would take the name for the catalogue's text
        raise FileNotFoundError(f"{path}: no such file")
    try:
        catalogue = polib.pofile(str(path))
    except (OSError, UnicodeDecodeError) as error:  # polib reports a syntax error as OSError
        raise ValueError(f"{path}: not a readable gettext catalogue: {error}") from error
    one = _form_for_one(path, catalogue.metadata.get("Plural-Forms", ""))
    pairs, entries = [], [entry for entry in catalogue if not entry.obsolete]
    for entry in catalogue.translated_entries():  # without the header, obsolete and fuzzy entries
        target = entry.msgstr
        if entry.msgid_plural:
            if one not in entry.msgstr_plural:
                raise ValueError(f"{path}, line {entry.linenum}: no msgstr[{one}], which Plural-Forms asks for one")
            target = entry.msgstr_plural[one]
        if target.strip():  # real catalogues hold a blank where a translator had nothing to say
            pairs.append(_pair(f"{path}, line {entry.linenum}", entry.msgid, target))
    tell_left_out(path, len(entries) - len(pairs), len(entries), "entries, not translated or fuzzy,")
    return pairs


def split_pairs(pairs: Sequence[Pair], test: int, train: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Shuffle a copy with `random.Random(seed)`; return the first `test` pairs and the next `train`, in this order.

    Raises:
        ValueError: a negative number, or fewer pairs than test + train.
    """
    if test < 0 or train < 0:
        raise ValueError(f"test and train must not be negative, got {test} and {train}")
    if test + train > len(pairs):
        raise ValueError(f"test and train must be at most {len(pairs)} pairs together, got {test} and {train}")
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:test], shuffled[test : test + train]


def _check_english(path: str | Path, pairs: Sequence[Pair]) -> None:
    """Scores and ids stand in the first column of some corpora, and would pass for English."""
    sources = [pair.source for pair in pairs]
    numbers = all(_NUMBER.fullmatch(source) for source in sources)
    single = all(_ID.fullmatch(source) for source in sources) and len(set(sources)) == len(sources) > 1
    if numbers or (single and any(len(pair.target.split()) > 1 for pair in pairs)):
        raise ValueError(
            f"{path}: the English side is {'a number' if numbers else 'an id'} in every row, such as "
            f"{shorten(sources[0])}; expected English, tab, translation: put the columns in order, as with cut -f2,3"
        )


def _read_table(path: Path, third_column: str | None) -> list[Pair]:
    pairs: list[Pair] = []
    columns = None  # of the first row
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number}"
        cells = line.split("\t")
        if not 2 <= len(cells) <= 3:
            raise ValueError(
                f"{where}: {len(cells) - 1 or 'no'} tab{'s' if len(cells) > 2 else ''} in {shorten(line)}, "
                "expected English, tab, translation and optionally a tab and a third column"
            )
        columns = columns or len(cells)
        if columns != len(cells):
            raise ValueError(
                f"{where}: {'no' if len(cells) == 2 else 'a'} third column, "
                f"but line 1 has {'none' if columns == 2 else 'one'}; expected one in every row or in none"
            )
        pairs.append(_pair(where, *cells[: 3 if third_column == "label" else 2]))
    if columns == 3 and third_column is None:
        _check_english(path, pairs)
        raise ValueError(
            f"{path}: a third column, such as {shorten(cells[2])}, and nothing says what it is: --third-column label "
            "(or third_column: of read_pairs and in YAML) takes it for the pair's label, ignore leaves it out"
        )
    if columns == 2 and third_column == "label":
        raise ValueError(f"{path}: third_column must not be 'label', as there is none")
    return pairs


def _read_aligned(path: Path, target_path: Path) -> list[Pair]:
    for each in (path, target_path):
        if each.suffix == ".po":
            raise ValueError(f"{each}: a .po catalogue holds both languages, expected it alone or two plain text files")
    sources, targets = read_lines(path), read_lines(target_path)
    if len(sources) != len(targets):
        raise ValueError(
            f"{path} has {len(sources)} lines, {target_path} has {len(targets)}, expected equally many: "
            "line n of one is the translation of line n of the other"
        )
    return [
        _pair(f"{path} and {target_path}, line {number}", source, target)
        for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1)
    ]


def _form_for_one(path: Path, plural_forms: str) -> int:
    # Which msgstr[i] counts one thing is the language's own matter: it is the second form in Arabic.
    formula = re.search(r"plural\s*=\s*([^;]+)", plural_forms)
    if formula is None:
        return 0
    try:
        return int(gettext.c2py(formula[1].strip())(1))
    except ValueError as error:
        raise ValueError(f"{path}: Plural-Forms {plural_forms!r} in the header cannot be read: {error}") from error


def _pair(where: str, source: str, target: str, label: str | None = None) -> Pair:
    pair = Pair(source.strip(), target.strip(), None if label is None else label.strip())
    for name, text in zip(("English side", "translation", "label"), pair, strict=True):
        if text == "":
            raise ValueError(f"{where}: the {name} is empty, expected text")
    return pair
