import math
import random

import pytest

from fastprompt.bench import timing
from fastprompt.bench.timing import FEWEST, MOST, Interval, in_turns, median_interval, ratio_interval

# Rank of the lower end, from printed tables of the sign test's 95 % interval.
RANKS = dict(zip(range(6, 21), (1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 6), strict=True))


class Clock:
    """Stands for the time module: time passes only in the ways."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def perf_counter(self):
        return self.now

    def way(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds()

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


@pytest.mark.parametrize("n", RANKS)
def test_interval_has_the_ranks_of_the_tables(n):
    values = random.sample(range(1, n + 1), n)
    assert median_interval(values) == Interval((n + 1) / 2, RANKS[n], n + 1 - RANKS[n])


@pytest.mark.parametrize("n", range(1, 6))
def test_interval_of_few_values_is_all_of_them(n):
    assert median_interval(random.sample(range(n), n)) == Interval((n - 1) / 2, 0, n - 1)


@pytest.mark.parametrize("n", [7, 12, 33, 100])
def test_interval_holds_the_median_of_skewed_values_as_often_as_it_should(n):
    trials = 3000
    intervals = [median_interval([random.lognormvariate(0, 1.5) for _ in range(n)]) for _ in range(trials)]
    held = sum(low <= 1 <= high for _, low, high in intervals) / trials
    # That the rank is the largest allowed makes the interval as narrow as 95 % lets it be.
    outside, rank = 0.0, 0
    while outside + 2 * math.comb(n, rank) / 2**n <= 0.05:
        outside += 2 * math.comb(n, rank) / 2**n
        rank += 1
    assert held == pytest.approx(1 - outside, abs=5 * math.sqrt(outside * (1 - outside) / trials))
    assert 0.95 <= 1 - outside


def test_ratio_is_taken_turn_by_turn():
    ours = [random.uniform(0.1, 10) for _ in range(15)]  # the machine drifts, both ways alike
    factors = random.sample([1.5 + 0.01 * turn for turn in range(15)], 15)
    found = ratio_interval([factor * each for factor, each in zip(factors, ours, strict=True)], ours)
    assert found == pytest.approx((1.57, 1.53, 1.61))


def test_ratio_needs_as_many_of_both():
    with pytest.raises(ValueError):
        ratio_interval([1.0, 2.0], [1.0])


def test_sets_and_order_rotate_and_warm_up_is_apart(clock):
    took = {"a": [], "b": []}

    def seconds(name):
        warm = len(clock.calls) <= 6  # each way of each of three sets
        value = 1000.0 if warm else random.uniform(1, 2)
        if not warm:
            took[name].append(value)
        return value

    sets = [{way: clock.way((number, way), lambda way=way: seconds(way)) for way in "ab"} for number in range(3)]
    found = in_turns(sets, "cpu", budget=60.0, width=0.0)
    assert found == {name: pytest.approx(values) for name, values in took.items()}
    assert sorted(clock.calls[:6]) == [(number, way) for number in range(3) for way in "ab"]
    turns = list(zip(clock.calls[6::2], clock.calls[7::2], strict=True))
    assert len(turns) == len(found["a"]) == len(found["b"])
    for turn, (first, second) in enumerate(turns):
        assert first[0] == second[0] == turn % 3
        assert {first[1], second[1]} == {"a", "b"}
    assert {first[1] for first, _ in turns} == {"a", "b"}
    total = sum(took["a"]) + sum(took["b"])
    assert total > 60.0 >= total - took["a"][-1] - took["b"][-1]  # the turn that went beyond was the last


@pytest.mark.parametrize(
    ("budget", "width", "turns"),
    [(0.0, 0.0, FEWEST), (1e9, 0.0, MOST), (1e9, 10.0, FEWEST)],
    ids=["budget spent", "never known", "known at once"],
)
def test_number_of_turns(clock, budget, width, turns):
    way = clock.way("a", lambda: random.uniform(1, 2))
    assert len(in_turns([{"a": way}], "cpu", budget, width)["a"]) == turns


def test_stops_only_when_every_way_is_known(clock):
    steady = clock.way("a", lambda: 1.0)
    wild = clock.way("b", lambda: random.choice([1.0, 2.0]) + 0.1 * random.random())
    found = in_turns([{"a": steady, "b": wild}], "cpu", 1e9)
    assert len(found["a"]) == len(found["b"]) > FEWEST
