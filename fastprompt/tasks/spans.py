"""Answers that stand in the context: where they begin and end, by the hidden states of an encoder."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.data.examples import Answer, Pair, Question
from fastprompt.data.windows import Span, Window, best_answers, windows
from fastprompt.models.packed.layout import tensor_on
from fastprompt.ops import segment_mean

from .base import Aligned, InputConfig, Item, Model, Segments, joined, run_sorted
from .rows import tell_cut

SENTENCES = 5  # of a context made for the alignment


class Spans(nn.Module):
    """Where the answer begins and ends.

    A row's logits are linear in its hidden state h, plus its likeness to the question, 10 cos(h, W q) with q the mean
    of the question's rows and W begun at the identity, one for the beginning and one for the end. A few dozen examples
    teach a linear head alone little; likeness to the question is something the model has already. (Ours.)

    Args:
        tokenizer: transformers' tokenizer, a fast one.
        width: features of a hidden state.
        inputs: prefix_text is put before the question.
        unanswerable: questions may have no answer; the first token, a special one, stands for that.

    Raises:
        ValueError: an input's first token is not a special one, if it is to stand for no answer.
    """

    def __init__(self, tokenizer: Callable, width: int, inputs: InputConfig, unanswerable: bool) -> None:
        super().__init__()
        self.tokenizer, self.inputs, self.unanswerable = tokenizer, inputs, unanswerable
        self.head = nn.Linear(width, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.match = nn.Parameter(torch.eye(width).repeat(2, 1, 1))  # (2, D, D)
        if unanswerable and not any(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][:1]):
            raise ValueError(
                f"unanswerable needs a tokenizer whose inputs begin with a special token, which stands for no answer, "
                f"got {type(tokenizer).__name__}, which adds none"
            )

    def windows(self, questions: Sequence[Question]) -> list[Window]:
        inputs = self.inputs
        return windows(self.tokenizer, questions, inputs.max_length, inputs.stride, inputs.prefix_text)

    def encode(self, numbers: Sequence[int], questions: Sequence[Question]) -> list[Item]:
        """Inputs for training of questions whose answer is known, with their numbers among the examples."""
        items, found = [], self.windows(questions)
        held = {window.question for window in found if window.answer is not None}
        for window in found:
            rows = window.answer
            if rows is None and self.unanswerable:
                # An answer that no window holds whole is not to be taken for none.
                rows = (0, 0) if window.question in held or questions[window.question].is_unanswerable else None
            if rows is not None:
                # The target: the answer's rows, and how many rows the piece of the context has.
                target = (rows, len(window.spans))
                items.append(Item(window.ids, window.first, target, numbers[window.question], window.cut))
        return items

    def align(self, pairs: Sequence[Pair], chosen: Sequence[int], rng: random.Random) -> list[Aligned]:
        """Contexts of some sentences; one of them, perhaps in the other language, is the question."""
        made = []
        for n in range(0, len(chosen), SENTENCES):
            group = chosen[n : n + SENTENCES]
            context = [(rng.choice(pairs[pair][:2]), pair) for pair in group]
            asked = rng.choice(group)
            question = [(rng.choice(pairs[asked][:2]), asked)]
            texts = [question, context]
            made.append(joined(self.tokenizer, texts, self.inputs.prefix_text, self.inputs.max_length))
        return made

    def logits(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        """(B, L, 2), -inf at rows that cannot be of an answer."""
        hidden, bounds = segments.hidden.to(self.head.weight.dtype), segments.bounds
        longest = max(len(item.ids) for item in items)
        asked, rows, places, counts = [], [], [], []
        for n, (begin, item) in enumerate(zip(bounds, items, strict=False)):
            asked.append(range(begin + 1, begin + item.second))  # the special first row aside
            columns = [0] if self.unanswerable else []
            columns += range(item.second, item.second + item.target[1])
            rows += [begin + column for column in columns]
            places += [n * longest + column for column in columns]
            counts.append(len(columns))
        rows, places = tensor_on(np.array([rows, places], dtype=np.int64), hidden.device)
        owners = tensor_on(np.repeat(np.arange(len(items)), counts), hidden.device)
        states = hidden.index_select(0, rows)  # (R, D)
        likeness = F.normalize(states, dim=-1) @ F.normalize(self._questions(hidden, asked), dim=-1).flatten(0, 1).mT
        own = owners[:, None, None].expand(-1, 1, 2)  # of each row that to its own input's question
        likeness = likeness.view(len(states), len(items), 2).gather(1, own)[:, 0]
        logits = self.head(states) + 10 * likeness
        return logits.new_full((len(items) * longest, 2), -torch.inf).index_copy(0, places, logits).view(-1, longest, 2)

    def _questions(self, hidden: Tensor, asked: Sequence[range]) -> Tensor:
        """(B, 2, D): of the mean of each question's rows, what the rows are likened to."""
        rows = tensor_on(np.array([row for each in asked for row in each], dtype=np.int64), hidden.device)
        bounds = tensor_on(np.cumsum([0, *map(len, asked)], dtype=np.int32), hidden.device)
        return (segment_mean(hidden.index_select(0, rows), bounds) @ self.match.mT).transpose(0, 1)

    def loss(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        """The sum of the items' losses, each the mean of that of the answer's beginning and that of its end."""
        rows = tensor_on([item.target[0] for item in items], segments.hidden.device)  # (B, 2)
        return F.cross_entropy(self.logits(segments, items), rows, reduction="sum") / 2  # classes: the L rows

    def answers(
        self, model: Model, questions: Sequence[Question], batch_size: int, on_batch: Callable[[int], None] | None
    ) -> list[Span]:
        """The best answer to each question."""
        found = self.windows(questions)
        items = [
            Item(window.ids, window.first, (None, len(window.spans)), window.question, window.cut) for window in found
        ]
        tell_cut(items, self.inputs.max_length, len(questions))
        logits = run_sorted(model, items, self.logits, batch_size, on_batch)
        logits = [rows[: len(item.ids)] for rows, item in zip(logits, items, strict=True)]
        return best_answers(questions, found, logits, unanswerable=self.unanswerable)


def placed(question: Question) -> tuple[Question | None, bool]:
    """A question with an answer that stands where it says, and whether its place had to be found.

    An answer that does not stand there, but once in the context, is the one that was meant. None: nor is there such a
    one. A question without an answer is as it should be.
    """
    if question.is_unanswerable or question.exact_answers:
        return question, False
    for answer in question.answers or []:
        places = _places(answer.text, question.context) if answer.text else []
        if len(places) == 1:
            return question._replace(answers=[Answer(answer.text, places[0])]), True
    return None, False


def _places(text: str, context: str) -> list[int]:
    """Where a text stands in a context, and is not cut out of a word or a number: "no" does not stand in "know"."""
    places, begin = [], context.find(text)
    while begin >= 0:
        around = context[:begin][-1:], context[begin + len(text) :][:1]
        if not (_joins(around[0], text[0]) or _joins(text[-1], around[1])):
            places.append(begin)
        begin = context.find(text, begin + 1)
    return places


def _joins(first: str, second: str) -> bool:
    """Whether two characters are of one word; letters without case may be of scripts without spaces, so are not."""
    return all(each.islower() or each.isupper() or each.isdigit() for each in (first, second))
