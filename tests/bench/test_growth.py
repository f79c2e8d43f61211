import math
import random

import pytest
import torch
from results import record, wrong

from fastprompt.bench.growth import fit, growths

SIZES = [16, 32, 64, 128, 256]


def sweep(seconds, sizes=SIZES, peaks=None, batch=8):
    """Records of a sweep over L; seconds, peaks: way -> a function of L."""
    found = []
    for size in sizes:
        times = {way: of(size) for way, of in seconds.items()}
        one = record(f"attention/B{batch}-L{size}", times.pop("ours"), rivals=times, sweep="L")
        one["sizes"] = {"B": batch, "L": size}
        for way, of in (peaks or {}).items():
            one["ways"][way]["peak_bytes"] = of(size)
        found.append(one)
    random.shuffle(found)
    return found


def test_exponents_of_powers_are_found():
    a, b, c = (random.uniform(0.5, 3) for _ in range(3))
    records = sweep({"ours": lambda n: 1e-6 * n**a, "peft": lambda n: 3e-6 * n**b}, peaks={"peft": lambda n: 50 * n**c})
    (growth,) = growths(records)
    assert (growth.group, growth.sweep, growth.others, growth.label) == ("attention", "L", {"B": 8}, "attention B8")
    assert {way: found.exponent for way, found in growth.seconds.items()} == pytest.approx({"ours": a, "peft": b})
    assert {way: found.upper for way, found in growth.seconds.items()} == pytest.approx({"ours": a, "peft": b})
    assert [(way, found.exponent) for way, found in growth.peak_bytes.items()] == [("peft", pytest.approx(c))]
    assert [size for size, _ in growth.seconds["ours"].points] == SIZES


def test_fit_is_by_least_squares():
    points = [(size, random.lognormvariate(0, 1)) for size in random.sample(range(1, 1000), 9)]

    def slope(chosen):
        x, y = torch.tensor(chosen, dtype=torch.float64).log().T
        return torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution[0].item()

    found = fit(points)
    assert found.exponent == pytest.approx(slope(points))
    assert found.upper == pytest.approx(slope(sorted(points)[4:]))


def test_upper_half_is_nearer_to_the_limit():
    found = fit([(n, 100 * n + n * n) for n in SIZES])
    assert 1 < found.exponent < found.upper < 2


def test_what_has_no_logarithm_is_left_out():
    points = [(n, 7.0 * n) for n in SIZES]
    assert fit([(0, 5.0), *points]) == fit(points)
    assert fit([(8, 0), *points]) == fit(points)
    assert math.isclose(fit(points).exponent, 1)


@pytest.mark.parametrize(
    "points", [[], [(1, 1.0), (2, 2.0)], [(0, 1.0), (1, 1.0), (2, 2.0)], [(1, 1.0), (1, 2.0), (2, 2.0)]]
)
def test_no_fit_of_fewer_than_three_sizes(points):
    assert fit(points) is None


def test_what_stays_tells_sweeps_apart():
    both = sweep({"ours": lambda n: n}) + sweep({"ours": lambda n: n * n}, batch=1)
    random.shuffle(both)
    found = {growth.others["B"]: growth.seconds["ours"].exponent for growth in growths(both)}
    assert found == pytest.approx({8: 1, 1: 2})
    assert growths(sweep({"ours": lambda n: n}, SIZES[:2])) == []
    assert growths([one | {"sweep": None} for one in both]) == []


def test_a_rival_must_be_there_at_every_size_of_ours():
    records = sweep({"ours": lambda n: n + 1, "flex": lambda n: n + 1, "peft": lambda n: n + 1}, [0, *SIZES])
    for one in records:
        if one["sizes"]["L"] == 32:
            del one["ways"]["flex"]
        if one["sizes"]["L"] == 0:
            del one["ways"]["peft"]  # no logarithm: nobody misses it
    (growth,) = growths([*records, wrong(sweep="L", sizes={"B": 8, "L": 512})])
    assert list(growth.seconds) == ["ours", "peft"]
