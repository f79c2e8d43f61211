"""Task: what a task reads, and what it makes of a backbone's hidden states. A task of one's own is a subclass."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastprompt._settings import check_fields, setting
from fastprompt.data.examples import Pair
from fastprompt.nn.pooling import POOLINGS, pool


@dataclass(frozen=True)
class InputConfig:
    """How text becomes an input of the backbone, and what a text's vector is.

    Attributes:
        prefix_text: a text that is put before each text, such as "query: " for the E5 models.
        max_length: the most tokens of an input; longer ones are cut, or become several windows.
        stride: how many tokens neighbouring windows of a long context share.
        pooling: a text's vector is the "mean" of its tokens' hidden states, or that of its "first" or "last" token.

    Example:
        >>> inputs = InputConfig(prefix_text="query: ", max_length=128)

    Raises:
        ValueError: a value of another type or outside its range.
    """

    prefix_text: str = setting("", 'Put before each text, such as "query: " for E5.', basic=True)
    max_length: int = setting(384, "The most tokens of an input; longer ones are cut, or become windows.", basic=True)
    stride: int = setting(128, "Tokens that neighbouring windows of a long context share.")
    pooling: str = setting(
        "mean", "A text's vector: the mean of its tokens, or the first or last.", choices=("mean", "first", "last")
    )

    def __post_init__(self) -> None:
        check_fields(InputConfig, vars(self))
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {tuple(POOLINGS)}, got {self.pooling!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be a positive integer, got {self.max_length}")
        if self.stride < 0:
            raise ValueError(f"stride must not be negative, got {self.stride}")


class Item(NamedTuple):
    """An input of the backbone.

    Attributes:
        ids: token ids.
        second: the place where the second of two texts begins, for backbones that tell them apart; len(ids) if there
            is one text.
        target: what a task makes of it; None where the answer is not known.
        example: which of the examples it was made of.
        cut: whether something of it did not fit in.
    """

    ids: list[int]
    second: int
    target: Any = None
    example: int = 0
    cut: bool = False


class Aligned(NamedTuple):
    """An input of the alignment.

    Attributes:
        item: the input.
        parts: (begin, end, pair) each: the vector of tokens [begin, end) is drawn to the teacher's vector of that pair.
    """

    item: Item
    parts: list[tuple[int, int, int]]


class Segments(NamedTuple):
    """Hidden states of B inputs that ran packed.

    Attributes:
        hidden: (T, D), those of all inputs, one input after the other. There may be more behind the last input.
        cu_seqlens: (B+1,) int32, on the device of `hidden`: input b is hidden[cu_seqlens[b]:cu_seqlens[b + 1]].
        bounds: the same numbers on the host.
    """

    hidden: Tensor
    cu_seqlens: Tensor
    bounds: list[int]

    def pooled(self, pooling: str) -> Tensor:
        """(B, D): of each input the "mean" of its hidden states, the "first" or the "last" of them."""
        return pool(self.hidden[: self.bounds[-1]], pooling, cu_seqlens=self.cu_seqlens)

    def split(self) -> list[Tensor]:
        """The hidden states (T_b, D) of each input."""
        return [self.hidden[a:b] for a, b in zip(self.bounds, self.bounds[1:], strict=False)]


class Model(Protocol):
    """What a task is given to predict with: the adapted backbone."""

    def __call__(self, items: Sequence[Item]) -> Segments:
        """Hidden states of items. Gradients and modes are the caller's matter."""

    def generate(self, **inputs) -> Tensor:
        """What transformers' generate gives, with the prompt in place.

        Args:
            inputs: input_ids and attention_mask (B, L), padded on the left, and options of generate.
        """

    def forward(self, **inputs):
        """The output of the whole backbone, head included, for its own keyword arguments, with the prompt in place."""


