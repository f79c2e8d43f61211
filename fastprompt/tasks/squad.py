"""Question answering in SQuAD's form: SQuAD v1.1, XQuAD, MLQA, TyDi QA GoldP."""

from pathlib import Path
from typing import Any, NamedTuple

from ._reading import load_rows, read_json, shorten


class Answer(NamedTuple):
    """An answer and where it begins: in characters (code points) of the context, from 0."""

    text: str
    start: int


class Question(NamedTuple):
    """A question, the paragraph that answers it, and the answers that count as right."""

    id: str
    question: str
    context: str
    answers: list[Answer]

    @property
    def exact_answers(self) -> list[Answer]:
        """The answers, empty ones aside, that stand in the context where they say: those that training can use."""
        return [answer for answer in self.answers if answer.text and self.context.startswith(*answer)]


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
    content = read_json(path)
    questions: list[Question] = []
    places: dict[tuple[str, str, str], str] = {}
    for in_article, article in _items(content, "data", f"{path}, "):
        for in_paragraph, paragraph in _items(article, "paragraphs", in_article):
            context = _field(paragraph, "context", str, in_paragraph)
            for in_question, entry in _items(paragraph, "qas", in_paragraph):
                question = Question(
                    _field(entry, "id", str, in_question),
                    _field(entry, "question", str, in_question),
                    context,
                    [_answer(answer, context, where) for where, answer in _items(entry, "answers", in_question)],
                )
                first = places.setdefault(question[:3], in_question)
                if first is not in_question:
                    raise ValueError(
                        f"{in_question}id: got {question.id!r} with question and context of {first}id once more, "
                        "expected each question once"
                    )
                questions.append(question)
    if not questions:
        raise ValueError(f"{path}: no questions in it, expected at least one")
    return questions


def questions_from_hub(dataset_name: str | Path, config: str, split: str) -> list[Question]:
    """Load questions in the hub's form, a row each: id, context, question, answers.{text[], answer_start[]}.

    Args:
        dataset_name: on the hub, such as "google/xquad", or a folder laid out like a dataset there.

    Raises:
        ImportError, OSError: as of `load_rows`.
        ValueError: the same, or naming row and field: a value of another type, an answer_start outside the context.
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
