"""What each step of a run takes: a function of its number alone, so that a resumed run goes on in it."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.utils.data import Dataset, Sampler

from fastprompt.tasks.retrieval import firsts

from .alignment import AlignmentConfig
from .sampler import TokenBudgetSampler, shuffled


class Chosen(NamedTuple):
    """What one step takes, on all processes together.

    Attributes:
        step: its number, from 0.
        items: numbers of the task's items, for each process.
        pairs: numbers of the pairs, for each process.
        weight: the weight of the alignment loss.
        update: numbers of the items of the whole update: of all the steps, this one among them, whose gradients the
            optimizer's next step takes.
        steps: how many steps these are.
    """

    step: int
    items: list[list[int]]
    pairs: list[list[int]]
    weight: float
    update: list[int]
    steps: int = 1


@dataclass(frozen=True)
class Stream:
    """Things that a run passes over again and again, each pass in an order of its own.

    Attributes:
        count: how many there are.
        batch_size: how many of them a step takes, on all processes together.
        seed: the seed of the order.
        sampler: what fills steps up to a number of tokens instead, for all processes, step after step; or None.
    """

    count: int
    batch_size: int
    seed: object
    sampler: TokenBudgetSampler | None = None

    def passes(self, number: int) -> list[list[int]]:
        """The steps of one pass; each is dealt out to the processes by `dealt`."""
        order = shuffled(self.seed, number, self.count)
        return [order[n : n + self.batch_size] for n in range(0, self.count, self.batch_size)]

    def running(self, step: int) -> list[int]:
        """What a step takes of passes that go on without a pause, none of their steps smaller than the others."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {place // self.count: None for place in places}
        orders = {number: shuffled(self.seed, number, self.count) for number in orders}
        return [orders[place // self.count][place % self.count] for place in places]


def dealt(batch: Sequence[int], world_size: int) -> list[list[int]]:
    """A step's things, one after the other to each process: none has two more than another."""
    return [list(batch[rank::world_size]) for rank in range(world_size)]


class Steps(Dataset):
    """The steps of a run, by number.

    The main stream, the task's items or, without a task, the pairs, is passed over as often as `epochs` says, or for
    `max_steps` steps; its last step of a pass may be smaller. Pairs beside a task's items run on without a pause.

    Attributes:
        per_epoch: steps of an epoch: as many as the first pass has.
        updates: steps of the optimizer.

    Args:
        main: the task's items; the pairs where there is no task.
        beside: the pairs beside a task's items, or None.
        alignment: how the pairs are aligned; None: there are none.
        epochs, max_steps: how long it is; max_steps is read if it is above 0. The steps of alignment alone come on top.
        world_size: the number of processes.
        accumulation: how many steps' gradients one of the optimizer's steps takes.
        groups: the group of each pair's English sentence: of pairs of one group a step takes the first only, as the
            sentence would otherwise be its own rival. None: all pairs are taken.
    """

    def __init__(
        self,
        main: Stream,
        beside: Stream | None,
        alignment: AlignmentConfig | None,
        *,
        epochs: float,
        max_steps: int,
        world_size: int = 1,
        accumulation: int = 1,
        groups: Sequence[int] | None = None,
    ) -> None:
        self.main, self.beside, self.alignment, self.groups = main, beside, alignment, groups
        self.world_size, self.aligns_main = world_size, alignment is not None and beside is None
        self.accumulation = accumulation
        self.warm_up = alignment.warmup_steps * accumulation if alignment is not None and beside is not None else 0
        self._passes: list[list[list[list[int]]]] = []  # pass, step, process
        self._starts = [0]
        self.per_epoch = len(self._pass(0))
        # transformers' Trainer ends an epoch with a step of the optimizer, whatever is left for it.
        an_epoch = -(-self.per_epoch // accumulation)
        if max_steps > 0:
            whole, rest = divmod(max_steps + self.warm_up // accumulation, an_epoch)
            self.length = whole * self.per_epoch + min(rest * accumulation, self.per_epoch)
        else:
            whole, part = divmod(epochs, 1)
            self.length = self.warm_up + sum(len(self._pass(n)) for n in range(int(whole)))
            self.length += math.ceil(part * len(self._pass(int(whole)))) if part else 0
            whole, rest = divmod(self.length, self.per_epoch)
            rest = -(-rest // accumulation)  # nothing is left that would be no step of the optimizer
            self.length = whole * self.per_epoch + min(rest * accumulation, self.per_epoch)
        self.updates = whole * an_epoch + rest

    def __len__(self) -> int:
        return self.length

    def _pass(self, number: int) -> list[list[list[int]]]:
        while len(self._passes) <= number:
            stream, world_size = self.main, self.world_size
            if stream.sampler is None:
                steps = [dealt(batch, world_size) for batch in stream.passes(len(self._passes))]
            else:
                stream.sampler.set_epoch(len(self._passes))
                batches = list(stream.sampler)
                steps = [batches[n : n + world_size] for n in range(0, len(batches), world_size)]
            self._passes.append(steps)
            self._starts.append(self._starts[-1] + len(steps))
        return self._passes[number]

    def _main(self, step: int) -> list[list[int]]:
        """What a step takes of the main stream."""
        while self._starts[-1] <= step:
            self._pass(len(self._passes))
        number = bisect_right(self._starts, step) - 1
        return self._passes[number][step - self._starts[number]]

    def __getitem__(self, step: int) -> Chosen:
        none = [[] for _ in range(self.world_size)]
        own = step - self.warm_up
        if self.aligns_main:
            return Chosen(step, none, self._once(self._main(step)), 1.0, [])
        items = self._main(own) if own >= 0 else none
        update = [n - self.warm_up for n in self._update(step)]
        together = [n for each in update if each >= 0 for part in self._main(each) for n in part]
        pairs = none
        if self.beside is not None and self.beside.count:
            pairs = self._once(dealt(self.beside.running(step), self.world_size))
        return Chosen(step, items, pairs, self._weight(own), together, len(update))

    def _update(self, step: int) -> range:
        """The steps that make up one of the optimizer's, which an epoch ends in any case."""
        begin = step - step % self.per_epoch
        first = step - (step - begin) % self.accumulation
        return range(first, min(first + self.accumulation, begin + self.per_epoch, self.length))

    def _once(self, dealt_pairs: list[list[int]]) -> list[list[int]]:
        """Without those whose English sentence the step has already."""
        if self.groups is None:
            return dealt_pairs
        whole = [(rank, n) for rank, pairs in enumerate(dealt_pairs) for n in pairs]
        kept: list[list[int]] = [[] for _ in dealt_pairs]
        for (rank, n), first in zip(whole, firsts([self.groups[n] for _, n in whole]), strict=True):
            if first:
                kept[rank].append(n)
        return kept

    def _weight(self, own: int) -> float:
        if self.alignment is None:
            return 0.0
        if self.alignment.schedule == "constant" or own < 0:
            return self.alignment.weight
        return self.alignment.weight * (1 - own / (self.length - self.warm_up))


class EpochSteps(Sampler[list[int]]):
    """The numbers of an epoch's steps, for a DataLoader: as many in each epoch as the first pass has."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.epoch = steps, 0

    @property
    def batch_sampler(self) -> "EpochSteps":
        """Where transformers' Trainer looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps.per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.epoch * self.steps.per_epoch
        for step in range(begin, min(begin + self.steps.per_epoch, len(self.steps))):
            yield [step]
