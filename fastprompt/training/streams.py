"""The data of a run: a task's items, parallel sentences with their teacher's vectors, and what a step makes of them."""

import hashlib
import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprompt import tasks
from fastprompt.data.examples import Pair, Question, Tagged, Text, Written
from fastprompt.data.reading import shorten
from fastprompt.tasks import rows as task_rows
from fastprompt.tasks.base import Aligned, Item, Task
from fastprompt.tasks.retrieval import Retrieval, sentence_groups

from .arguments import TrainingArguments
from .batch import Batch, Collator
from .learner import Learner
from .plan import Chosen, Steps, Stream
from .sampler import TokenBudgetSampler
from .teacher import Digest, lower_states, teacher_vectors

LOG = logging.getLogger("fastprompt")
KINDS = (Text, Tagged, Question, Written, Pair)


@dataclass
class Streams:
    """All that the steps of a run are made of.

    Attributes:
        learner: the learner that they train.
        items: the task's inputs.
        pairs: parallel sentences.
        source, target: their token ids.
        seed: the seed of what is random in a step.
        counts: how many examples and pairs were given, and how many of them are used.
        content: digests of the data and of the backbone.
        teacher: (N, D) vectors of the English sentences, once they are computed; None without pairs.
        states: hidden states that enter the first layer with a prefix: of the items and, after them, of the targets;
            None: they are computed in every step.
    """

    learner: Learner
    items: Sequence[Item]
    pairs: Sequence[Pair]
    source: list[list[int]]
    target: list[list[int]]
    seed: int
    counts: dict[str, int]
    content: dict[str, str]
    teacher: Tensor | None = None
    states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        task, self._config = self.learner.task, self.learner.alignment_config
        self._counts, self._pooling = [task.count(item) for item in self.items], self.learner.inputs.pooling
        self._align = task.align if self._config is not None and self._config.form == "task" else None

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is spawned to make batches: it needs no backbone."""
        return vars(self) | {"learner": None}

    def collated(self, collate: Collator, rank: int, chosen: Sequence[Chosen]) -> Batch:
        """As `batch`, of what a DataLoader has: a step."""
        return self.batch(collate, chosen[0], rank)

    def compute(self, digest: Digest, cache_layers: bool, cache: Path | None) -> None:
        """Compute what is the same in every step, or read it from the cache.

        Args:
            digest: the digest of the backbone as it came.
            cache_layers: whether the layers below the first prefix are computed here.
            cache: the folder that it is kept in; None is the default one.
        """
        learner, config = self.learner, self.learner.alignment_config
        if self.pairs:
            teacher = teacher_vectors(digest, self.source, learner.inputs.pooling, learner.device, cache, config.layer)
            self.teacher = teacher if config.layer is None else learner.standardized(teacher)
        prompted = learner.adapted.prompted
        if cache_layers and prompted is not None and prompted.first_layer:
            inputs = [*self.items, *(Item(ids, len(ids)) for ids in self.target)]
            self.states = lower_states(digest, learner.adapted, inputs, learner.collate, learner.device, cache)

    def steps(self, args: TrainingArguments, world_size: int) -> Steps:
        """The plan of the steps."""
        whole = args.per_device_train_batch_size * world_size
        alignment = self.learner.alignment_config if self.pairs else None
        lengths = [len(item.ids) for item in self.items] or [len(ids) for ids in self.target]
        sampler = None
        if args.max_tokens is not None:
            prompted = self.learner.adapted.prompted
            per_sentence, per_batch = (0, 0) if prompted is None else prompted.prompt_rows
            rows = {"rows_per_sentence": per_sentence, "rows_per_batch": per_batch}
            sampler = TokenBudgetSampler(lengths, args.max_tokens, **rows, seed=args.seed, world_size=world_size)
        main = Stream(len(lengths), whole, f"{args.seed} task" if self.items else args.seed, sampler)
        beside = None
        if self.items and self.pairs:
            beside = Stream(len(self.pairs), alignment.batch_size, f"{args.seed} alignment")
        contrasts = alignment is not None and "infonce" in alignment.distance
        return Steps(
            *(main, beside, alignment),
            epochs=args.num_train_epochs,
            max_steps=args.max_steps,
            world_size=world_size,
            accumulation=args.gradient_accumulation_steps,
            groups=sentence_groups(self.source).tolist() if contrasts else None,
        )

    def batch(self, collate: Collator, chosen: Chosen, rank: int) -> Batch:
        """One process's part of a step."""
        world_size, total = len(chosen.items), sum(self._counts[n] for n in chosen.update)
        items, items_count = _own(chosen.items, rank)
        share = world_size * chosen.steps / total if total and items_count else 0.0
        pairs, pairs_count = _own(chosen.pairs, rank)
        aligned = self._aligned(pairs, chosen.step)
        if pairs and not aligned and world_size > 1:  # too few for the task's form, and other processes may have enough
            aligned, pairs_count = [self._sentence(pairs[0])], False
        numbers = [pair for each in aligned for _, _, pair in each.parts]
        row_weight = torch.full((len(numbers),), float(pairs_count)) if numbers and world_size > 1 else None
        states = None
        if self.states is not None:
            states = torch.cat([self.states[n] for n in [*items, *(len(self.items) + pair for pair in pairs)]])
        return collate(
            [self.items[n] for n in items],
            aligned,
            share=share,
            teacher=self.teacher[numbers] if numbers else None,
            row_weight=row_weight,
            weight=chosen.weight,
            states=states,
        )

    def _aligned(self, pairs: Sequence[int], step: int) -> list[Aligned]:
        """The inputs of the alignment of a step."""
        if not pairs:
            return []
        if self._align is not None:
            return self._align(self.pairs, pairs, random.Random(f"{self.seed} {step}"))
        return [self._sentence(n) for n in pairs]

    def _sentence(self, pair: int) -> Aligned:
        ids = self.target[pair]
        skips = self._config.layer is not None and self._pooling == "mean"
        begin = int(skips and len(ids) > 1)  # see `teacher.sentence_vectors`
        return Aligned(Item(ids, len(ids)), [(begin, len(ids), pair)])


