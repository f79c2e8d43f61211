"""What each step takes: every pair once a pass, to each process its part, as many steps as transformers' loop makes."""

from collections import Counter

import pytest
from helpers import paraphrases, translations
from runs import trainer
from simple_task import Classes

from fastprompt.training import AlignmentConfig, TokenBudgetSampler
from fastprompt.training.plan import EpochSteps, Steps, Stream, dealt

LENGTHS = [3 + n % 9 for n in range(23)]


def steps(count=23, batch_size=8, *, pairs=None, epochs=3.0, max_steps=-1, world_size=1, **given) -> Steps:
    """Of a task, with pairs beside it where their number is given; of pairs alone for `pairs` "alone"."""
    sampler = None
    if "max_tokens" in given:
        sampler = TokenBudgetSampler(LENGTHS[:count], given.pop("max_tokens"), world_size=world_size)
    alignment = AlignmentConfig(**given.pop("alignment", {})) if pairs else None
    beside = Stream(pairs, alignment.batch_size, "pairs") if isinstance(pairs, int) else None
    main = Stream(count, batch_size, "main", sampler)
    return Steps(main, beside, alignment, epochs=epochs, max_steps=max_steps, world_size=world_size, **given)


def taken(plan: Steps, name: str = "items") -> list[list[list[int]]]:
    return [getattr(plan[n], name) for n in range(len(plan))]


def flat(parts) -> list[int]:
    return [n for part in parts for n in part]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 40}])
@pytest.mark.parametrize("pairs", [None, "alone"])
def test_everything_once_a_pass_and_to_each_process_its_part(world_size, settings, pairs):
    plan = steps(pairs=pairs, world_size=world_size, **settings)
    whole = taken(plan, "pairs" if pairs else "items")
    assert not any(flat(step) for step in taken(plan, "items" if pairs else "pairs"))
    order, ends, seen = [], [], Counter()
    for step in whole:
        assert len(step) == world_size
        sizes = [len(part) for part in step]
        assert settings or (max(sizes) - min(sizes) <= 1 and sum(sizes) in (8, 23 % 8))
        assert not settings or all(sum(LENGTHS[n] for n in part) <= 40 for part in step)
        order += flat(step)
        seen.update(set(flat(step)))
        if len(seen) == 23 and len(set(seen.values())) == 1:
            ends.append(len(order))
    assert set(seen.values()) == {3} and len(ends) == 3
    assert order[: ends[0]] != order[ends[0] : ends[1]]
    alone = taken(steps(pairs=pairs, **settings | {"world_size": 1}), "pairs" if pairs else "items")
    assert settings or [sorted(flat(step)) for step in whole] == [sorted(flat(step)) for step in alone]


@pytest.mark.parametrize("pairs", [5, 16, 40])
def test_pairs_beside_a_task_run_on_without_a_pause(pairs):
    plan = steps(pairs=pairs, epochs=20, world_size=2)
    whole = taken(plan, "pairs")
    assert all(sum(map(len, step)) == 16 for step in whole)
    counts = Counter(flat(flat(step) for step in whole))
    assert len(counts) == pairs and max(counts.values()) - min(counts.values()) <= 1
    running = flat(plan.beside.running(n) for n in range(len(plan)))
    for begin in range(0, len(running) - pairs, pairs):
        assert sorted(running[begin : begin + pairs]) == list(range(pairs))
    one = taken(steps(pairs=pairs, epochs=20), "pairs")
    assert [sorted(flat(step)) for step in one] == [sorted(flat(step)) for step in whole]


def test_no_pair_is_its_own_rival():
    """Neither by a pass that begins anew within a step, nor by another one of the same English sentence."""
    for world_size in (1, 2):
        plan = steps(pairs=5, groups=range(5), world_size=world_size)
        assert all(sorted(flat(step)) == [0, 1, 2, 3, 4] for step in taken(plan, "pairs"))
        same = steps(8, pairs="alone", groups=[0, 0, 1, 1, 2, 2, 3, 3], world_size=world_size)
        for step in taken(same, "pairs"):
            assert sorted(n // 2 for n in flat(step)) == [0, 1, 2, 3]
    assert all(len(flat(step)) == 16 for step in taken(steps(pairs=5), "pairs"))  # nothing is contrasted


def test_weights_of_the_alignment():
    alignment = {"weight": 0.5, "schedule": "linear", "warmup_steps": 3}
    plan = steps(pairs=9, alignment=alignment, max_steps=10)
    assert [plan[n].weight for n in range(13)] == [0.5] * 3 + [0.5 * (1 - n / 10) for n in range(10)]
    assert [bool(flat(plan[n].items)) for n in range(13)] == [False] * 3 + [True] * 10
    assert {steps(pairs=9)[n].weight for n in range(9)} == {1.0}
    assert [plan[n + 3].items for n in range(9)] == taken(steps())  # the task's own steps are what they are without


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 40}])
def test_any_step_at_once(settings):
    """As a run that goes on asks for it."""
    whole = taken(steps(max_steps=17, **settings))
    for step in (16, 9, 3, 0):
        assert steps(max_steps=17, **settings)[step].items == whole[step]


@pytest.mark.parametrize("world_size", [1, 2])
def test_dealing_loses_nothing(world_size):
    for count in range(7):
        parts = dealt(list(range(count)), world_size)
        assert sorted(flat(parts)) == list(range(count)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_an_update_takes():
    """The items of its steps together, so that the loss can be the mean over all of them."""
    plan = steps(20, 4, accumulation=2, epochs=2)  # five steps an epoch: 2, 2, 1
    assert [plan[n].steps for n in range(10)] == [2, 2, 2, 2, 1] * 2
    for first, last in ((0, 2), (2, 4), (4, 5), (5, 7), (9, 10)):
        together = flat(flat(plan[n].items) for n in range(first, last))
        assert all(plan[n].update == together for n in range(first, last))


@pytest.mark.parametrize("epochs", [1, 3, 1.5, 2.3])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 40}, {"pairs": 9, "alignment": {"warmup_steps": 2}}])
def test_as_many_updates_as_the_loop_makes(epochs, accumulation, settings):
    for length in ({"epochs": epochs}, {"max_steps": int(epochs * 4)}):
        plan = steps(accumulation=accumulation, **length, **settings)
        sampler, updates, number = EpochSteps(plan), 0, 0
        assert len(sampler) == plan.per_epoch
        while number < len(plan):
            sampler.set_epoch(number // plan.per_epoch)
            for place, chosen in enumerate(sampler, 1):  # as `_run_epoch` has it
                assert chosen == [number]
                number += 1
                updates += place % accumulation == 0 or place == plan.per_epoch
        assert updates == plan.updates
        warm_up = settings.get("alignment", {}).get("warmup_steps", 0)
        assert "max_steps" not in length or plan.updates == length["max_steps"] + warm_up


@pytest.mark.parametrize("settings", [{}, {"num_train_epochs": 1.4}, {"max_steps": 5}])
def test_the_trainer_makes_the_steps_of_the_plan(backbone, tmp_path, settings):
    common = dict(task=Classes(), train_dataset=paraphrases(8), pairs=translations(5), per_device_train_batch_size=3)
    common |= dict(gradient_accumulation_steps=2, num_train_epochs=2, save_strategy="no")
    made, seen = trainer(backbone, tmp_path / "run", **common | settings), []
    collate = made.streams.batch
    made.streams.batch = lambda collator, chosen, rank: seen.append(chosen.step) or collate(collator, chosen, rank)
    made.train()
    assert seen == list(range(len(made.steps))) and len(made.records) == made.steps.updates == made.state.max_steps
    assert made.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)
