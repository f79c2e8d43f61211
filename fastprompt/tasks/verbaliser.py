"""Verbaliser: a causal model says which class by the next word after a question."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastprompt.models.packed.logits import capped, scale_and_cap
from fastprompt.models.packed.weights import device_of, has_plain_weight

from .base import InputConfig, without_end

_FIELD = re.compile(r"\{(text|text_pair|labels)\}")
_ROWS = 256  # unit vectors at a time through a head whose weight cannot be read


class Verbaliser(nn.Module):
    """The inputs and the logits of classes that a causal model answers with a word. Nothing in it trains.

    The answer is the first token in which the words differ: where all of them begin with the same ones, as with a
    mark of SentencePiece that stands alone, those stand behind the question already.

    Args:
        tokenizer: transformers' tokenizer.
        model: the causal language model with its head, a constant here.
        question: with {text}, perhaps {text_pair}, and perhaps {labels}, for the words one after the other.
        words: the word of each class, as it follows the question: with the space before it, where there is one.
        inputs: `prefix_text` stands before each question. Of texts that are too long for `max_length` the ends are cut,
            those of the longer one first; the question stays whole.

    Raises:
        ValueError: words that cannot be told apart by a token, or a head of which it is not known what it computes.
    """

    def __init__(
        self, tokenizer: Callable, model: nn.Module, question: str, words: Sequence[str], inputs: InputConfig
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, inputs.max_length
        self.prefix_text, self.question = inputs.prefix_text, question
        self.labels = ", ".join(word.strip() for word in words)
        self.lead, tokens = self._first_tokens(words)
        known = scale_and_cap(model)
        if known is None:
            raise ValueError(
                f"answers must be 'head' for a model of family {model.config.model_type!r}: it is not known what it "
                "makes of its head's product, got 'words'"
            )
        self.scale, self.cap = known
        head = model.get_output_embeddings()
        # A head that is the embeddings, where they train, is read anew each time; it is no part of this module.
        trains = _is_plain(head) and head.weight.requires_grad and head.weight is model.get_input_embeddings().weight
        self._head = (head,) if trains else ()
        rows = (None, None) if self._head else _rows(model, tokens)
        for name, values in zip(("weight", "bias", "tokens"), (*rows, torch.tensor(tokens)), strict=True):
            self.register_buffer(name, values, persistent=False)

    def _first_tokens(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens that all words begin with, and the one that each goes on with.

        They are looked up behind a question: a word alone may begin with other tokens.
        """
        asked = self.written("One.", "Two." if "{text_pair}" in self.question else None)
        before, *answered = without_end(self.tokenizer, [asked, *(asked + word for word in words)])
        whole = all(ids[: len(before)] == before for ids in answered)
        after = [ids[len(before) :] for ids in answered]
        shared = 0
        while (
            whole and len({tuple(ids[: shared + 1]) for ids in after}) == 1 and all(len(ids) > shared for ids in after)
        ):
            shared += 1
        firsts = [ids[shared] for ids in after if len(ids) > shared]
        if not whole or len(firsts) < len(words) or len(set(firsts)) < len(words):
            tokens = [self.tokenizer.convert_ids_to_tokens(ids) for ids in after]
            raise ValueError(
                f"words must be told apart by the first token in which they differ after {asked[-8:]!r}, got "
                f"{_listed(words)}, of tokens {_listed(tokens)}: give other words, or answers='head'"
            )
        return after[0][:shared], firsts

    def written(self, text: str, pair: str | None = None) -> str:
        """The question about one text or two."""
        values: Mapping[str, str | None] = {"text": text, "text_pair": pair, "labels": self.labels}
        if (pair is None) == ("{text_pair}" in self.question):
            expected = "must not have {text_pair} for one text" if pair is None else "must have {text_pair} for two"
            raise ValueError(f"question {expected}, got {self.question!r}")
        return self.prefix_text + _FIELD.sub(lambda found: values[found[1]], self.question)

    def encode(self, texts: Sequence[tuple[str, str | None]]) -> list[tuple[list[int], bool]]:
        """Token ids of the questions, and of each whether a text was cut."""
        whole = self._ids([self.written(*each) for each in texts]) if texts else []
        return [
            (ids, False) if len(ids) <= self.max_length else (self._cut(*each), True)
            for ids, each in zip(whole, texts, strict=True)
        ]

    def _ids(self, questions: Sequence[str]) -> list[list[int]]:
        return [[*ids, *self.lead] for ids in without_end(self.tokenizer, questions)]

    def _cut(self, text: str, pair: str | None) -> list[int]:
        """Token ids of the question about as many characters of each text as fit, found by halving."""

        def about(count: int) -> list[int]:
            (ids,) = self._ids([self.written(text[:count], pair and pair[:count])])
            return ids

        fits, too_many = 1, max(len(text), len(pair or ""))
        found = about(fits)
        if len(found) > self.max_length:
            raise ValueError(
                f"max_length must hold the question itself, which has {len(found)} tokens with the least of a text, "
                f"got {self.max_length}"
            )
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            ids = about(middle)
            if len(ids) <= self.max_length:
                fits, found = middle, ids
            else:
                too_many = middle
        return found

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (B, C) of the hidden states (B, D) of the questions' last tokens: the model's own."""
        weight, bias = self.weight, self.bias
        if self._head:
            weight, bias = _taken(self._head[0], self.tokens)
        logits = self.scale * nn.functional.linear(hidden.to(weight.dtype), weight, bias)
        return capped(logits, self.cap)


def _is_plain(head: nn.Module) -> bool:
    return type(head) is nn.Linear and has_plain_weight(head)


@torch.no_grad()
def _rows(model: nn.Module, tokens: list[int]) -> tuple[Tensor, Tensor | None]:
    """Weight (C, D) and bias (C,) of tokens in a model's head, in float32 at least."""
    head = model.get_output_embeddings()
    if _is_plain(head):
        return _taken(head, tokens)
    # Offloaded, quantised or hooked: what it makes of unit vectors tells.
    unit = torch.eye(head.in_features, device=device_of(head), dtype=model.dtype)
    bias = torch.zeros(len(tokens), device=unit.device, dtype=unit.dtype)
    if getattr(head, "bias", None) is not None:
        bias = head(torch.zeros_like(unit[:1]))[0, tokens]
    weight = torch.cat([head(rows)[:, tokens] for rows in unit.split(_ROWS)]).T - bias[:, None]
    return _widened(weight), _widened(bias)


def _taken(head: nn.Linear, tokens: list[int] | Tensor) -> tuple[Tensor, Tensor | None]:
    return _widened(head.weight[tokens]), None if head.bias is None else _widened(head.bias[tokens])


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _listed(values: Sequence) -> str:
    """The first few of them, for an error."""
    return ", ".join(map(repr, values[:4])) + (f" and {len(values) - 4} more" if len(values) > 4 else "")
