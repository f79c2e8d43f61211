"""A task's examples by one notation, for command lines and configuration files."""

from collections.abc import Sequence
from pathlib import Path

from . import mlqa, pawsx, xquad
from .examples import Answer, Question, Text
from .reading import check_choice, parse_split, read_json
from .squad import question_rows

TASKS = ("xquad", "mlqa", "pawsx")


def read_examples(task: str, data: str | Path, language: str, split: str) -> list[Question] | list[Text]:
    """Read the examples of a language, in file order.

    Args:
        task: one of `TASKS`.
        data: the data's folder, or its name on the hub, as `read` of the task's module takes it. It is not read where
            `split` is a file.
        language: one of the task's languages; for mlqa "de" or, with questions in another language than the contexts,
            "de-en".
        split: "train", "dev" or "test" (xquad has "test" alone, mlqa "translate-train" and "translate-dev" instead of
            "train", which are SQuAD in another language); for xquad and mlqa also a file in SQuAD's form, such
            as SQuAD's or TyDi QA's for training: its ids may be anything, and row numbers stand for them. A slice of
            rows may follow, as in "dev[:1400]" or "train.json[200:]"; those of pawsx are counted before pairs without a
            translation are left out.

    Raises:
        OSError, ImportError: as `read` of the task's module.
        ValueError: as that `read`; also for an unknown task, language or split.
    """
    check_choice("task", task, TASKS)
    name, rows = parse_split(split)
    if task == "pawsx":
        return pawsx.read(data, language, name, rows)
    if name.endswith(".json"):
        return _numbered(name)[rows]
    if task == "xquad":
        check_choice("split", name, ("test",))
        return xquad.read(data, language)[rows]
    context_language, _, question_language = language.partition("-")
    if name.startswith("translate-"):
        return mlqa.read_translate_train(data, context_language, name.removeprefix("translate-"))[rows]
    return mlqa.read(data, context_language, question_language or context_language, name)[rows]


def _numbered(file: str) -> list[Question]:
    """The questions of a file in SQuAD's form, with the number of each for its id."""
    questions = []
    for number, (_, row) in enumerate(question_rows(read_json(file), file)):
        answers = row.get("answers")
        if answers is not None:
            answers = [Answer(*each) for each in zip(answers["text"], answers["answer_start"], strict=True)]
        questions.append(Question(str(number), row["question"], row["context"], answers))
    if not questions:
        raise ValueError(f"{file}: no questions in it, expected at least one")
    return questions


def spread(examples: Sequence, limit: int | None) -> list:
    """At most `limit` examples, evenly spread over all: the same ones whoever asks."""
    if limit is None or len(examples) <= limit:
        return list(examples)
    return [examples[n * len(examples) // limit] for n in range(limit)]
