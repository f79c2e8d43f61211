"""Two processes train what one does with the whole batch; one of them writes."""

import json
import socket
from pathlib import Path

import pytest
import torch
from process import cases, in_double, main
from runs import summary, written

PARTS = {"alone": 12, "tokens": None, "task": 6, "both": 10, "few": 9}


@pytest.fixture(scope="module")
def together(backbone, tmp_path_factory, processes) -> Path:
    """What two processes wrote and computed."""
    out = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [processes.Process(target=main, args=(rank, backbone, out, port)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
    hang = [process for process in both if process.exitcode is None]
    for process in hang:
        process.kill()
    assert not hang and [process.exitcode for process in both] == [0, 0]
    return out


@pytest.fixture
def double():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", PARTS)
def test_they_train_what_one_trains(together, backbone, tmp_path, double, name):
    found, records, scores = torch.load(together / f"{name}-0.pt", weights_only=False)
    other = torch.load(together / f"{name}-1.pt", weights_only=False)
    assert all(torch.equal(found[each], other[0][each]) for each in found) and scores == other[2]
    assert [record | {"seconds": 0} for record in records] == [record | {"seconds": 0} for record in other[1]]
    if name == "tokens":  # each process has a budget of its own
        assert len({record["loss"] for record in records}) == len(records) and records[-1]["epoch"] == 1
        return
    made = in_double(backbone, tmp_path / "run", 1, **cases()[name])
    made.train()
    assert len(records) == len(made.records) == PARTS[name]
    for ours, theirs in zip(made.records, records, strict=True):
        assert ours.keys() == theirs.keys()
        for part in ours.keys() - {"seconds"}:
            assert theirs[part] == pytest.approx(ours[part], rel=1e-7), part
    for each, tensor in made.learner.trained().items():
        torch.testing.assert_close(found[each], tensor, rtol=1e-6, atol=1e-8, msg=each)
    if scores:
        assert made.evaluate() == pytest.approx(scores)


def test_one_of_them_writes(together):
    for name in PARTS:
        records = torch.load(together / f"{name}-0.pt", weights_only=False)[1]
        assert written(together / name) == [record | {"seconds": 0} for record in records]
        files = {file.name for file in (together / name).iterdir()}
        assert {"run.json", "trained.safetensors", "summary.json", "curves.png"} <= files
        assert not [file for file in files if file.startswith(".")]
    about = json.loads((together / "alone" / "run.json").read_text())
    assert about["arguments"]["world_size"] == 2
    checkpoint = next((together / "alone").glob("checkpoint-*"))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in checkpoint.iterdir()}


def test_pairs_that_are_too_few_for_the_form_of_the_task(together):
    (found, records, _), (other, again, _) = (torch.load(together / f"form-{n}.pt", weights_only=False) for n in (0, 1))
    assert all(torch.equal(found[each], other[each]) for each in found)
    losses = [record["alignment"] for record in records]
    assert len(records) == len(again) == 9 and min(losses) == 0 < max(losses)  # of one sentence there are two pairs


def test_both_stop_where_one_is_told_to(together):
    assert [torch.load(together / f"stopped-{n}.pt") for n in (0, 1)] == [(True, 10, True)] * 2
    assert written(together / "stopped") == written(together / "whole")
    assert summary(together / "stopped")["steps"] == 15  # one of them of alignment alone
