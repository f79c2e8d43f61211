"""What the readers give and the tasks take: one example each, as named tuples."""

from typing import NamedTuple


class Text(NamedTuple):
    """A text, or two, to be classified.

    Attributes:
        id: what the example is called in its own file: a string or a number.
        text, text_pair: the text, and the second one where there are two.
        label: the name of its class; of several classes a list of names; a number, for regression; None: not known.
    """

    id: str | int
    text: str
    text_pair: str | None = None
    label: str | list[str] | float | None = None


class Tagged(NamedTuple):
    """A sentence in words, with a tag for each; None: the tags are not known."""

    id: str | int
    words: list[str]
    tags: list[str] | None = None


class Answer(NamedTuple):
    """An answer and where it begins: in characters (code points) of the context, from 0; -1 where that is not known."""

    text: str
    start: int


class Question(NamedTuple):
    """A question, the paragraph that answers it, and the answers that count as right.

    Attributes:
        answers: an empty list where the context has none; None: not known.
    """

    id: str | int
    question: str
    context: str
    answers: list[Answer] | None = None

    @property
    def exact_answers(self) -> list[Answer]:
        """The answers, empty ones aside, that stand in the context where they say: those that training can use."""
        return [each for each in self.answers or [] if each.text and each.start >= 0 and self.context.startswith(*each)]

    @property
    def is_unanswerable(self) -> bool:
        """Whether it is known to have no answer: an empty one is none."""
        return self.answers is not None and not any(answer.text for answer in self.answers)


class Written(NamedTuple):
    """A prompt and what is to be written after it.

    Attributes:
        prompt: a text, or the messages of a chat before the last, {"role", "content"} each.
        completion: a text; None: not known.
    """

    id: str | int
    prompt: str | list[dict]
    completion: str | None = None


class Pair(NamedTuple):
    """An English sentence, its translation and, for a task, a label."""

    source: str
    target: str
    label: str | None = None