def read_streams(
    learner: Learner,
    digest: Digest,
    examples: Sequence,
    items: Sequence[Item],
    pairs: Sequence[Pair],
    held_out: Sequence,
    args: TrainingArguments,
    counts: dict[str, int],
) -> Streams:
    """Tokenize the pairs, and take digests of all the data.

    Args:
        learner, examples, pairs, args: those of the run.
        digest: the digest of the backbone as it came.
        items: the inputs made of the examples.
        held_out: examples and pairs of the evaluation, which decide where a run ends, and with what.
        counts: how many examples were given, and how many of them are used.

    Raises:
        ValueError: arguments that do not go together, or a text without a token.
    """
    config = learner.alignment_config
    if args.cache_layers and config is not None and config.form == "task":
        raise ValueError("cache_layers must be False with alignment form 'task', whose inputs differ in each step")
    if args.cache_layers and args.static_shapes:
        raise ValueError("static_shapes must be False with cache_layers, got True for both")
    source, target = (
        learner.tokenize([getattr(pair, side) for pair in pairs]) if pairs else [] for side in ("source", "target")
    )
    texts = {"data": [examples, source, target], "eval_data": held_out}
    content = {name: hashlib.sha256(json.dumps(text, default=str).encode()).hexdigest() for name, text in texts.items()}
    content["backbone"] = digest([*(item.ids for item in items), *source, *target])
    counts = counts | ({"pairs": len(pairs)} if pairs else {})
    if items:
        counts |= {"inputs": len(items), "cut": len({item.example for item in items if item.cut})}
    return Streams(learner, items, pairs, source, target, args.seed, counts, content)


def _own(dealt: Sequence[Sequence[int]], rank: int) -> tuple[Sequence[int], bool]:
    """What a process has of a step, and whether it counts. Processes wait for each other: one that has nothing, where
    another has something, runs one of the other's, for nothing.
    """
    if dealt[rank]:
        return dealt[rank], True
    return next(filter(None, dealt), [])[:1], False


def draw(examples: Sequence, count: int | None, seed: int) -> list:
    """`count` of the examples at random by `seed`, fewer ones being the first of more; all for None.

    Raises:
        ValueError: more are asked for than there are.
    """
    if count is None:
        return list(examples)
    if count > len(examples):
        raise ValueError(f"examples must be at most {len(examples)}, as many as there are, got {count}")
    shuffled_examples = list(examples)
    random.Random(f"{seed} examples").shuffle(shuffled_examples)
    return shuffled_examples[:count]


