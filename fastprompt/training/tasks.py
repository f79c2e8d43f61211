"""What a task asks of a backbone's hidden states: its inputs, its head, its loss, its predictions and its scores."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.models.packed.layout import tensor_on
from fastprompt.nn import AlignmentLoss
from fastprompt.nn.pooling import pool
from fastprompt.tasks.metrics import accuracy, answer_scores
from fastprompt.tasks.parallel import Pair
from fastprompt.tasks.pawsx import Example
from fastprompt.tasks.retrieval import retrieval_scores, sentence_groups
from fastprompt.tasks.squad import Question
from fastprompt.tasks.windows import Window, best_answers, windows

from .encoding import batch_of, was_cut, without_end

SENTENCES = 5  # of a context made for the alignment


class Item(NamedTuple):
    """An input of the backbone.

    Attributes:
        ids: token ids.
        second: row where the second of two texts begins, for backbones that tell them apart.
        target: what a task makes of it.
        example: which of the examples it was made of.
        cut: whether something of it did not fit in.
    """

    ids: list[int]
    second: int
    target: object
    example: int = 0
    cut: bool = False


class Aligned(NamedTuple):
    """An input of the alignment: of each of its parts, rows [begin, end), the pair whose teacher's vector it is to get.

    Attributes:
        item: the input.
        parts: (begin, end, pair).
    """

    item: Item
    parts: list[tuple[int, int, int]]


class Task(nn.Module):
    """A task's side of training. Its parameters are the head's.

    Attributes:
        metric: the score that counts, among `scores`; larger is better.
    """

    metric: str

    def encode(self, examples: Sequence) -> list[Item]:
        """Inputs for training: an example may give none, or several."""
        raise NotImplementedError

    def loss(self, hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
        """Mean loss of hidden states (B, L, D) of items, with mask (B, L)."""
        raise NotImplementedError

    def align(self, pairs: Sequence[Pair], chosen: Sequence[int], rng: random.Random) -> list[Aligned]:
        """Inputs of the alignment in the task's form, made of the chosen pairs; not every task has one."""
        raise NotImplementedError

    def predict(self, model: Callable, examples: Sequence, batch_size: int = 16) -> dict:
        """Predictions by the example's id; `model` gives hidden states (B, L, D) for a batch."""
        raise NotImplementedError

    def scores(self, examples: Sequence, predictions: dict, language: str) -> dict[str, float]:
        """As the task's official script scores them."""
        raise NotImplementedError


@torch.no_grad()
def run_sorted(model: Callable, items: Sequence[Item], read: Callable, batch_size: int, device) -> list[Tensor]:
    """`read(hidden, mask, items)` of all items, a tensor for each, run in batches of like length."""
    order = sorted(range(len(items)), key=lambda n: len(items[n].ids))
    results: list[Tensor | None] = [None] * len(items)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = [items[n] for n in chosen]
        inputs = inputs_of(batch, device, model)
        for n, result in zip(chosen, read(model(**inputs), inputs["attention_mask"], batch), strict=True):
            results[n] = result.cpu()
    return results


def inputs_of(items: Sequence[Item], device, model: nn.Module) -> dict[str, Tensor]:
    """input_ids and attention_mask, and token_type_ids where the backbone has a table of two and more."""
    inputs = batch_of([item.ids for item in items], device)
    if getattr(model.backbone.config, "type_vocab_size", 0) > 1:
        second = tensor_on([item.second for item in items], device)
        column = torch.arange(inputs["input_ids"].shape[1], device=device)
        inputs["token_type_ids"] = (column >= second[:, None]).long()
    return inputs


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
    return Aligned(Item(ids, sides.index(1) if 1 in sides else len(ids), None), parts)


