"""TokenBudgetSampler: budget, coverage, equal steps for all ranks, the same again from seed and epoch."""

import random
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from fastprompt.training import TokenBudgetSampler


def sentence_lengths(count: int, longest: int = 128) -> list[int]:
    """Log-normal, as tokens of sentences are."""
    draw = random.Random(count)
    return [min(longest, max(3, round(draw.lognormvariate(3.2, 0.6)))) for _ in range(count)]


def ranks(lengths, max_tokens, world_size, epoch=0, **options):
    """The batches of each rank, of one epoch."""
    batches = []
    for rank in range(world_size):
        sampler = TokenBudgetSampler(lengths, max_tokens, rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
        assert len(sampler) == len(batches[-1])
    return batches


@pytest.mark.parametrize("per_sentence, per_batch", [(0, 0), (16, 0), (0, 16)])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_full_and_even(world_size, per_sentence, per_batch):
    lengths, budget = sentence_lengths(6000), 2048
    options = dict(rows_per_sentence=per_sentence, rows_per_batch=per_batch)
    batches = ranks(lengths, budget, world_size, **options)
    assert len({len(of_rank) for of_rank in batches}) == 1
    assert Counter(n for of_rank in batches for batch in of_rank for n in batch) == Counter(range(len(lengths)))
    steps = list(zip(*batches, strict=True))
    for step in steps:
        costs = [per_batch + sum(lengths[n] + per_sentence for n in batch) for batch in step]
        shortest = min(lengths[n] for n in step[costs.index(max(costs))]) + per_sentence
        assert max(costs) <= budget and max(costs) - shortest <= min(costs)
        if step is not steps[-1]:
            assert max(costs) < 1.05 * min(costs) and sum(costs) > 0.9 * budget * world_size


def test_order_is_a_function_of_seed_and_epoch():
    lengths = sentence_lengths(300)
    first, again, later, other = (ranks(lengths, 400, 2, epoch, seed=seed) for seed, epoch in
                                  ((0, 0), (0, 0), (0, 1), (1, 0)))  # fmt: skip
    assert first == again and first != later and first != other
    mates = [{frozenset(batch) for of_rank in each for batch in of_rank} for each in (first, later)]
    assert not mates[0] & mates[1]  # other batches, not the same ones in another order


@pytest.mark.parametrize("count, world_size", [(1, 1), (1, 4), (3, 4), (5, 4), (9, 4), (61, 8), (62, 8), (63, 8)])
def test_few_examples(count, world_size):
    """Nobody waits for a rank that has nothing to do; examples are repeated only where there are not enough."""
    for max_tokens in (128, 300):
        lengths = sentence_lengths(count)
        batches = ranks(lengths, max_tokens, world_size)
        assert all(batch for of_rank in batches for batch in of_rank)
        seen = Counter(n for of_rank in batches for batch in of_rank for n in batch)
        needed = sum(len(of_rank) for of_rank in batches)
        assert set(seen) == set(range(count)) and sum(seen.values()) == max(count, needed)
        assert all(sum(lengths[n] for n in batch) <= max_tokens for of_rank in batches for batch in of_rank)


def test_long_sentences_stand_alone():
    batches = ranks([100, 100, 100, 7, 100], 100, 1)[0]
    assert sorted(map(len, batches)) == [1] * 5


@pytest.mark.parametrize("world_size", [1, 3])
def test_accelerate_deals_out_what_each_rank_would_take(world_size):
    accelerate = pytest.importorskip("accelerate")
    lengths = sentence_lengths(200)
    expected = [ranks(lengths, 300, world_size, epoch) for epoch in range(2)]
    for rank in range(world_size):
        loader = DataLoader(torch.arange(200), batch_sampler=TokenBudgetSampler(lengths, 300, world_size=world_size))
        prepared = accelerate.data_loader.prepare_data_loader(
            loader, num_processes=world_size, process_index=rank, put_on_device=False
        )
        for epoch in range(2):  # it sets the epoch by itself
            assert len(prepared) == len(expected[epoch][rank])
            assert [batch.tolist() for batch in prepared] == expected[epoch][rank]


def test_torch_distributed_is_the_default(monkeypatch):
    lengths = sentence_lengths(100)
    assert list(TokenBudgetSampler(lengths, 200)) == ranks(lengths, 200, 1)[0]
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert list(TokenBudgetSampler(lengths, 200)) == ranks(lengths, 200, 2)[1]


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(lengths=[]), "lengths must be at least one positive number, got none"),
        (dict(lengths=[3, 0]), "lengths must be at least one positive number, got 0"),
        (dict(max_tokens=15), "longest sentence, 9 tokens and 7 prompt rows, got 15"),
        (dict(rows_per_batch=-1), "rows_per_batch must not be negative, got -1"),
        (dict(rank=2, world_size=2), r"rank must be in \[0, 2\), got 2"),
        (dict(rank=0), r"world_size must be a positive integer, got None \(with rank 0\)"),
        (dict(world_size=0), "world_size must be a positive integer, got 0"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(**(dict(lengths=[4, 9], max_tokens=50, rows_per_sentence=7) | given))
