"""Question answering about a context: encoders mark the answer in it, language models write it."""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastprompt.data.examples import Answer, Pair, Question
from fastprompt.data.reading import check_choice, check_count, shorten

from .base import Aligned, InputConfig, Item, Model, Segments, Task, was_cut, without_end
from .metrics import answer_scores
from .rows import id_in, is_missing, tell_cut, text_in
from .spans import Spans, placed
from .written import Writer, check_room, is_writer

METRICS = ("squad", "xquad", "mlqa")
ANSWERS = ("auto", "spans", "words")


class Qa(Task):
    """Extractive question answering: the answer to a question stands in its context.

    Args:
        metrics: the rules of the scores: "squad", "xquad" (the same, in every language) or "mlqa".
        answers: with "spans" a head on the backbone's hidden states marks the answer in the context; with "words" a
            causal model or an encoder-decoder writes it; "auto" is "words" where the backbone is such a model with its
            head, else "spans".
        unanswerable: whether questions may have no answer, as in SQuAD v2: the prediction is then "". `fit` sets it
            where there are such questions.
        max_new_tokens: the most tokens of an answer in words.
        name: the name of the preset: "qa", "xquad" or "mlqa".

    Example:
        >>> row = {"question": "Who?", "context": "It was Ada.", "answers": {"text": ["Ada"], "answer_start": [7]}}
        >>> Qa().example(row, "train.json, row 0", 0)
        Question(id=0, question='Who?', context='It was Ada.', answers=[Answer(text='Ada', start=7)])

    Raises:
        ValueError: a setting that is none of these.
    """

    name = "qa"
    columns = {
        "question": "the question",
        "context": "the text that holds the answer",
        "answers": '{"text": [...], "answer_start": [...]}, or a list of {"text", "answer_start"}',
        "answer": "instead of answers: the text of the answer",
        "answer_start": "where it begins in the context, in characters",
        "id": "of the question",
    }
    labels = ("answers",)
    optional = ("id", "answers", "answer", "answer_start")
    metric = "f1"

    def __init__(
        self,
        metrics: str = "squad",
        answers: str = "auto",
        unanswerable: bool = False,
        max_new_tokens: int = 32,
        name: str = "qa",
    ) -> None:
        super().__init__()
        check_choice("metrics", metrics, METRICS)
        check_choice("answers", answers, ANSWERS)
        if type(unanswerable) is not bool:
            raise ValueError(f"unanswerable must be true or false, got {unanswerable!r}")
        check_count("max_new_tokens", max_new_tokens)
        self.metrics, self.answers, self.unanswerable = metrics, answers, unanswerable
        self.max_new_tokens, self.name = max_new_tokens, name
        self.spans: Spans | None = None
        self.words: Words | None = None

    def settings(self) -> dict[str, Any]:
        names = ("metrics", "answers", "unanswerable", "max_new_tokens")
        return {name: getattr(self, name) for name in names}

    def example(self, row: Mapping[str, Any], where: str, number: int, *, labelled: bool = True) -> Question:
        question, context = (text_in(row, name, where) for name in ("question", "context"))
        answers = _answers(row, where, labelled)
        if labelled and answers is None:
            raise ValueError(
                f"{where}, answers: must be text and answer_start, or in columns answer and answer_start, got none"
            )
        return Question(id_in(row, number), question, context, answers)

    def fit(self, examples: Sequence[Question]) -> None:
        """Learn whether there are questions without an answer."""
        self.unanswerable = self.unanswerable or any(question.is_unanswerable for question in examples)

    def build(self, backbone: nn.Module, tokenizer: Callable, inputs: InputConfig) -> None:
        writes = is_writer(backbone)
        if self.answers == "words" and not writes:
            raise ValueError(
                "answers 'words' needs a causal language model or an encoder-decoder with its head, got "
                f"{type(backbone).__name__}"
            )
        if writes and self.answers != "spans":
            self.words = Words(Writer(backbone, tokenizer), inputs, self.unanswerable, self.max_new_tokens)
            self.own_pass = self.words.writer.own_pass
            return
        if backbone.config.is_encoder_decoder:
            raise ValueError(f"answers 'spans' needs an encoder or a decoder, got {type(backbone).__name__}")
        width = backbone.config.get_text_config().hidden_size
        self.spans = Spans(tokenizer, width, inputs, self.unanswerable)

    def encode(self, examples: Sequence[Question]) -> list[Item]:
        """Inputs of the questions that have an answer, or are known to have none where there are such ones.

        To be marked, an answer must stand in the context where it says, or just once.
        """
        of_use = [
            (n, question)
            for n, question in enumerate(examples)
            if question.answers is not None and (self.unanswerable or not question.is_unanswerable)
        ]
        if self.words is not None:
            return [item for n, question in of_use for item in self.words.encode(n, question)]
        found = [(n, *placed(question)) for n, question in of_use]
        mended = sum(was_found for *_, was_found in found)
        if mended:
            logging.getLogger("fastprompt").warning(
                "%d of %d questions have an answer that does not stand where it says, but once elsewhere in the "
                "context: that place is taken",
                mended,
                len(examples),
            )
        found = [(n, question) for n, question, _ in found if question is not None]
        return self.spans.encode([n for n, _ in found], [question for _, question in found])

    def count(self, item: Item) -> int:
        return 1 if self.words is None else self.words.writer.count(item)

    def loss(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        return self.words.writer.loss(segments, items) if self.words is not None else self.spans.loss(segments, items)

    def loss_alone(self, model: Model, items: Sequence[Item]) -> Tensor:
        return self.words.writer.loss_alone(model, items)

    def align(self, pairs: Sequence[Pair], chosen: Sequence[int], rng: random.Random) -> list[Aligned]:
        if self.spans is None:
            raise ValueError("alignment form must be 'sentence' where the answer is written, got 'task'")
        return self.spans.align(pairs, chosen, rng)

    def predict(
        self,
        model: Model,
        examples: Sequence[Question],
        batch_size: int = 32,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """ "prediction" of each question, a text.

        Where answers are marked there is also their "score", a sum of two raw logits; it is None for an empty context.
        """
        if self.words is not None:
            return [{"prediction": text} for text in self.words.answers(model, examples, batch_size, on_batch)]
        found = self.spans.answers(model, examples, batch_size, on_batch)
        return [{"prediction": span.text, "score": span.score} for span in found]

    def scores(
        self, examples: Sequence[Question], predictions: Sequence[dict], language: str = "en"
    ) -> dict[str, float]:
        """ "exact_match" and "f1"; where some questions have no answer also the others of SQuAD v2."""
        unanswerable = self.unanswerable or any(question.is_unanswerable for question in examples)
        texts = [prediction["prediction"] for prediction in predictions]
        return answer_scores(self.metrics, examples, texts, language, unanswerable)


class Words:
    """The answer to a question as a language model writes it.

    A causal model reads context and question, and writes on up to the end of the line. Of a context that is too long
    the end is cut, and of a question that takes more than half of the room. An encoder-decoder reads both in T5's form.

    Args:
        writer: the model.
        inputs: prefix_text is put before all; max_length is of an input, with the answer if the model is causal.
        unanswerable: an answer may be empty.
        max_new_tokens: the most tokens of an answer.
    """

    def __init__(self, writer: Writer, inputs: InputConfig, unanswerable: bool, max_new_tokens: int) -> None:
        self.writer, self.inputs, self.unanswerable = writer, inputs, unanswerable
        self.max_new_tokens = max_new_tokens
        check_room(writer, inputs, max_new_tokens)

    def encode(self, number: int, question: Question) -> list[Item]:
        """An input for training on the first answer, wherever it stands; none if there is no room for the answer."""
        answer = next((answer.text for answer in question.answers if answer.text), "")
        if self.writer.is_encoder_decoder:
            asked, cut = self._asked(question, 0)
            return [Item(asked, len(asked), self.writer.target(answer), number, cut)]
        end = self.writer.ids(f" {answer}\n" if answer else "\n")
        if self.writer.tokenizer.eos_token_id is not None:
            end.append(self.writer.tokenizer.eos_token_id)
        if not end or len(end) >= self.inputs.max_length:
            return []
        asked, cut = self._asked(question, len(end))
        ids = [*asked, *end]
        return [Item(ids, len(ids), len(end), number, cut)]

    def _asked(self, question: Question, room: int) -> tuple[list[int], bool]:
        """Token ids of context and question that leave `room` for the answer, and whether something of them is cut."""
        tokenizer, before = self.writer.tokenizer, self.inputs.prefix_text
        if self.writer.is_encoder_decoder:
            text = f"{before}question: {question.question} context: {question.context}"
            encoded = tokenizer([text], truncation=True, max_length=self.inputs.max_length)
            return list(encoded["input_ids"][0]), was_cut(encoded, 0)
        left = self.inputs.max_length - room
        asked = self.writer.ids(f"\nQuestion: {question.question}\nAnswer:")
        end = self.writer.ids("\nAnswer:")
        most = max(left // 2, len(end) + 1)
        long = len(asked) > most
        asked = asked[: most - len(end)] + end if long else asked
        (context,) = without_end(tokenizer, [before + question.context])
        left = max(1, left - len(asked))
        return [*context[:left], *asked], long or len(context) > left

    def answers(
        self, model: Model, questions: Sequence[Question], batch_size: int, on_batch: Callable[[int], None] | None
    ) -> list[str]:
        """The text that answers each question, "" where the model writes none."""
        asked = [self._asked(question, self.max_new_tokens) for question in questions]
        items = [Item(ids, len(ids), example=n, cut=cut) for n, (ids, cut) in enumerate(asked)]
        tell_cut(items, self.inputs.max_length, len(questions))
        options = {}
        if not self.writer.is_encoder_decoder:
            # The line's end by its tokens: transformers' stop_strings does not know every kind of tokenizer.
            lines = [self.writer.ids("\n" * n) for n in (1, 2)]
            # Where every question has an answer: what is likeliest to be a line's end at once is not to end it.
            least = 0 if self.unanswerable else 1
            options = {"ends": [ids[0] for ids in lines if len(ids) == 1], "min_new_tokens": least}
        texts = self.writer.write(model, items, self.max_new_tokens, batch_size, on_batch, **options)
        return [text.strip().split("\n")[0].strip() for text in texts]


def _answers(row: Mapping[str, Any], where: str, labelled: bool) -> list[Answer] | None:
    """The answers in a row; None if nothing is said of them. Empty ones alone are none."""
    value, where = row.get("answers"), f"{where}, answers"
    if is_missing(value):
        text, start = row.get("answer"), row.get("answer_start")
        if text is None or (is_missing(text) and not labelled):
            return None
        value = {"text": "" if is_missing(text) else text, "answer_start": start}
    if isinstance(value, Mapping):
        value = _records(value, where)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: must be text and answer_start, or a list of such answers, got {shorten(value)}")
    answers = []
    for each in value:
        text = each.get("text") if isinstance(each, Mapping) else None
        if not isinstance(text, str):
            raise ValueError(f"{where}: must be text and answer_start, got {shorten(each)}")
        answers.append(Answer(text, _start(each.get("answer_start"), where)))
    return answers if any(answer.text for answer in answers) else []


def _records(value: Mapping[str, Any], where: str) -> list[dict]:
    """An answer, or the hub's columns of several, as a list of answers."""
    texts, starts = (_plain(value.get(name)) for name in ("text", "answer_start"))
    if not isinstance(texts, list):
        return [{"text": texts, "answer_start": starts}]
    starts = [None] * len(texts) if starts is None or starts == [] else starts
    if not isinstance(starts, list) or len(starts) != len(texts):
        raise ValueError(f"{where}: must be as many answer_start as text, got {shorten(starts)} and {len(texts)} text")
    return [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]


def _plain(value: Any) -> Any:
    """Arrays and their numbers, as tables give them, as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def _start(value: Any, where: str) -> int:
    value = _plain(value)
    if is_missing(value):
        return -1
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():  # of a table's column in which some are missing
        value = int(value)
    if type(value) is not int:
        raise ValueError(f"{where}: must have an integer as answer_start, got {shorten(value)}")
    return value
