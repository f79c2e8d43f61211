"""The registry's cases compute what they should; how fast is for `fastprompt bench`."""

import dataclasses

import pytest
import torch

from fastprompt.bench import attention, run, step
from fastprompt.bench.case import OURS, dtype_of
from fastprompt.bench.memory import peak_bytes
from fastprompt.bench.registry import GROUPS, cases, find

ALL = cases()
CHECKED = [*cases(quick=True), *(case for case in cases(["pooling"]) if not case.quick), find("packing/causal")]


def test_names_are_unique_and_found():
    assert len({case.name for case in ALL}) == len(ALL)
    assert {case.group for case in ALL} == set(GROUPS)
    assert find(ALL[-1].name).name == ALL[-1].name


def test_every_group_has_a_quick_case():
    assert {case.group for case in cases(quick=True)} == set(GROUPS)
    assert len(cases(quick=True)) < len(ALL) / 5


def test_sweeps_grow_one_size_alone():
    sweeps = {}
    for case in ALL:
        if case.sweep:
            others = tuple(value for name, value in case.sizes.items() if name != case.sweep)
            sweeps.setdefault((case.group, case.sweep, others), []).append(case.sizes[case.sweep])
    assert {key[:2] for key in sweeps} >= {(group, axis) for group in ("attention", "step") for axis in "BLP"}
    for sizes in sweeps.values():
        assert len(sizes) >= 3 and sizes == sorted(set(sizes))


def test_names_choose():
    assert {case.group for case in cases(["pooling", "packing"])} == {"pooling", "packing"}
    assert [case.label for case in cases(["pooling/mean-s"])] == ["mean-sentences-384", "mean-sentences-768"]
    with pytest.raises(ValueError, match="names must .*unknown"):
        cases(["attention", "unknown"])
    with pytest.raises(ValueError, match="names must .*attention/none"):
        cases(["attention/none"])
    with pytest.raises(ValueError, match="name must .*attention/B8"):
        find("attention/B8")


@pytest.mark.parametrize("case", {case.name: case for case in CHECKED}.values(), ids=lambda case: case.name)
def test_measure(case, device):
    record = run.measure(case, device, budget=0, memory=False)
    assert not record["wrong"]
    assert OURS in record["ways"] and len(record["ways"]) > 1
    for name, way in record["ways"].items():
        assert 0 < way["seconds"]["low"] <= way["seconds"]["median"] <= way["seconds"]["high"]
        assert ("over_ours" in way) == (name != OURS)
        assert way["error"] <= case.tolerance[dtype_of(device)]
    assert record["floor_seconds"] > 0 or not record["flops"]


SHAPES = [
    attention.Shape(3, 9, ragged, prefix, 32, heads, kv_heads, causal)
    for ragged in (False, True)
    for prefix in (0, 5)
    for heads, kv_heads in ((4, 4), (4, 2))
    for causal in (False, True)
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_all_ways_of_attention_agree(shape, device):
    work = attention.Batch(shape, device, dtype_of(device), 0).work()
    errors, failed = run._errors(work)
    assert not failed and set(errors) == set(work.ways)
    for name, error in errors.items():
        assert error < (1e-5 if device == "cpu" else 3e-2), name


@pytest.mark.parametrize("ragged", [False, True])
def test_encoders_drop_in_what_is_timed_and_not_in_what_is_checked(ragged, monkeypatch):
    monkeypatch.setitem(step.MODELS, step.GROWING.model, step.Model("encoder", 2, 32, 2, 2, 16, 64, 100))
    small = step.GROWING._replace(sentences=2, mean_length=6, prompt=2, ragged=ragged)
    work = step.Batch(small, "cpu", torch.float32, 0, random=True).work()
    assert set(work.ways) == set(work.checked) == {OURS, "peft"}
    for name in work.ways:
        dropping, checked = work.ways[name], work.checked[name]
        assert dropping()[0] != dropping()[0] and checked()[0] == checked()[0]
    errors, failed = run._errors(work)
    assert not failed and max(errors.values()) < 1e-3


def _changed(case, way: str, change):
    """The case with what one way returns changed."""

    def make(*arguments):
        work = case.make(*arguments)
        right = work.ways[way]
        work.ways[way] = lambda: [change(x) for x in right()]
        return work

    return dataclasses.replace(case, make=make)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_what_is_wrong_has_no_time(factor):
    case = find("alignment/cosine-N64-D384")
    ours = run.measure(_changed(case, OURS, lambda x: x * factor), "cpu", budget=0, memory=False)
    assert list(ours["wrong"]) == [OURS] and not ours["ways"]
    rival = run.measure(_changed(case, "eager", lambda x: x * factor), "cpu", budget=0, memory=False)
    assert list(rival["wrong"]) == ["eager"] and set(rival["ways"]) == {OURS, "compiled"}


def test_a_rival_that_fails_is_missing():
    def fail(x):
        raise NotImplementedError("not for this device\nand more")

    case = find("alignment/cosine-N64-D384")
    record = run.measure(_changed(case, "eager", fail), "cpu", budget=0, memory=False)
    assert record["missing"] == {"eager": "NotImplementedError: not for this device"}
    assert set(record["ways"]) == {OURS, "compiled"}
    with pytest.raises(NotImplementedError):
        run.measure(_changed(case, OURS, fail), "cpu", budget=0, memory=False)


def test_peak_memory_is_that_of_the_way():
    case = find("alignment/infonce-N2048-D384-grow-N")
    similarities = 2048**2 * 4
    (ours, _), (eager, resident) = (peak_bytes(case, way, "cpu") for way in (OURS, "eager"))
    assert eager > 2 * similarities  # and their gradient
    assert 0 < ours < eager / 2
    assert resident > eager


def test_memory_of_what_is_not_there_is_told():
    with pytest.raises(RuntimeError, match="cosine-N64.*none"):
        peak_bytes(find("alignment/cosine-N64-D384"), "none", "cpu")


def test_inputs_are_fresh_and_repeatable():
    case = find("alignment/cosine-N64-D384")
    first, again, other = (case.make("cpu", torch.float32, seed).ways[OURS]()[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
