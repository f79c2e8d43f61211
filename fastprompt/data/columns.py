"""Which column of a table is which of a task's."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# What else a task's column is called where data sets are published. Two that belong together come as two.
_TWO_TEXTS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("text_a", "text_b"), ("sentence_a", "sentence_b"),
)  # fmt: skip
SYNONYMS = {
    "id": ("index_id", "idx", "guid", "uid", "question_id", "qid"),
    "text": ("sentence", "review", "content", "tweet", "document", "utterance"),
    "label": ("category", "class", "target", "sentiment", "topic", "intent"),
    "words": ("tokens",),
    "tags": ("ner_tags", "pos_tags", "upos", "labels"),
    "question": ("question_translated", "question_lang", "query"),
    "context": ("passage", "paragraph"),
    "answers": ("answer_pivot",),
    "prompt": ("instruction", "input", "question"),
    "completion": ("output", "response", "answer", "target"),
    "source": ("src", "english", "en"),
    "target": ("tgt",),
}
_INSTEAD = {"words": ("text", "sentence")}  # where there is nothing better: white space tells the words of a text
_MISSING = object()


def check_columns(columns: Mapping[str, str] | None, known: Collection[str]) -> dict[str, str]:
    """The columns that were named, or a ValueError where a name is none of `known`."""
    columns = dict(columns or {})
    for name, column in columns.items():
        if name not in known or not isinstance(column, str):
            raise ValueError(f"columns must give a column's name for any of {', '.join(known)}; got {name}={column!r}")
    return columns


def names_in(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a row, and what is one level down in them: translation, translation.en."""
    found: list[str] = []
    for name, value in row.items():
        found.append(str(name))
        if isinstance(value, Mapping):
            found += [f"{name}.{inner}" for inner in value]
    return tuple(found)


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """What a row has in a column; with a dot in the name, what is within a column. A KeyError where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            raise KeyError(column)
    return value


def guess(names: Sequence[str], wanted: Iterable[str], columns: Mapping[str, str]) -> tuple[dict, dict]:
    """Find the columns of a task among the names of a table.

    Returns:
        The table's name for each column of the task that was found: as `columns` says, by the same name (capitals and
        blanks around it aside), or by the one synonym that is there. And of those with several synonyms there, which.
    """
    plain = {name.strip().lower(): name for name in reversed(names)}
    found = {name: column for name, column in columns.items() if column in names or _is_deep(column, names)}
    wanted = [name for name in wanted if name not in columns]
    for name in wanted:
        if name in names or name in plain:
            found[name] = name if name in names else plain[name]
    unclear = {}
    for name in wanted:
        if name not in found:
            taken = set(found.values())
            known = [plain[each] for each in SYNONYMS.get(name, ()) if each in plain and plain[each] not in taken]
            known = known or [plain[each] for each in _INSTEAD.get(name, ()) if each in plain][:1]
            two = [each for each in _TWO_TEXTS if plain.keys() >= {*each}]
            if name == "text" and "text_pair" in wanted and len(two) == 1 and "text_pair" not in found and not known:
                found["text"], found["text_pair"] = (plain[each] for each in two[0])
            elif len(known) == 1:
                found[name] = known[0]
            elif known or (name == "text" and len(two) > 1):
                unclear[name] = known or [plain[one] for one, _ in two]
    return found, unclear


def _is_deep(column: str, names: Sequence[str]) -> bool:
    # What is further down than names_in() looks is seen when a row is read.
    return column.count(".") > 1 and ".".join(column.split(".")[:2]) in names


def how_to_name(name: str) -> str:
    """How to say which column is which."""
    return f'name it: --columns {name}=COLUMN, or columns={{"{name}": "COLUMN"}}'
