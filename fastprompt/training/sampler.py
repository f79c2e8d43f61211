"""TokenBudgetSampler: batches of nearly equal cost, counted in rows that a packed pass runs."""

import heapq
import random
from collections.abc import Iterator, Sequence

import torch.distributed
from torch.utils.data import Sampler


def shuffled(seed: int, epoch: int, count: int) -> list[int]:
    """The order of an epoch's examples: a function of its number, so that a resumed run goes on in it."""
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


class TokenBudgetSampler(Sampler[list[int]]):
    """Fills each batch up to a number of rows: a packed pass pays for rows, not for the rectangle around them.

    The cost of a batch is the sum of its sentences' lengths, `rows_per_sentence` for each of them and `rows_per_batch`
    once. The examples of an epoch are shuffled and taken in that order, for all ranks together and step by step; within
    a step the longest are dealt out first, each to the rank that has least. Hence, by (seed, epoch) alone:

    - no batch costs more than `max_tokens`;
    - every rank has the same number of batches, none of them empty;
    - at each step, the costliest batch without its shortest sentence costs no more than the cheapest (but where the
      last step had too few sentences and took one from that batch);
    - every example comes once an epoch. Only if there are not enough for the last step of all ranks, though every other
      batch was left a single one, is one repeated; none is ever dropped.

    As accelerate deals out batches itself, hand it those of all ranks, `world_size` without `rank`:
    `accelerator.prepare(DataLoader(data, batch_sampler=TokenBudgetSampler(..., world_size=accelerator.num_processes)))`
    with its defaults (`split_batches=False`). It sets the epoch, too.

    Args:
        lengths: tokens of each example, the same on every rank.
        max_tokens: the most rows of a batch.
        rows_per_sentence, rows_per_batch: prompt rows: `PromptModel.prompt_rows` gives both.
        seed: the seed of the order.
        rank, world_size: the process whose batches these are, and how many processes there are. If neither is given
            torch.distributed tells, or where that is not initialised they are 0 and 1. `world_size` alone gives the
            batches of all ranks, step after step.

    Raises:
        ValueError: a number outside its range, or a sentence that alone costs more than `max_tokens`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        rows_per_sentence: int = 0,
        rows_per_batch: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if rank is None and world_size is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            world_size = torch.distributed.get_world_size() if distributed else 1
        if world_size is None or world_size < 1:
            raise ValueError(f"world_size must be a positive integer, got {world_size} (with rank {rank})")
        if rank is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        for name, rows in (("rows_per_sentence", rows_per_sentence), ("rows_per_batch", rows_per_batch)):
            if rows < 0:
                raise ValueError(f"{name} must not be negative, got {rows}")
        lengths = [int(length) for length in lengths]
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be at least one positive number, got {min(lengths, default='none')}")
        if max(lengths) + rows_per_sentence + rows_per_batch > max_tokens:
            raise ValueError(
                f"max_tokens must have room for the longest sentence, {max(lengths)} tokens and "
                f"{rows_per_sentence + rows_per_batch} prompt rows, got {max_tokens}"
            )
        self.costs = [length + rows_per_sentence for length in lengths]
        self.room = max_tokens - rows_per_batch
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.set_epoch(0)

    @property
    def sampler(self) -> "TokenBudgetSampler":
        """Where accelerate looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the examples; `len` is that of this epoch's batches, and may differ a little by epoch."""
        self.epoch, self._planned = epoch, None

    def __len__(self) -> int:
        return len(self._steps()) * (self.world_size if self.rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        for batches in self._steps():
            yield from batches if self.rank is None else [batches[self.rank]]

    def _steps(self) -> list[list[list[int]]]:
        """The epoch's steps: the batch of each rank."""
        if self._planned is None:
            order, begin = shuffled(self.seed, self.epoch, len(self.costs)), 0
            self._planned = steps = []
            while begin < len(order):
                end, left = begin, self.room * self.world_size
                while end < len(order) and self.costs[order[end]] <= left:
                    left -= self.costs[order[end]]
                    end += 1
                while (batches := self._deal(order[begin:end])) is None:
                    end -= 1  # room in all, but not in one batch; one sentence a batch always has room
                steps.append(batches)
                begin = end
            for empty in (batch for batch in steps[-1] if not batch):
                fullest = max((batch for batches in steps for batch in batches), key=len)
                empty.append(fullest.pop() if len(fullest) > 1 else fullest[0])
        return self._planned

    def _deal(self, examples: list[int]) -> list[list[int]] | None:
        """A batch for each rank, the longest examples first, each to the least full; None if one has too much."""
        batches: list[list[int]] = [[] for _ in range(self.world_size)]
        loads = [(0, rank) for rank in range(self.world_size)]  # a heap
        for example in sorted(examples, key=self.costs.__getitem__, reverse=True):
            load, rank = loads[0]
            if load + self.costs[example] > self.room:
                return None
            heapq.heapreplace(loads, (load + self.costs[example], rank))
            batches[rank].append(example)
        return batches