def usable(task: Task, examples: Sequence, count: int | None, seed: int) -> tuple[list, list[Item]]:
    """As many of the examples as wanted, and the inputs made of them.

    They are drawn as `draw` does it, and those that training can make nothing of are passed over, which is told.

    Raises:
        ValueError: too few can be used, or less than half of those looked at.
    """
    order = draw(examples, None if count is None else len(examples), seed)
    wanted, looked, chosen, items = len(order) if count is None else count, 0, [], []
    while len(chosen) < wanted and looked < len(order):
        part = order[looked : looked + wanted - len(chosen)]
        made = task.encode(part)
        used = {n: len(chosen) + place for place, n in enumerate(sorted({item.example for item in made}))}
        items += [item._replace(example=used[item.example]) for item in made]
        chosen += [part[n] for n in used]
        looked += len(part)
    why = f"give the task {task.name!r} nothing to learn from (as a question whose answer is not in its context)"
    if not chosen:
        raise ValueError(f"examples must be usable, but all {looked} {why}")
    passed = looked - len(chosen)
    if count is not None and len(chosen) < count:
        raise ValueError(f"examples must be at most {len(chosen)}, got {count}: {passed} of {looked} {why}")
    if passed > len(chosen):
        raise ValueError(f"examples must be usable for the greater part, got {passed} of {looked} that {why}")
    if passed:
        LOG.warning("%d of %d examples are left out: they %s", passed, looked, why)
    return chosen, items


def select(
    task: Task | None, pairs: list, examples: list, count: int | None, seed: int
) -> tuple[dict[str, int], list, list, list]:
    """Counts, and what is trained on: pairs, examples and the items made of them."""
    if not examples:
        return {"given": len(pairs)}, draw(pairs, count, seed), [], []
    given = len(examples)
    examples, items = usable(task, examples, count, seed)
    return {"given": given, "drawn": len(examples)}, pairs, examples, items


def fresh(task: Task) -> Task:
    """The same task, not yet built: one that is given may serve other Trainers, which have heads of their own."""
    if task.name in tasks.NAMES and type(task) is tasks.task_class(task.name):  # a class may serve several names
        return tasks.get(task.name, **task.settings())
    return type(task)(**task.settings())


def pairs_of(given: Any, name: str) -> list[Pair]:
    """Parallel sentences: `Pair`s as they are, and those of rows; errors begin with `name`."""
    return examples_of(Retrieval(), given, name)


def examples_of(task: Task | None, given: Any, name: str, *, labelled: bool = True) -> list:
    """Examples of a task in rows of whatever form, as `fastprompt.tasks.rows` reads them; errors begin with `name`."""
    if given is None or not len(given):
        return []
    if task is None:
        raise ValueError(f"task must be given with {name}, got None")
    try:
        made = list(task_rows.examples_of(task, given, labelled=labelled))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(re.sub("^(rows|data)(?=,| must)", name, str(error))) from error
    needed = task.columns.keys() - {*task.optional, *task.labels}
    for n, each in enumerate(made):
        if type(each) in KINDS and not needed <= {*each._fields}:
            raise TypeError(
                f"{name} must have rows with {', '.join(sorted(needed)) or 'the columns'} of {task.name!r}, or its "
                f"examples, got {shorten(each)} at {n}"
            )
    return made


def check_metric(learner: Learner, args: TrainingArguments, held_out: Sequence, pairs: bool) -> None:
    """Raise a ValueError for a score that evaluations do not give, of which the first of them would tell only.

    Args:
        held_out: examples of the evaluation.
        pairs: there are pairs as well.
    """
    name, task = (args.metric_for_best_model or "").removeprefix("eval_"), learner.task
    if args.eval_strategy == "no" or name in ("", "r@1" if pairs else task.metric):
        return
    known = ["r@1", "r@5", "cosine"] if pairs else []
    known += task.scores(held_out[:1], learner.predict(held_out[:1])) if held_out else []
    if name not in known:
        raise ValueError(f"metric_for_best_model must be one of {known}, got {name!r}")
