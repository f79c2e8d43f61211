"""Classification: one of several classes, any of several, or a number, of one text or two."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.data.examples import Pair, Text
from fastprompt.data.reading import shorten
from fastprompt.models.packed.layout import tensor_on
from fastprompt.models.packed.served import geometry

from .base import (
    Aligned,
    InputConfig,
    Item,
    Model,
    Segments,
    Task,
    check_no_encoder_decoder,
    joined,
    run_sorted,
    was_cut,
    zero_head,
)
from .labels import Labels
from .metrics import accuracy
from .rows import cell, id_in, is_missing, tell_cut, text_in
from .scores import f1_scores, regression_scores
from .verbaliser import Verbaliser

PROBLEMS = {
    "single": ("accuracy", "macro_f1"),
    "multi": ("micro_f1", "macro_f1", "exact_match"),
    "regression": ("pearson", "spearman"),
}  # and the scores that may count, the usual one first
ANSWERS = ("auto", "head", "words")


class Classification(Task):
    """Classes of texts, or numbers for them.

    An encoder answers by a linear head, begun at 0, on the vector of its input. A causal language model answers, where
    it is to tell one class, with the next word after a question, without anything that begins at random; else, or with
    answers="head", by such a head on the last token.

    Args:
        labels: the names of the classes. None: those of the training examples.
        problem: "single": one class a text; "multi": any number of them, in a list or in one string, divided by "|";
            "regression": a number. The loss is the cross entropy; the mean over the classes of their binary ones; the
            squared error, in units of the deviation of the numbers that were trained on.
        answers: "head", "words", or "auto", which is "words" for a causal model with problem "single".
        words: for answers in words, the word that stands for each class, as it follows the question: with the space
            before it, where there is one. None: a space and the name of the class.
        question: for answers in words. It has {text}, for two texts {text_pair} as well, and may have {labels}: the
            words. None: the text, or both, and then "Which of these is it: {labels}? Answer:".
        metric: the score that counts: "accuracy" or "macro_f1"; "micro_f1", "macro_f1" or "exact_match" for "multi";
            "pearson" or "spearman" for "regression". None: the first of them.
        texts: 1 or 2 of them in each example. None: as the training examples have it.
        scale: mean and deviation of the numbers, for "regression". None: those of the training examples.

    Example:
        >>> task = Classification(labels=["bad", "good"])
        >>> task.example({"text": "Great!", "label": "good"}, "train.csv, line 2", 0)
        Text(id=0, text='Great!', text_pair=None, label='good')

    Raises:
        ValueError: settings that are unknown or do not fit each other.
    """

    name = "classification"
    columns: ClassVar[Mapping[str, str]] = {
        "id": "of the example; else the number of the row",
        "text": "the text",
        "text_pair": "a second text, where there are two",
        "label": "its class; several, divided by |; or a number",
    }
    labels: ClassVar[tuple[str, ...]] = ("label",)
    optional: ClassVar[tuple[str, ...]] = ("id", "text_pair")

    # What a preset has of its own.
    LABELS: ClassVar[tuple[str, ...] | None] = None
    WORDS: ClassVar[Mapping[str, str] | None] = None
    TEXTS: ClassVar[int | None] = None
    ONE = "{text}\nWhich of these is it: {labels}? Answer:"
    TWO = "Text 1: {text}\nText 2: {text_pair}\nWhich of these is it: {labels}? Answer:"

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        problem: str = "single",
        answers: str = "auto",
        words: Mapping[str, str] | None = None,
        question: str | None = None,
        metric: str | None = None,
        texts: int | None = None,
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.problem, self.answers, self.question = problem, answers, question
        self.texts = self.TEXTS if texts is None else texts
        for name, value, allowed in (
            ("problem", problem, tuple(PROBLEMS)),
            ("answers", answers, ANSWERS),
            ("texts", texts, (None, 1, 2)),
            ("metric", metric, (None, *PROBLEMS.get(problem, ()))),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if answers == "words" and problem != "single":
            raise ValueError(f"answers must be 'auto' or 'head' for problem {problem!r}, got 'words'")
        if question is not None and (not isinstance(question, str) or "{text}" not in question):
            raise ValueError(f"question must have {{text}} where the text is to stand, got {question!r}")
        self.known = Labels(problem, self.LABELS if labels is None else labels, scale)
        if words is not None and (
            not isinstance(words, Mapping) or not all(isinstance(each, str) and each for each in words.values())
        ):
            raise ValueError(f"words must be a word for each label, got {shorten(words)}")
        self.words = None if words is None else dict(words)
        self._check_words()
        self.metric = PROBLEMS[problem][0] if metric is None else metric
        self.is_causal, self.head, self.verbaliser = False, None, None

    def _check_words(self) -> None:
        classes = self.known.classes
        if self.words is not None and classes is not None and set(self.words) != set(classes):
            raise ValueError(
                f"words must have one for each of the labels {shorten(classes)}, got {shorten(self.words)}"
            )

    def settings(self) -> dict[str, Any]:
        names = ("problem", "answers", "words", "question", "metric", "texts")
        own = {name: getattr(self, name) for name in names}
        return {"labels": self.known.classes, "scale": self.known.scale} | own

    def example(self, row: Mapping[str, Any], where: str, number: int, *, labelled: bool = True) -> Text:
        text, pair = text_in(row, "text", where), row.get("text_pair")
        pair = None if is_missing(pair) else text_in(row, "text_pair", where)
        label = cell(row, "label", where) if labelled else row.get("label")
        if labelled or not is_missing(label):
            label = self.known.read(label, f"{where}, label:")
        else:
            label = None
        return Text(id_in(row, number), text, pair, label)

    def fit(self, examples: Sequence[Text]) -> None:
        """Learn the names of the classes, or mean and deviation of the numbers, and how many texts there are.

        Raises:
            ValueError: no examples, one without a label or with another than was told, or nothing to be learnt of them.
        """
        if not examples and self.known.complete:
            return
        if not examples:
            raise ValueError("examples must hold at least one to learn from, got none")
        self.texts = self._texts_of(examples)
        self.known.fit(examples)
        self._check_words()

    def _texts_of(self, examples: Sequence[Text]) -> int:
        """The number of texts in each of the examples, which must be one for all."""
        expected = self.texts or (1 if examples[0].text_pair is None else 2)
        for example in examples:
            if (example.text_pair is None) != (expected == 1):
                got = "no second one (text_pair)" if expected == 2 else f"a second one, {shorten(example.text_pair)}"
                raise ValueError(f"example {example.id!r} must have texts={expected}, as all examples, got {got}")
        return expected

    def build(self, backbone: nn.Module, tokenizer: Callable, inputs: InputConfig) -> None:
        check_no_encoder_decoder(backbone, self.name)
        outputs = self.known.outputs
        causal = geometry(backbone).is_causal
        speaks = causal and backbone.get_output_embeddings() is not None
        if self.answers == "words" and not speaks:
            raise ValueError(
                f"answers must be 'auto' or 'head' for {type(backbone).__name__}, which has no head of a causal "
                "language model, got 'words'"
            )
        self.tokenizer, self.inputs, self.is_causal = tokenizer, inputs, causal
        self.head, self.verbaliser = None, None
        # A causal model's last state alone has seen all of the text.
        self.pooling = "last" if causal else inputs.pooling
        if speaks and self.problem == "single" and self.answers != "head":
            words = self.words or self.WORDS or {label: f" {label}" for label in self.known.classes}
            question = self.question or (self.TWO if self.texts == 2 else self.ONE)
            words = [words[each] for each in self.known.classes]
            self.verbaliser = Verbaliser(tokenizer, backbone, question, words, inputs)
            return
        if self.words is not None or self.question is not None:
            raise ValueError(
                "words and question must be None where a head answers: with answers='head', an encoder, or another "
                f"problem than 'single', got {self.words} and {self.question!r}"
            )
        if self.texts == 2 and not causal:
            least = 2 + tokenizer.num_special_tokens_to_add(pair=True)
            least += len(tokenizer(inputs.prefix_text, add_special_tokens=False)["input_ids"])
            if inputs.max_length < least:
                raise ValueError(
                    f"max_length must be at least {least}, for a token of each text beside the special ones and those "
                    f"of prefix_text, got {inputs.max_length}"
                )
        self.head = zero_head(backbone, outputs)

    def encode(self, examples: Sequence[Text]) -> list[Item]:
        """Inputs of examples. Those of classes that are not known give none, which a warning tells."""
        told = [example for example in examples if example.label is not None]
        self.known.tell_unknown(told, "left out of the loss")
        items = []
        for item in self._items(examples):
            example = examples[item.example]
            if example.label is None:
                items.append(item)
            elif self.known.knows(example):
                items.append(item._replace(target=self.known.target(example)))
        return items

    def _items(self, examples: Sequence[Text]) -> list[Item]:
        """An input of each example, without the target."""
        if not examples:
            return []
        number = self._texts_of(examples)
        if self.verbaliser is not None:
            encoded = self.verbaliser.encode([(example.text, example.text_pair) for example in examples])
            return [Item(ids, len(ids), None, n, cut) for n, (ids, cut) in enumerate(encoded)]
        texts, pairs = [self.inputs.prefix_text + example.text for example in examples], None
        if number == 2:
            pairs = [example.text_pair for example in examples]
            if self.is_causal:  # whose tokenizers put nothing between two texts
                texts, pairs = [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)], None
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.inputs.max_length)
        items = []
        for n, ids in enumerate(encoded["input_ids"]):
            if not ids:
                raise ValueError(f"example {examples[n].id!r} must have at least one token, got none for {texts[n]!r}")
            sides = [] if pairs is None else encoded.sequence_ids(n)
            second = sides.index(1) if 1 in sides else len(ids)
            items.append(Item(ids, second, None, n, was_cut(encoded, n)))
        return items

    def logits(self, segments: Segments) -> Tensor:
        """(B, C), or (B, 1) for a number."""
        if self.verbaliser is not None:
            return self.verbaliser(segments.pooled("last"))
        return self.head(segments.pooled(self.pooling).to(self.head.weight.dtype))

    def loss(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        logits = self.logits(segments)
        targets = tensor_on([item.target for item in items], logits.device)
        if self.problem == "single":
            return F.cross_entropy(logits, targets, reduction="sum")
        targets = targets.to(logits.dtype)
        if self.problem == "multi":
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
            return losses / len(self.known.classes)
        return (logits[:, 0] - targets).square().sum()

    def align(self, pairs: Sequence[Pair], chosen: Sequence[int], rng: random.Random) -> list[Aligned]:
        """Pairs two by two, each in either language, of a task of two texts whose head stands on an encoder.

        Raises:
            ValueError: another task, which has no form of its own for sentences.
        """
        if self.texts == 1 or self.is_causal:
            what = "a causal model" if self.is_causal else "one text"
            raise ValueError(f"alignment form must be 'sentence' for {self.name} of {what}, got 'task'")
        made = []
        for n in range(0, len(chosen) - 1, 2):
            texts = [[(rng.choice(pairs[pair][:2]), pair)] for pair in chosen[n : n + 2]]
            made.append(joined(self.tokenizer, texts, self.inputs.prefix_text, self.inputs.max_length))
        return made

    def predict(
        self,
        model: Model,
        examples: Sequence[Text],
        batch_size: int = 32,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """ "prediction" and "probability" of each example.

        They are a class and its probability; for "multi" the classes with a probability above a half, and the
        probability of every class; for "regression" a number, without a probability.
        """
        items = self._items(examples)
        tell_cut(items, self.inputs.max_length, len(examples))
        rows = run_sorted(model, items, lambda segments, _: self.logits(segments), batch_size, on_batch)
        return [self.known.prediction(row) for row in rows]

    def scores(self, examples: Sequence[Text], predictions: Sequence[dict], language: str = "en") -> dict[str, float]:
        """ "accuracy" and "macro_f1"; "micro_f1", "macro_f1" and "exact_match"; or "pearson", "spearman" and "mse"."""
        truth, given = [self.known.of(example) for example in examples], [each["prediction"] for each in predictions]
        if self.problem == "regression":
            return regression_scores(truth, given)
        self.known.tell_unknown(examples, "scored as wrong")
        if self.problem == "single":
            groups = [[{each} for each in side] for side in (truth, given)]
            return accuracy(truth, given) | {"macro_f1": f1_scores(*groups)["macro_f1"]}
        truth, given = [set(each) for each in truth], [set(each) for each in given]
        exact = accuracy(truth, given)["accuracy"]
        return f1_scores(truth, given) | {"exact_match": exact}


class PawsX(Classification):
    """PAWS-X: whether two sentences mean the same, with XTREME's accuracy as the only score."""

    name = "pawsx"
    LABELS, WORDS, TEXTS = ("0", "1"), {"0": " No", "1": " Yes"}, 2
    TWO = "Sentence 1: {text}\nSentence 2: {text_pair}\nDo both sentences mean the same? Answer:"

    def scores(self, examples: Sequence[Text], predictions: Sequence[dict], language: str = "en") -> dict[str, float]:
        return {"accuracy": super().scores(examples, predictions, language)["accuracy"]}
