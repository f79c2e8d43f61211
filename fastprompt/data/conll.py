"""CoNLL: a word and its tag on a line, a blank line between sentences."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .reading import shorten, tell_left_out

_FIELDS = re.compile(r"[ \t]+")
_NAME_TAG = re.compile(r"O|[BIESLUM]-\S+")


def sentences(lines: Sequence[str], where: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield each sentence as a row, {"words", "tags"}, and its place, the line of its first word.

    The first field of a line is the word and the last one the tag; in a file with one field a line there are no tags.
    Fields are what tabs part, in a file with tabs, else what blanks do. Left out, and told, are lines that begin with
    "# ", unless they are the word # with a tag that other words have, and -DOCSTART-.

    Raises:
        ValueError: naming `where` and line: another number of fields than before.
    """
    split = re.compile("\t") if any("\t" in line for line in lines) else _FIELDS
    table = [split.split(line.strip(" \t\r")) if line.strip() else [] for line in lines]
    tags = {fields[-1] for fields in table if len(fields) > 1 and fields[0] != "#"}
    width = Counter(len(fields) for fields in table if fields and fields[0] != "#").most_common(1)
    width = width[0][0] if width else 0
    words: list[str] = []
    begin, found, left_out = 0, [], 0

    def row() -> tuple[str, dict]:
        of_words = {"words": words, "tags": found} if width > 1 else {"words": words}
        return f"{where}, line {begin}", of_words

    for number, (line, fields) in enumerate(zip(lines, table, strict=True), 1):
        comment = line.startswith("# ") and (len(fields) != width or width < 2 or fields[-1] not in tags)
        document = bool(fields) and fields[0] == "-DOCSTART-"
        left_out += comment or document
        if not fields or document:
            if words:
                yield row()
            words, found = [], []
        elif not comment:
            if len(fields) != width:
                fault = f"{len(fields)} field{'s' * (len(fields) > 1)} in {shorten(line)}"
                raise ValueError(f"{where}, line {number}: {fault}, expected {width} as in most lines: word ... tag")
            begin = begin if words else number
            words.append(fields[0])
            found.append(fields[-1])
    if words:
        yield row()
    tell_left_out(where, left_out, len(lines), "lines, comments and -DOCSTART-,")


def is_tagged(lines: Sequence[str]) -> bool:
    """Whether the lines at the beginning of a file are words with tags of names, O among them, and no running text."""
    table = [_FIELDS.split(line.strip(" \t")) for line in lines if line.strip() and not line.startswith(("# ", "-DOC"))]
    tags = [fields[-1] for fields in table if len(fields) == len(table[0]) > 1 and _NAME_TAG.fullmatch(fields[-1])]
    return len(table) > 1 and len(tags) == len(table) and "O" in tags
