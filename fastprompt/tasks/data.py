"""A task's examples by one notation, for command lines and configuration files."""

import re
from collections.abc import Sequence
from pathlib import Path

from . import mlqa, pawsx, xquad
from ._reading import check_choice
from .squad import Question, read_squad

TASKS = ("xquad", "mlqa", "pawsx")

_SLICED = re.compile(r"(?P<split>.+?)(?:\[(?P<begin>\d*):(?P<end>\d*)\])?")


def read_examples(task: str, data: str | Path, language: str, split: str) -> list[Question] | list[pawsx.Example]:
    """Read the examples of a language, in file order.

    Args:
        task: one of `TASKS`.
        data: folder or name on the hub, as of `read` of the task's module. Not read where `split` is a file.
        language: of the task; for mlqa "de" or, with questions in another language than the contexts, "de-en".
        split: "train", "dev" or "test" (xquad has "test" alone, mlqa "translate-train" and "translate-dev" instead of
            "train", which are SQuAD in another language); for xquad and mlqa also a file in SQuAD's form, such
            as SQuAD's or TyDi QA's for training, where ids may repeat and are exchanged for row numbers. A slice of its
            rows may follow, as in "dev[:1400]" or "train.json[200:]"; those of pawsx are counted before pairs without a
            translation are left out.

    Raises:
        ValueError: an unknown task, language or split; or, with OSError and ImportError, as of the task's `read`.
    """
    check_choice("task", task, TASKS)
    name, rows = parse_split(split)
    if task == "pawsx":
        return pawsx.read(data, language, name, rows)
    if name.endswith(".json"):
        questions = read_squad(name)
        return [question._replace(id=str(n)) for n, question in enumerate(questions)][rows]
    if task == "xquad":
        check_choice("split", name, ("test",))
        return xquad.read(data, language)[rows]
    context_language, _, question_language = language.partition("-")
    if name.startswith("translate-"):
        return mlqa.read_translate_train(data, context_language, name.removeprefix("translate-"))[rows]
    return mlqa.read(data, context_language, question_language or context_language, name)[rows]


def parse_split(split: str) -> tuple[str, slice]:
    """ "dev[:1400]" -> "dev", slice(None, 1400)."""
    match = _SLICED.fullmatch(split)
    if match is None:
        raise ValueError(f"split must be a name or a file, with or without a slice such as [:1400], got {split!r}")
    begin, end = (int(match[name]) if match[name] else None for name in ("begin", "end"))
    return match["split"], slice(begin, end)


def spread(examples: Sequence, limit: int | None) -> list:
    """At most `limit` examples, evenly spread over all: the same ones whoever asks."""
    if limit is None or len(examples) <= limit:
        return list(examples)
    return [examples[n * len(examples) // limit] for n in range(limit)]
