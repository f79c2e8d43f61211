import random

import pytest
from results import MACHINE, job, record, result, wrong

from fastprompt.bench.compare import compare, notes, table


def one(old, new, **machine):
    (change,) = compare(result(old), result(new, **machine))
    return change


@pytest.mark.parametrize(
    ("factor", "noise", "kind"),
    [
        (1.10, 0.01, "regression"),
        (1.10, 0.05, "same"),  # as likely noise
        (1.02, 0.0, "same"),  # sure, but too little to matter
        (1.031, 0.0, "regression"),
        (0.98, 0.0, "same"),
        (0.969, 0.0, "faster"),
        (0.90, 0.01, "faster"),
        (0.90, 0.06, "same"),
    ],
)
def test_a_change_counts_beyond_noise_only(factor, noise, kind):
    change = one(record(ours=2e-3, noise=noise), record(ours=2e-3 * factor, noise=noise))
    assert change.kind == kind and change.drift is None
    assert change.time == pytest.approx(
        (factor, factor * (1 - noise) / (1 + noise), factor * (1 + noise) / (1 - noise))
    )


def test_drift_of_the_machine_is_no_change():
    drift = random.uniform(1.2, 3)
    old = record(ours=2e-3, rivals={"concat": 3e-3, "peft": 4e-3, "gone": 1.0})
    new = record(ours=2e-3 * drift, rivals={"concat": 3e-3 * drift, "peft": 4e-3 * drift, "came": 1.0})
    change = one(old, new)
    assert change.kind == "same"
    assert change.drift.median == pytest.approx(drift) and change.time.median == pytest.approx(1)


def test_drift_is_the_geometric_mean_of_the_rivals_and_widens_the_interval():
    old = record(ours=2e-3, noise=0.01, rivals={"a": 1e-3, "b": 1e-3, "merge (ours)": 1e-3})
    new = record(ours=2e-3, noise=0.01, rivals={"a": 1e-3, "b": 4e-3, "merge (ours)": 9e-3})
    change = one(old, new)
    wide = 1.01 / 0.99
    assert change.drift == pytest.approx((2, 2 / wide, 2 * wide))
    assert change.time == pytest.approx((0.5, 0.5 / wide**2, 0.5 * wide**2))
    assert change.kind == "faster"


def test_what_the_machine_hides_is_found():
    old = record(ours=2e-3, noise=0.005, rivals={"peft": 4e-3})
    assert one(old, record(ours=2e-3, noise=0.005, rivals={"peft": 3e-3})).kind == "regression"
    assert one(old, record(ours=3e-3, noise=0.005, rivals={"peft": 9e-3})).kind == "faster"


@pytest.mark.parametrize("name", ["torch", "peft"])
def test_rivals_of_another_version_are_no_measure_of_drift(name):
    old, new = record(ours=2e-3, rivals={"peft": 4e-3}), record(ours=2e-3, rivals={"peft": 2e-3})
    versions = {"versions": MACHINE["versions"] | {name: "9.9"}}
    change = one(old, new, **versions)
    assert change.drift is None and change.kind == "same"
    (line,) = notes(result(old), result(new, **versions))
    assert "not corrected for drift" in line and f"{name} was {MACHINE['versions'][name]}, is 9.9" in line


def test_our_own_version_may_differ():
    old, new = record(rivals={"peft": 4e-3}), record(rivals={"peft": 4e-3})
    versions = {"versions": MACHINE["versions"] | {"fastprompt": "0.2.0"}}
    assert one(old, new, **versions).drift is not None
    assert notes(result(old), result(new, **versions)) == []


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (100 * 2**20, 106 * 2**20, "regression"),
        (100 * 2**20, 104 * 2**20, "same"),  # 4 %
        (10 * 2**20, 11 * 2**20, "same"),  # 1 MiB, no more
        (10 * 2**20, 11 * 2**20 + 1, "regression"),
        (100 * 2**20, 50 * 2**20, "same"),
        (None, 2**30, "same"),
        (2**30, None, "same"),
    ],
)
def test_memory_that_has_grown(before, after, kind):
    old, new = record(), record(ours=1e-3 if kind == "regression" else 2e-3)  # also if it has become faster
    for about, peak in ((old, before), (new, after)):
        if peak is not None:
            about["ways"]["ours"]["peak_bytes"] = peak
    change = one(old, new)
    assert change.kind == kind and ("memory from" in change.why) == (kind == "regression")


def test_wrong_numbers():
    assert one(record(), wrong()).kind == "regression"
    assert "ours wrong: error 1e-02" in one(record(), wrong()).why
    assert (one(wrong(), wrong()).kind, one(wrong(), record()).kind) == ("same", "new")
    assert one(record(), record(wrong={"merge (ours)": 0.5})).kind == "regression"
    assert one(record(), record(wrong={"concat": 0.5})).kind == "same"  # not ours


def test_cases_gone_and_new():
    found = compare(
        result(record("attention/a"), record("attention/b")), result(record("attention/c"), record("attention/b"))
    )
    assert {change.name: change.kind for change in found} == {
        "attention/a": "gone",
        "attention/b": "same",
        "attention/c": "new",
    }


@pytest.mark.parametrize(("name", "value"), [("device", "cuda"), ("dtype", "bfloat16")])
def test_other_devices_do_not_compare(name, value):
    with pytest.raises(ValueError, match=f"new must be measured with the {name} of old, .*, got {value}"):
        compare(result(record()), result(record(), **{name: value}))


def test_another_machine_is_a_warning():
    old, new = result(record()), result(record(), name="Another CPU", threads=1)
    assert compare(old, new)[0].kind == "same"
    assert notes(old, new) == [
        "warning: another machine: name was Some CPU, 2 cores, AVX2, is Another CPU",
        "warning: another machine: threads was 2, is 1",
    ]
    assert notes(old, old) == []


def test_whole_trainings():
    assert one(job(0.2, 0.4), job(0.3, 0.6)).kind == "same"
    assert one(job(0.2, 0.4), job(0.3, 0.4)).kind == "regression"
    assert one(job(0.3, 0.4), job(0.2, 0.4)).kind == "faster"
    assert one(job(), job(resident=2 * 2**30)).kind == "regression"


def test_table_tells_what_matters_first():
    old = result(record("attention/a"), record("attention/b", 2e-3), record("attention/c"))
    new = result(record("attention/a"), record("attention/b", 4e-3), wrong("attention/c"))
    counts, _, head, *lines = table(compare(old, new)).splitlines()
    assert counts == "regression: 2, faster: 0, new: 0, gone: 0, same: 1"
    assert head.split()[:4] == ["case", "kind", "old", "new"]
    assert [line.split()[:2] for line in lines] == [
        ["attention/b", "regression"], ["attention/c", "regression"], ["attention/a", "same"]
    ]  # fmt: skip
    assert "2.00 ms [1.98, 2.02]  4.00 ms [3.96, 4.04]" in lines[0] and "2.00 [1.96, 2.04]" in lines[0]
    assert lines[0].endswith("slower")