class Task(nn.Module):
    """What a task reads, learns and predicts. Subclass it for a task of your own, and give that to `Trainer(task=...)`.

    Its parameters are those of its head; a task that the model answers in its own words has none.

    A task is made with its settings, then `fit` learns from the labelled examples what the settings leave open (the
    names of the classes), and `build` makes the head for a backbone. After that `encode`, `loss`, `predict` and
    `scores` are called any number of times. What `settings` returns makes the task again without `fit`: it goes into
    the run's folder.

    Attributes:
        name: the name by which the command line and a run's folder know the task.
        columns: the columns that it reads of a table: their names, and what each is.
        labels: names of the columns that may be missing where there is nothing to learn or to score.
        optional: names of the columns that may always be missing.
        metric: which of the scores chooses the best checkpoint; larger is better.
        own_pass: whether the loss comes from a pass of its own, `loss_alone`, and not from hidden states that it shares
            with the alignment. `build` sets it, for encoder-decoders.
    """

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    labels: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("id",)
    metric: str
    own_pass: bool = False

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that make this task again, as JSON has them."""
        raise NotImplementedError

    def example(self, row: Mapping[str, Any], where: str, number: int, *, labelled: bool = True) -> NamedTuple:
        """The example in a row of a table, whose columns have this task's names.

        Args:
            row: values by column.
            where: the row's place, for errors, such as "train.csv, row 3".
            number: the row's number, from 0, which is its id where it has no other.
            labelled: whether the label must be there. If not, it is taken where it is there and is not empty.

        Raises:
            KeyError: there is no such column, which is told with those that there are.
            ValueError: naming `where`, the column, what came and what was expected.
        """
        raise NotImplementedError

    def fit(self, examples: Sequence) -> None:
        """Learn what the settings leave open, such as the names of the classes, from labelled examples."""

    def build(self, backbone: nn.Module, tokenizer: Callable, inputs: InputConfig) -> None:
        """Make the head for a backbone (with its language-model head, if it is one that writes).

        Raises:
            ValueError: a setting that does not fit the backbone or the tokenizer.
        """
        raise NotImplementedError

    def encode(self, examples: Sequence) -> list[Item]:
        """Inputs of examples; `Item.example` tells which example each was made of.

        A labelled example that training can make nothing of gives none, and one with a long context may give several.
        """
        raise NotImplementedError

    def count(self, item: Item) -> int:
        """How many things the loss of an item is a sum over, such as labelled tokens; the Trainer divides by them."""
        return 1

    def loss(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        """The sum of the items' losses, over all that `count` counts: a scalar.

        Args:
            segments: hidden states of the items, in their order. Nothing of them may be read on the host.
            items: what `encode` made.
        """
        raise NotImplementedError

    def loss_alone(self, model: Model, items: Sequence[Item]) -> Tensor:
        """The same sum as `loss`, from a pass of its own; it is called instead of `loss` where `own_pass` is set."""
        raise NotImplementedError

    def align(self, pairs: Sequence[Pair], chosen: Sequence[int], rng: random.Random) -> list[Aligned]:
        """Inputs of the alignment in this task's form, for `AlignmentConfig(form="task")`; not every task has one.

        Args:
            pairs: all parallel sentences.
            chosen: the numbers of those that a step takes.
            rng: what is random is drawn from it.
        """
        raise NotImplementedError

    def predict(
        self, model: Model, examples: Sequence, batch_size: int = 32, on_batch: Callable[[int], None] | None = None
    ) -> list[dict[str, Any]]:
        """A prediction of each example, in their order: "prediction", and what else there is, such as "probability".

        Args:
            model: the adapted backbone.
            examples: the examples, whose labels are not read.
            batch_size: how many inputs a pass takes.
            on_batch: a function that is called after each pass with the number of its inputs.
        """
        raise NotImplementedError

    def scores(self, examples: Sequence, predictions: Sequence[dict], language: str = "en") -> dict[str, float]:
        """Scores of predictions for labelled examples, in percent where they are shares.

        Args:
            language: the texts' language, for scores whose rules go by it.
        """
        raise NotImplementedError


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of inputs, in batches of like length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return (order[begin : begin + batch_size] for begin in range(0, len(order), batch_size))


@torch.no_grad()
def run_sorted(
    model: Model,
    items: Sequence[Item],
    read: Callable[[Segments, Sequence[Item]], Sequence],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list:
    """`read(segments, items)` of all items, one result for each in their order, run in batches of like length."""
    results: list = [None] * len(items)
    for chosen in by_length([len(item.ids) for item in items], batch_size):
        batch = [items[n] for n in chosen]
        for n, result in zip(chosen, read(model(batch), batch), strict=True):
            results[n] = result.cpu() if isinstance(result, Tensor) else result
        if on_batch is not None:
            on_batch(len(chosen))
    return results


def zero_head(backbone: nn.Module, outputs: int) -> nn.Linear:
    """A linear head on a backbone's hidden states, begun at 0: the first steps are not spent on unlearning chance."""
    head = nn.Linear(backbone.config.get_text_config().hidden_size, outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def check_no_encoder_decoder(backbone: nn.Module, name: str) -> None:
    """Raise a ValueError for an encoder-decoder, on which the task of that name has no head."""
    config = backbone.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"backbone must be an encoder or a causal model for {name}, got an encoder-decoder of family "
            f"{config.model_type!r}"
        )


def joined(
    tokenizer: Callable,
    texts: Sequence[Sequence[tuple[str, int]]],
    prefix_text: str,
    max_length: int,
) -> Aligned:
    """An input of two texts, each of sentences with the number of their pair; what is beyond `max_length` is cut."""
    bounds: list[list[tuple[int, int, int]]] = []
    whole = []
    for text, before in zip(texts, (prefix_text, ""), strict=True):
        bounds.append([])
        for sentence, pair in text:
            bounds[-1].append((len(before), len(before) + len(sentence), pair))
            before += sentence + " "
        whole.append(before[:-1])
    encoded = tokenizer(*whole, truncation=True, max_length=max_length, return_offsets_mapping=True)
    sides, offsets = encoded.sequence_ids(0), encoded["offset_mapping"]
    parts = []
    for side, sentences in enumerate(bounds):
        for begin, end, pair in sentences:
            rows = [n for n, (a, b) in enumerate(offsets) if sides[n] == side and a < end and b > begin]
            if rows:
                parts.append((rows[0], rows[-1] + 1, pair))
    ids = encoded["input_ids"]
    return Aligned(Item(ids, sides.index(1) if 1 in sides else len(ids)), parts)


def was_cut(encoded, n: int) -> bool:
    """Whether input n of what a tokenizer gave was cut to max_length; tokenizers that are not fast do not tell."""
    return bool(getattr(encoded, "encodings", None) and encoded.encodings[n].overflowing)


def without_end(tokenizer: Callable, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with the special tokens before it and none after it, for an answer to follow."""
    encoded = tokenizer([*texts, "a"], return_special_tokens_mask=True)  # of an empty text all tokens are special
    after = next((n for n, each in enumerate(reversed(encoded["special_tokens_mask"][-1])) if not each), 0)
    return [list(ids[: len(ids) - after]) for ids in encoded["input_ids"][:-1]]