class SentencePairs(Task):
    """PAWS-X by two logits a pair: what the encoder's head and the causal model's words have in common."""

    metric = "accuracy"

    def logits(self, hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
        """Logits (B, 2) of hidden states (B, L, D) of items, with mask (B, L)."""
        raise NotImplementedError

    def loss(self, hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
        labels = tensor_on([item.target for item in items], hidden.device)
        return F.cross_entropy(self.logits(hidden, mask, items), labels)

    def predict(self, model: Callable, examples: Sequence[Example], batch_size: int = 32) -> dict[str, int]:
        device = next(model.parameters()).device
        logits = run_sorted(model, self.encode(examples), self.logits, batch_size, device)
        return {example.id: int(row.argmax()) for example, row in zip(examples, logits, strict=True)}

    def scores(self, examples: Sequence[Example], predictions: dict[str, int], language: str) -> dict[str, float]:
        return accuracy([example.label for example in examples], [predictions[example.id] for example in examples])


class PairClassification(SentencePairs):
    """PAWS-X with an encoder: both sentences in one input, a linear head on a pooled vector.

    Args:
        tokenizer: transformers' tokenizer.
        width: features of a hidden state.
        pooling: of the rows: "mean", "first" or "last".
        prefix_text: put before the first sentence.
        max_length: tokens of an input.
    """

    def __init__(self, tokenizer: Callable, width: int, pooling: str, prefix_text: str, max_length: int) -> None:
        super().__init__()
        self.tokenizer, self.pooling, self.prefix_text, self.max_length = tokenizer, pooling, prefix_text, max_length
        self.head = nn.Linear(width, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        firsts = [self.prefix_text + example.sentence1 for example in examples]
        encoded = self.tokenizer(
            firsts, [example.sentence2 for example in examples], truncation=True, max_length=self.max_length
        )
        items = []
        for n, (ids, example) in enumerate(zip(encoded["input_ids"], examples, strict=True)):
            sides = encoded.sequence_ids(n)
            second = sides.index(1) if 1 in sides else len(ids)
            items.append(Item(ids, second, example.label, n, was_cut(encoded, n)))
        return items

    def align(self, pairs: Sequence[Pair], chosen: Sequence[int], rng: random.Random) -> list[Aligned]:
        """Pairs two by two, each in either language."""
        made = []
        for n in range(0, len(chosen) - 1, 2):
            texts = [[(rng.choice(pairs[pair][:2]), pair)] for pair in chosen[n : n + 2]]
            made.append(joined(self.tokenizer, texts, self.prefix_text, self.max_length))
        return made

    def logits(self, hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
        return self.head(pool(hidden, self.pooling, mask))


class Verbaliser(SentencePairs):
    """PAWS-X with a causal model: the next word after a question, of two, says which class; there is no head.

    Args:
        tokenizer: transformers' tokenizer.
        model: the causal language model with its head, a constant here.
        max_length: tokens of an input.
    """

    TEMPLATE = "Sentence 1: {}\nSentence 2: {}\nDo both sentences mean the same? Answer:"
    WORDS = (" No", " Yes")  # of the classes 0 and 1

    def __init__(self, tokenizer: Callable, model: nn.Module, max_length: int) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        words = self._first_tokens()
        self.register_buffer("words", model.get_output_embeddings().weight.detach()[words].clone(), persistent=False)
        self.softcap = getattr(model.config, "final_logit_softcapping", None)

    def _first_tokens(self) -> list[int]:
        """What the question is followed by, where each word is the answer: a word alone may begin with other tokens."""
        asked = self.TEMPLATE.format("One.", "Two.")
        before, *answered = without_end(self.tokenizer, [asked, *(asked + word for word in self.WORDS)])
        after = [ids[len(before) :] for ids in answered]
        firsts = [ids[0] for ids in after if ids]
        whole = all(ids[: len(before)] == before for ids in answered)
        if not whole or len(set(firsts)) < len(self.WORDS):
            tokens = [self.tokenizer.convert_ids_to_tokens(ids) for ids in after]
            raise ValueError(
                f"tokenizer must tell the words {self.WORDS} apart by their first token after {asked[-8:]!r}, "
                f"got {tokens}"
            )
        return firsts

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        texts = [self.TEMPLATE.format(example.sentence1, example.sentence2) for example in examples]
        encoded = without_end(self.tokenizer, texts)
        for example, ids in zip(examples, encoded, strict=True):
            if len(ids) > self.max_length:  # cut, the question would be gone
                raise ValueError(f"max_length must hold each input whole: {example.id} has {len(ids)} tokens")
        return [Item(ids, len(ids), examples[n].label, n) for n, ids in enumerate(encoded)]

    def logits(self, hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
        logits = pool(hidden, "last", mask).to(self.words.dtype) @ self.words.T
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class SpanAnswers(Task):
    """Extractive question answering with an encoder: where the answer begins and ends.

    A row's logits are linear in its hidden state h, plus its likeness to the question, 10 cos(h, W q) with q the mean
    of the question's rows and W begun at the identity, one for the beginning and one for the end. A few dozen examples
    teach a linear head alone little; likeness to the question is something the model has already. (Ours.)

    Args:
        tokenizer: transformers' tokenizer, a fast one.
        width: features of a hidden state.
        metrics: "xquad" or "mlqa": whose rules score.
        prefix_text: put before the question.
        max_length, stride: of `fastprompt.tasks.windows.windows`.
    """

    metric = "f1"

    def __init__(
        self, tokenizer: Callable, width: int, metrics: str, prefix_text: str, max_length: int, stride: int
    ) -> None:
        super().__init__()
        self.tokenizer, self.metrics, self.prefix_text = tokenizer, metrics, prefix_text
        self.max_length, self.stride = max_length, stride
        self.head = nn.Linear(width, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.match = nn.Parameter(torch.eye(width).repeat(2, 1, 1))  # (2, D, D)

    def windows(self, questions: Sequence[Question]) -> list[Window]:
        return windows(self.tokenizer, questions, self.max_length, self.stride, self.prefix_text)

    def encode(self, examples: Sequence[Question]) -> list[Item]:
        found = self.windows(examples)
        return [
            Item(window.ids, window.first, window, window.question, window.cut)
            for window in found
            if window.answer is not None
        ]

    def align(self, pairs: Sequence[Pair], chosen: Sequence[int], rng: random.Random) -> list[Aligned]:
        """Contexts of some sentences; one of them, perhaps in the other language, is the question."""
        made = []
        for n in range(0, len(chosen), SENTENCES):
            group = chosen[n : n + SENTENCES]
            context = [(rng.choice(pairs[pair][:2]), pair) for pair in group]
            asked = rng.choice(group)
            question = [(rng.choice(pairs[asked][:2]), asked)]
            made.append(joined(self.tokenizer, [question, context], self.prefix_text, self.max_length))
        return made

    def logits(self, hidden: Tensor, items: Sequence[Item]) -> Tensor:
        """(B, L, 2), -inf at rows that cannot be of an answer."""
        row = torch.arange(hidden.shape[1], device=hidden.device)
        first = tensor_on([item.second for item in items], hidden.device)[:, None]
        last = first + tensor_on([len(item.target.spans) for item in items], hidden.device)[:, None]
        asked = (row < first) & (row >= 1)  # (B, L), the special first row aside
        question = pool(hidden, "mean", asked) @ self.match.mT  # (2, B, D)
        likeness = torch.einsum("bld,cbd->blc", F.normalize(hidden, dim=-1), F.normalize(question, dim=-1))
        logits = self.head(hidden) + 10 * likeness
        return logits.masked_fill(((row < first) | (row >= last))[..., None], -torch.inf)

    def loss(self, hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
        rows = tensor_on([item.target.answer for item in items], hidden.device)  # (B, 2)
        return F.cross_entropy(self.logits(hidden, items), rows)  # classes: the L rows

    def predict(self, model: Callable, examples: Sequence[Question], batch_size: int = 16) -> dict[str, str]:
        found = self.windows(examples)
        items = [Item(window.ids, window.first, window) for window in found]
        device = next(model.parameters()).device
        logits = run_sorted(model, items, lambda hidden, mask, items: self.logits(hidden, items), batch_size, device)
        logits = [rows[: len(item.ids)] for rows, item in zip(logits, items, strict=True)]
        return best_answers(examples, found, logits)

    def scores(self, examples: Sequence[Question], predictions: dict[str, str], language: str) -> dict[str, float]:
        return answer_scores(self.metrics, examples, predictions, language)


class Retrieval(Task):
    """Finding the English sentence by its translation: nothing but the alignment trains for it.

    Args:
        tokenize: sentences to token ids.
        pooling: a sentence's vector: the "mean" of its rows, its "first" or its "last".
        alignment: whose projection makes a vector comparable with English ones.

    Attributes:
        english: (N, D) vectors of the English sentences of the N pairs to be scored, by the backbone as it came.
    """

    metric = "r@1"

    def __init__(self, tokenize: Callable, pooling: str, alignment: AlignmentLoss) -> None:
        super().__init__()
        self.tokenize, self.pooling, self.english = tokenize, pooling, None
        self.project = alignment.project  # no submodule: the alignment has its own learning rate

    def encode(self, examples: Sequence[Pair]) -> list[Item]:
        return []

    def predict(self, model: Callable, examples: Sequence[Pair], batch_size: int = 32) -> dict[str, Tensor]:
        items = [Item(ids, len(ids), None) for ids in self.tokenize([pair.target for pair in examples])]

        def read(hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
            return self.project(pool(hidden, self.pooling, mask))

        device = next(model.parameters()).device
        return dict(zip(map(str, range(len(items))), run_sorted(model, items, read, batch_size, device), strict=True))

    def scores(self, examples: Sequence[Pair], predictions: dict[str, Tensor], language: str) -> dict[str, float]:
        groups = sentence_groups(self.tokenize([pair.source for pair in examples]))
        return retrieval_scores(torch.stack(list(predictions.values())), self.english, groups)
