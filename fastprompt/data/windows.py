"""Questions with long contexts: overlapping windows of tokens, and the best span over all windows of a question."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .examples import Question


class Window(NamedTuple):
    """A question with a piece of its context.

    Attributes:
        question: index of the question.
        ids: token ids of question and piece.
        first: row of the piece's first token; those before it, and the special token at the end, hold no answer.
        spans: characters [begin, end) of the context that each token of the piece stands for.
        answer: rows of the first and the last token of the answer; None where the piece does not hold it whole.
        cut: whether the question was.
    """

    question: int
    ids: list[int]
    first: int
    spans: list[tuple[int, int]]
    answer: tuple[int, int] | None
    cut: bool = False


def check_fast(tokenizer: Callable) -> None:
    """Raise a ValueError unless the tokenizer tells which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, which knows characters, got {type(tokenizer).__name__}")


def windows(
    tokenizer: Callable, questions: Sequence[Question], max_length: int = 384, stride: int = 128, prefix_text: str = ""
) -> list[Window]:
    """Cut each question's context into windows of at most `max_length` tokens, the question in each of them.

    Args:
        tokenizer: transformers' tokenizer, a fast one: it tells which characters a token stands for.
        questions: those with answers that stand in the context get the first one's rows.
        max_length: tokens of a window. A question is cut to half of it.
        stride: tokens that neighbouring windows share.
        prefix_text: put before each question.

    Raises:
        ValueError: a tokenizer that is not fast, or windows too small for what they share.
    """
    check_fast(tokenizer)
    if not questions:
        return []
    room = max_length // 2
    texts = whole = [prefix_text + question.question for question in questions]
    asked = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    texts = [
        text[: spans[room - 1][1]] if len(spans) > room else text for text, spans in zip(texts, asked, strict=True)
    ]
    # Counted again: a character of several tokens is not cut, and what is cut may have other tokens than it had.
    longest = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    longest += tokenizer.num_special_tokens_to_add(pair=True)
    if stride < 0 or max_length - longest <= stride:
        raise ValueError(
            f"stride must be from 0 to below {max_length - longest}, what a max_length of {max_length} leaves for the "
            f"context beside the longest question, got {stride}"
        )
    cut = tokenizer(
        texts,
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found = []
    for row, index in enumerate(cut["overflow_to_sample_mapping"]):
        sides = cut.sequence_ids(row)
        piece = [n for n, side in enumerate(sides) if side == 1]
        spans = _with_marks(questions[index].context, [cut["offset_mapping"][row][n] for n in piece])
        answer = _rows(questions[index], spans)
        first = piece[0] if piece else len(sides)
        answer = None if answer is None else (first + answer[0], first + answer[1])
        shortened = texts[index] != whole[index]
        found.append(Window(index, cut["input_ids"][row], first, spans, answer, shortened))
    return found


def _with_marks(context: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Marks that a tokenizer composed with a letter, or left out as accents, belong to the token before them."""
    limits = [begin for begin, _ in spans[1:]] + [len(context)]
    whole = []
    for (begin, end), limit in zip(spans, limits, strict=False):
        while begin < end < limit and unicodedata.category(context[end]) in ("Mn", "Mc", "Me", "Cf"):
            end += 1
        whole.append((begin, end))
    return whole


def _rows(question: Question, spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last token of the first answer among the piece's tokens."""
    if not question.exact_answers or not spans:
        return None
    answer = question.exact_answers[0]
    begin, end = answer.start, answer.start + len(answer.text)
    inside = [n for n, (a, b) in enumerate(spans) if a < end and b > begin]
    # The whole answer: its first and its last character are in tokens of this piece.
    if not inside or spans[inside[0]][0] > begin or spans[inside[-1]][1] < end:
        return None
    return inside[0], inside[-1]


class Span(NamedTuple):
    """The best answer to a question: its text, "" where there is none, and its score, the sum of two raw logits."""

    text: str
    score: float | None


def best_answers(
    questions: Sequence[Question],
    found: Sequence[Window],
    logits: Sequence[Tensor],
    max_answer_tokens: int = 30,
    unanswerable: bool = False,
) -> list[Span]:
    """The text of the best span of each question over all its windows, in the order of the questions.

    Args:
        questions: as given to `windows`.
        found: what it made of them.
        logits: of each window (L, 2), that a token begins and that it ends the answer. The best span has the largest
            sum, of raw logits, so that windows compare.
        max_answer_tokens: the most tokens of a span.
        unanswerable: a window's first token stands for "no answer", with a sum of its own; the least of these over the
            windows of a question is that of the question, as in SQuAD v2: where every window is rather without.

    Returns:
        Where that of no answer is larger than the best span's, and where there is no span, the text "". The score is
        that of the text; None where there was nothing to choose from.
    """
    best: dict[int, Span] = {}
    nothing: dict[int, float] = {}
    for window, scores in zip(found, logits, strict=True):
        scores, count = scores.float(), len(window.spans)
        if unanswerable:
            nothing[window.question] = min(float(scores[0].sum()), nothing.get(window.question, torch.inf))
        if count == 0:
            continue
        begin, end = scores[window.first : window.first + count].unbind(1)
        # A span of n + 1 tokens from each first token: row n of the table.
        reach = min(max_answer_tokens, count)
        ends = torch.nn.functional.pad(end, (0, reach - 1), value=-torch.inf).unfold(0, reach, 1)  # (count, reach)
        score, place = (begin[:, None] + ends).flatten().max(0)
        first, more = divmod(int(place), reach)
        text = questions[window.question].context[window.spans[first][0] : window.spans[first + more][1]].strip()
        if window.question not in best or float(score) > best[window.question].score:
            best[window.question] = Span(text, float(score))
    for index, score in nothing.items():
        if index not in best or score > best[index].score:
            best[index] = Span("", score)
    return [best.get(index, Span("", None)) for index in range(len(questions))]
