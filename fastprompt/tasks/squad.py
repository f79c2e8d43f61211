"""Questions whose answers are spans of a passage, as in SQuAD."""

from typing import NamedTuple


class Answer(NamedTuple):
    """A span of the context: its text and the character it starts at."""

    text: str
    start: int


class Question(NamedTuple):
    """A question, the passage that answers it and the answers in it."""

    id: str
    question: str
    context: str
    answers: list[Answer]
