"""Tagging: a tag for each word of a sentence, such as the entity or the part of speech that it is of."""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt._extras import require
from fastprompt.data.examples import Tagged
from fastprompt.data.reading import shorten
from fastprompt.data.windows import check_fast
from fastprompt.models.packed.layout import tensor_on
from fastprompt.models.packed.served import geometry

from .base import InputConfig, Item, Model, Segments, Task, check_no_encoder_decoder, run_sorted, was_cut, zero_head
from .metrics import accuracy
from .rows import cell, id_in, is_missing, tell_cut, tell_names

OUTSIDE = "O"


class Words(NamedTuple):
    """What an input asks of its words.

    Attributes:
        rows: the token that stands for each.
        numbers: which words of the sentence they are.
        tags: the number of the tag of each; None: not known.
    """

    rows: list[int]
    numbers: list[int]
    tags: list[int] | None = None


class Tagging(Task):
    """A tag for each word: of a named entity, a part of speech, and so on.

    A linear head, begun at 0, reads the hidden state of each word's first token; of a causal model that of its last,
    which alone has seen the whole word. The loss is the cross entropy.

    A sentence that is too long becomes several windows of whole words, which share `stride` tokens, half of a window at
    most; each word is read where it has the most of its neighbours around it. A word without a token of its own, such
    as one of white space, is no part of the loss, and is predicted to be "O", or the first of the tags where there is
    no such tag.

    Args:
        tags: the names of the tags. None: those of the training examples.

    Example:
        >>> task = Tagging()
        >>> task.example({"words": "Ada lives here", "tags": "B-PER O O"}, "train.conll, line 1", 0)
        Tagged(id=0, words=['Ada', 'lives', 'here'], tags=['B-PER', 'O', 'O'])

    Raises:
        ValueError: no names, or two that are the same.
    """

    name = "tagging"
    columns: ClassVar[Mapping[str, str]] = {
        "id": "of the sentence; else the number of the row",
        "words": "the words, in a list or divided by white space",
        "tags": "the tag of each word, likewise",
    }
    labels: ClassVar[tuple[str, ...]] = ("tags",)

    def __init__(self, tags: Sequence[str] | None = None) -> None:
        super().__init__()
        if tags is not None and (
            isinstance(tags, str) or not tags or not all(isinstance(each, str) and each for each in tags)
        ):
            raise ValueError(f"tags must be names, got {shorten(tags)}")
        if tags is not None and len(set(tags)) < len(tags):
            raise ValueError(f"tags must differ, got {shorten(tags)}")
        self.tags = None if tags is None else list(tags)
        self.head: nn.Linear | None = None

    @property
    def metric(self) -> str:
        """ "f1", of whole entities; "accuracy" of words where no tag has a B- or an I- before it."""
        return "f1" if _marks_entities(self.tags or ()) else "accuracy"

    def settings(self) -> dict[str, Any]:
        return {"tags": self.tags}

    def example(self, row: Mapping[str, Any], where: str, number: int, *, labelled: bool = True) -> Tagged:
        words = _listed(cell(row, "words", where), f"{where}, words:")
        tags = cell(row, "tags", where) if labelled else row.get("tags")
        tags = None if not labelled and (is_missing(tags) or tags == []) else _listed(tags, f"{where}, tags:")
        if tags is not None and len(tags) != len(words):
            raise ValueError(f"{where}, tags: must be one for each of the {len(words)} words, got {len(tags)}")
        return Tagged(id_in(row, number), words, tags)

    def fit(self, examples: Sequence[Tagged]) -> None:
        """Learn the names of the tags, or hold the examples to them.

        Raises:
            ValueError: no examples, one without tags or with others than was told.
        """
        if not examples and self.tags is None:
            raise ValueError("examples must hold at least one to learn from, got none")
        found = Counter(tag for example in examples for tag in _tags_of(example))
        if self.tags is None:
            self.tags = sorted(found)
            tell_names("tags", found)
        for example in examples:
            unknown = [tag for tag in example.tags if tag not in self.tags]
            if unknown:
                raise ValueError(f"tags of example {example.id!r} must be of {shorten(self.tags)}, got {unknown[0]!r}")

    def build(self, backbone: nn.Module, tokenizer: Callable, inputs: InputConfig) -> None:
        check_no_encoder_decoder(backbone, self.name)
        check_fast(tokenizer)
        if self.tags is None:
            raise ValueError("tags must be given, or learnt of examples by fit, before a head is built")
        self.tokenizer, self.inputs, self.is_causal = tokenizer, inputs, geometry(backbone).is_causal
        self.head = zero_head(backbone, len(self.tags))

    def encode(self, examples: Sequence[Tagged]) -> list[Item]:
        """Inputs of sentences. Words with tags that are not known are left out, which a warning tells."""
        self._tell_unknown(examples, "left out of the loss")
        items = []
        for item in self._items(examples):
            tags = examples[item.example].tags
            if tags is not None:
                known = [n for n, number in enumerate(item.target.numbers) if tags[number] in self.tags]
                rows, numbers = ([each[n] for n in known] for each in item.target[:2])
                target = Words(rows, numbers, [self.tags.index(tags[number]) for number in numbers])
                item = item._replace(target=target)
            if item.target.rows:
                items.append(item)
        return items

    def _items(self, examples: Sequence[Tagged]) -> list[Item]:
        """Windows of sentences, in which each word that has a token is asked for once; without tags."""
        if not examples:
            return []
        prefix, limit = self.inputs.prefix_text, self.inputs.max_length
        whole = self._tokens([prefix + " ".join(example.words) for example in examples], [e.words for e in examples])
        pieces = []  # (example, first word, words)
        for n, (ids, places, _) in enumerate(whole):
            for begin, end in [(0, len(places))] if len(ids) <= limit else self._pieces(examples[n].id, ids, places):
                pieces.append((n, begin, examples[n].words[begin:end]))
        read = self._tokens([prefix + " ".join(words) for *_, words in pieces], [words for *_, words in pieces], limit)
        # Of each word: how many words are around it on the narrower side, where most are; the piece, and its row there.
        best: dict[tuple[int, int], tuple[float, int, int]] = {}
        for place, ((n, begin, words), (_, places, _)) in enumerate(zip(pieces, read, strict=True)):
            end = begin + len(words)
            for word, rows in enumerate(places, begin):
                if rows is not None:
                    before = word - begin if begin else math.inf  # where the sentence begins nothing is missing
                    after = end - 1 - word if end < len(examples[n].words) else math.inf
                    around = min(before, after)
                    if (n, word) not in best or around > best[n, word][0]:
                        best[n, word] = around, place, rows[-1] if self.is_causal else rows[0]
        asked: list[Words] = [Words([], []) for _ in pieces]
        for (_, word), (_, place, row) in best.items():
            asked[place].rows.append(row)
            asked[place].numbers.append(word)
        return [
            Item(ids, len(ids), words, n, cut)
            for (n, *_), (ids, _, cut), words in zip(pieces, read, asked, strict=True)
            if words.rows
        ]

    def _tokens(
        self, texts: Sequence[str], sentences: Sequence[Sequence[str]], limit: int | None = None
    ) -> list[tuple[list[int], list[tuple[int, int] | None], bool]]:
        """Of each text, which ends with a sentence of words: its token ids, the first and the last token of each word
        (None: it has none), and whether it was cut to `limit` tokens.
        """
        length = {} if limit is None else {"truncation": True, "max_length": limit}
        encoded = self.tokenizer(list(texts), return_offsets_mapping=True, **length)
        found = []
        for n, (text, words) in enumerate(zip(texts, sentences, strict=True)):
            spans = encoded["offset_mapping"][n]
            ends = list(accumulate((len(word) + 1 for word in words), initial=len(text) - len(" ".join(words))))
            places, row = [], 0
            for begin, word in zip(ends, words, strict=False):
                while row < len(spans) and spans[row][1] <= begin:  # special tokens stand for no characters: (0, 0)
                    row += 1
                after = row
                while after < len(spans) and (spans[after][0] < begin + len(word)) and spans[after][1] > begin:
                    after += 1
                places.append((row, after - 1) if after > row else None)
            found.append((encoded["input_ids"][n], places, was_cut(encoded, n)))
        return found

    def _pieces(
        self, id: str | int, ids: Sequence[int], places: Sequence[tuple[int, int] | None]
    ) -> list[tuple[int, int]]:
        """Words [begin, end) of the windows of a sentence, by the tokens that each word has."""
        sizes = [0 if place is None else place[1] - place[0] + 1 for place in places]
        room = self.inputs.max_length - (len(ids) - sum(sizes))
        if room < 1:
            raise ValueError(
                f"max_length must be above {self.inputs.max_length - room}, the tokens beside the words of example "
                f"{id!r}, got {self.inputs.max_length}"
            )
        stride = min(self.inputs.stride, room // 2)
        found, begin = [], 0
        while True:
            end, used = begin, 0
            while end < len(sizes) and (end == begin or used + sizes[end] <= room):
                used += sizes[end]
                end += 1
            found.append((begin, end))
            if end == len(sizes):
                return found
            begin, used = end, 0
            while begin - 1 > found[-1][0] and used + sizes[begin - 1] <= stride:
                begin -= 1
                used += sizes[begin]

    def count(self, item: Item) -> int:
        return len(item.target.rows)

    def logits(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        """(N, tags) of all words that the items ask for, item by item."""
        rows = [begin + row for begin, item in zip(segments.bounds, items, strict=False) for row in item.target.rows]
        hidden = segments.hidden[tensor_on(rows, segments.hidden.device)]
        return self.head(hidden.to(self.head.weight.dtype))

    def loss(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        logits = self.logits(segments, items)
        tags = tensor_on([tag for item in items for tag in item.target.tags], logits.device)
        return F.cross_entropy(logits, tags, reduction="sum")

    def predict(
        self,
        model: Model,
        examples: Sequence[Tagged],
        batch_size: int = 32,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """ "prediction" of each sentence, a tag for each word, and "probability", that of each tag.

        A word without a token has the probability 0.
        """
        items = self._items(examples)
        tell_cut(items, self.inputs.max_length, len(examples))

        def read(segments: Segments, batch: Sequence[Item]) -> Sequence[Tensor]:
            return self.logits(segments, batch).split([len(item.target.rows) for item in batch])

        default = OUTSIDE if OUTSIDE in self.tags else self.tags[0]
        found = [{"prediction": [default] * len(e.words), "probability": [0.0] * len(e.words)} for e in examples]
        for item, rows in zip(items, run_sorted(model, items, read, batch_size, on_batch), strict=True):
            shares, tags = rows.double().softmax(1).max(1)
            for n, share, tag in zip(item.target.numbers, shares.tolist(), tags.tolist(), strict=True):
                found[item.example]["prediction"][n] = self.tags[tag]
                found[item.example]["probability"][n] = share
        lost = sum(len(e.words) for e in examples) - sum(self.count(item) for item in items)
        if lost:
            text = "%d words have no token of their own, and are predicted to be %s"
            logging.getLogger("fastprompt").warning(text, lost, default)
        return found

    def scores(self, examples: Sequence[Tagged], predictions: Sequence[dict], language: str = "en") -> dict[str, float]:
        """ "accuracy" of words and, where tags have B- or I-, seqeval's "f1", "precision" and "recall" of entities."""
        self._tell_unknown(examples, "scored as wrong")
        truth, given = [_tags_of(example) for example in examples], [each["prediction"] for each in predictions]
        for example, tags in zip(examples, given, strict=True):
            if len(tags) != len(example.words):
                raise ValueError(
                    f"prediction of example {example.id!r} must have {len(example.words)} tags, got {len(tags)}"
                )
        scores = accuracy([tag for tags in truth for tag in tags], [tag for tags in given for tag in tags])
        if self.metric == "accuracy":
            return scores
        metrics = require("seqeval.metrics", "train")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags without B-, and of no entities at all, which is 0
            entities = {
                "f1": metrics.f1_score(truth, given),
                "precision": metrics.precision_score(truth, given),
                "recall": metrics.recall_score(truth, given),
            }
        return {name: 100.0 * float(score) for name, score in entities.items()} | scores

    def _tell_unknown(self, examples: Sequence[Tagged], what: str) -> None:
        tags = [tag for example in examples for tag in example.tags or ()]
        unknown = [tag for tag in tags if tag not in self.tags]
        if unknown:
            text = "%d of %d words have a tag that training did not have, such as %s, and are %s"
            logging.getLogger("fastprompt").warning(text, len(unknown), len(tags), shorten(unknown[0]), what)


def _marks_entities(tags: Sequence[str]) -> bool:
    return any(tag.startswith(("B-", "I-")) for tag in tags)


def _tags_of(example: Tagged) -> list[str]:
    if example.tags is None:
        raise ValueError(f"example {example.id!r} must have tags, got none")
    return example.tags


def _listed(value: Any, where: str) -> list[str]:
    """A list of words, or what white space divides; a ValueError begins with `where`."""
    parts = value.split() if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts or not all(isinstance(each, str | int) for each in parts):
        raise ValueError(
            f"{where} must be a list of texts, or a text with white space between them, got {shorten(value)}"
        )
    return [str(each) for each in parts]
