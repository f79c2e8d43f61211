"""The demo's training job written with stock parts: transformers, PEFT and plain PyTorch, used as well as they allow.

A prefix on a frozen encoder, trained so that translations find their English sentences. Batches are padded to their own
longest sentence, the teacher's vectors are computed once, and the frozen backbone gathers no gradients.

    python -m fastprompt.demo.stock --backbone DIR --train pairs.tsv --test pairs.tsv --json scores.json

The JSON holds "seconds_per_step" (median, without the first three), "peak_memory_mb" (of this process, in MiB,
until training ends), "steps" and "scores": retrieval "without" and "with" the prefix. Linux only: the peak is read from
/proc.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastprompt._extras import require
from fastprompt._measure import peak_memory_mb, seconds_per_step
from fastprompt.data.examples import Pair
from fastprompt.data.parallel import read_pairs
from fastprompt.tasks.retrieval import firsts, retrieval_scores, sentence_groups

MAX_LENGTH = 256  # tokens of a sentence


class Encoder:
    """Tokenised sentences to mean-pooled vectors of `model`."""

    def __init__(self, model: nn.Module, pad: int) -> None:
        self.model, self.pad = model, pad

    def __call__(self, sentences: Sequence[Tensor]) -> Tensor:
        """(N, D) vectors of `sentences`, N tensors of token ids, as one batch padded to the longest."""
        ids = pad_sequence(sentences, batch_first=True, padding_value=self.pad)
        length = torch.tensor([len(sentence) for sentence in sentences])
        mask = (torch.arange(ids.shape[1]) < length[:, None]).long()
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[:, :, None]).sum(1) / length[:, None]

    @torch.no_grad()
    def all(self, sentences: Sequence[Tensor], batch_size: int = 32) -> Tensor:
        """(N, D) vectors of `sentences`, those of like length padded together."""
        order = torch.tensor([len(sentence) for sentence in sentences]).argsort()
        vectors = torch.cat([self([sentences[n] for n in batch]) for batch in order.split(batch_size)])
        return vectors[order.argsort()]


def alignment_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Symmetric in-batch contrastive loss plus cosine distance; student and teacher (N, D)."""
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    cosine = student @ teacher.T
    logits, own = cosine / temperature, torch.arange(len(cosine))
    contrastive = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return contrastive + (1 - cosine.diagonal()).mean()


class Job:
    """The prefix, what trains beside it, and the sentences: made ready for the first step.

    Args:
        backbone: folder of the encoder and its tokenizer.
        train: pairs to train on.
        text_prefix: put before each sentence.
        seed: of what begins at random.
        steps: how many there will be: learning rates rise over the first tenth of them, and fall to 0 at the end.
        learning_rate: of the prefix.

    Attributes:
        plain, student: the encoder without and with the prefix.
        prefix: its rows, (16, layers * 2 * D).
        projection: makes the student's vectors comparable with the teacher's.
    """

    def __init__(
        self,
        backbone: str,
        train: Sequence[Pair],
        *,
        text_prefix: str,
        seed: int,
        steps: int,
        learning_rate: float = 1e-2,
    ) -> None:
        transformers, peft = require("transformers", "train"), require("peft", "train")
        torch.manual_seed(seed)
        self._tokenizer, self._text_prefix = transformers.AutoTokenizer.from_pretrained(backbone), text_prefix
        base = transformers.AutoModel.from_pretrained(backbone, add_pooling_layer=False, dtype=torch.float32).eval()
        base.requires_grad_(False)
        self._translations = self.tokens(pair.target for pair in train)
        self.plain = Encoder(base, self._tokenizer.pad_token_id)
        english = self.tokens(pair.source for pair in train)
        self._teacher, self._groups = self.plain.all(english), sentence_groups(english).tolist()

        config = peft.PrefixTuningConfig(task_type=peft.TaskType.FEATURE_EXTRACTION, num_virtual_tokens=16)
        model = peft.get_peft_model(base, config).eval()
        self.prefix = model.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            self.prefix.mul_(0.1)  # at full scale the prefix drowns the sentence to begin with
        self.projection = nn.Linear(base.config.hidden_size, base.config.hidden_size, bias=False)
        nn.init.eye_(self.projection.weight)
        self._optimizer = torch.optim.AdamW(
            [{"params": [self.prefix], "lr": learning_rate}, {"params": self.projection.parameters(), "lr": 1e-4}],
            weight_decay=0.0,
        )
        warmup = math.ceil(steps / 10)
        self._schedule = transformers.get_linear_schedule_with_warmup(self._optimizer, warmup, steps)
        self.student = Encoder(model, self._tokenizer.pad_token_id)

    def tokens(self, sentences: Iterable[str]) -> list[Tensor]:
        """Token ids of each sentence."""
        texts = [self._text_prefix + sentence for sentence in sentences]
        ids = self._tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return [torch.tensor(each) for each in ids]

    def loss(self, batch: Sequence[int]) -> Tensor:
        """Of the training pairs of these numbers, each English sentence once."""
        batch = [n for n, first in zip(batch, firsts([self._groups[n] for n in batch]), strict=True) if first]
        student = self.student([self._translations[n] for n in batch])
        return alignment_loss(self.projection(student), self._teacher[batch], 0.05)

    def step(self, batch: Sequence[int]) -> Tensor:
        """One step of training on these pairs; the loss before it."""
        loss = self.loss(batch)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()

    @torch.no_grad()
    def vectors(self, sentences: Sequence[Tensor]) -> Tensor:
        """(N, D) vectors of sentences in the target language, comparable with those of `plain` in English."""
        return self.projection(self.student.all(sentences))


def run(
    backbone: str,
    train: Sequence[Pair],
    test: Sequence[Pair],
    *,
    text_prefix: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> dict:
    """Train, score the test pairs without and with what was learned, and return what the module's docstring lists."""
    steps = epochs * math.ceil(len(train) / batch_size)
    job = Job(backbone, train, text_prefix=text_prefix, seed=seed, steps=steps, learning_rate=learning_rate)
    seconds, order, shuffle = [], list(range(len(train))), random.Random(seed)
    for _ in range(epochs):
        shuffle.shuffle(order)
        for begin in range(0, len(order), batch_size):
            start = time.perf_counter()
            loss = job.step(order[begin : begin + batch_size])
            seconds.append(time.perf_counter() - start)
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at step {len(seconds)}")

    result = {
        "seconds_per_step": seconds_per_step(seconds),
        "peak_memory_mb": peak_memory_mb(),  # before scoring, which is no part of the job
        "steps": len(seconds),
    }
    queries, english = (job.tokens(getattr(pair, side) for pair in test) for side in ("target", "source"))
    english, groups = job.plain.all(english), sentence_groups(english)
    scores = {
        "without": retrieval_scores(job.plain.all(queries), english, groups),
        "with": retrieval_scores(job.vectors(queries), english, groups),
    }
    return result | {"scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="folder of the encoder and its tokenizer")
    parser.add_argument("--train", required=True, help="pairs to train on")
    parser.add_argument("--test", required=True, help="pairs to test on")
    parser.add_argument("--json", required=True, type=Path, help="where the result goes")
    parser.add_argument("--prefix-text", default="query: ", help="put before each sentence")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of the prefix")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result = run(
        given.backbone,
        read_pairs(given.train),
        read_pairs(given.test),
        text_prefix=given.prefix_text,
        epochs=given.epochs,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        seed=given.seed,
    )
    given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
