"""Question answering in SQuAD's form: SQuAD v1.1, XQuAD, MLQA, TyDi QA GoldP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .examples import Answer, Question
from .reading import load_rows, read_json, shorten


def read_squad(path: str | Path) -> list[Question]:
    """Read a JSON file in SQuAD's form, in file order.

    What is read: data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}; other fields are
    passed over. Text is UTF-8, a byte order mark is passed over. An answer need not stand at its answer_start: see
    `Question.exact_answers`. Nor are ids unique in every file: TyDi QA's English training file repeats 67 of them for
    questions that have nothing in common.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: naming file and place, which is a line or a path such as data[3].paragraphs[0].qas[2].id: bytes that
            are not UTF-8, no JSON, a field missing or of another type, an answer_start outside the context, the same
            question with the same id and context twice, or no questions at all.
    """
    path = Path(path)
    questions: list[Question] = []
    places: dict[tuple[str, str, str], str] = {}
    for where, entry, context in _entries(read_json(path), path):
        question = Question(
            _field(entry, "id", str, where),
            _field(entry, "question", str, where),
            context,
            [_answer(answer, context, place) for place, answer in _items(entry, "answers", where)],
        )
        first = places.setdefault(question[:3], where)
        if first is not where:
            raise ValueError(
                f"{where}id: got {question.id!r} with question and context of {first}id once more, "
                "expected each question once"
            )
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}: no questions in it, expected at least one")
    return questions


def question_rows(content: Any, where: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the questions of anyone's JSON in SQuAD's form as rows, in the hub's form, and their places.

    Ids may be of any type, or missing, and may repeat. `is_impossible`, of SQuAD 2.0, and an empty list of answers both
    say that the context does not answer. Where there are no `answers`, the row has none.

    Raises:
        ValueError: naming `where` and place, what `read_squad` refuses, its rules for ids aside; or answers to a
            question that is impossible.
    """
    for place, entry, context in _entries(content, where):
        row = {"question": _field(entry, "question", str, place), "context": context}
        if "id" in entry:
            row["id"] = entry["id"]
        impossible = entry.get("is_impossible") is True
        if impossible or "answers" in entry:
            found = [_answer(each, context, at) for at, each in _items({"answers": [], **entry}, "answers", place)]
            if impossible and found:
                raise ValueError(f"{place}answers: got {shorten(found[0].text)}, expected none as it is_impossible")
            row["answers"] = {"text": [each.text for each in found], "answer_start": [each.start for each in found]}
        yield place.rstrip("."), row


def _entries(content: Any, where: str | Path) -> Iterator[tuple[str, dict, str]]:
    """Each question of SQuAD's form: its place, what is said of it, and its context."""
    for in_article, article in _items(content, "data", f"{where}, "):
        for in_paragraph, paragraph in _items(article, "paragraphs", in_article):
            context = _field(paragraph, "context", str, in_paragraph)
            for in_question, entry in _items(paragraph, "qas", in_paragraph):
                yield in_question, entry, context


def questions_from_hub(dataset_name: str | Path, config: str, split: str) -> list[Question]:
    """Load questions in the hub's form, a row each: id, context, question, answers.{text[], answer_start[]}.

    Args:
        dataset_name: on the hub, such as "google/xquad", or a folder laid out like a dataset there.

    Raises:
        ImportError, OSError: as `load_rows`.
        ValueError: as `load_rows`; or naming row and field, a value of another type, or an answer_start outside the
            context.
    """
    rows = load_rows(dataset_name, config, split, ("id", "context", "question", "answers"))
    questions = []
    for number, row in enumerate(rows):
        where = f"{dataset_name}, config {config}, split {split}, row {number}: "
        context = _field(row, "context", str, where)
        answers = _field(row, "answers", dict, where)
        texts, starts = (_field(answers, name, list, f"{where}answers.") for name in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise ValueError(f"{where}answers: {len(texts)} text, {len(starts)} answer_start, expected equally many")
        answers = [
            _answer({"text": text, "answer_start": start}, context, f"{where}answers[{index}].")
            for index, (text, start) in enumerate(zip(texts, starts, strict=True))
        ]
        questions.append(Question(_field(row, "id", str, where), _field(row, "question", str, where), context, answers))
    return questions


_KINDS = {str: "a string", int: "an integer", list: "a list", dict: "an object"}


def _field(record: Any, key: str, kind: type, where: str) -> Any:
    """The value of `key`, which `where`, ending in ", ", ": " or ".", leads to."""
    if type(record) is not dict:
        raise ValueError(f"{where.rstrip('.:, ')}: got {shorten(record)}, expected an object with {key}")
    if key not in record:
        raise ValueError(f"{where}{key}: missing, expected {_KINDS[kind]}")
    if type(record[key]) is not kind:  # not isinstance: true is no integer
        raise ValueError(f"{where}{key}: got {shorten(record[key])}, expected {_KINDS[kind]}")
    return record[key]


def _items(record: Any, key: str, where: str) -> list[tuple[str, Any]]:
    return [(f"{where}{key}[{index}].", item) for index, item in enumerate(_field(record, key, list, where))]


def _answer(entry: Any, context: str, where: str) -> Answer:
    answer = Answer(_field(entry, "text", str, where), _field(entry, "answer_start", int, where))
    if not 0 <= answer.start < len(context):
        raise ValueError(
            f"{where}answer_start: got {answer.start}, expected 0 to {len(context) - 1}, a character of the context"
        )
    return answer
