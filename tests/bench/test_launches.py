"""What a layer launches, counted: at most 0.6 of what PEFT launches, where a fused operator is there for each part."""

import pytest
import torch

from fastprompt.bench import launches


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_layer(family, kind, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("triton")
    monkeypatch.setattr(launches, "DEPTHS", (1, 2))
    monkeypatch.setattr(launches, "_seconds", lambda *_: {})
    counted = {}
    for way in launches.WAYS:
        few, many = (launches._launches(family, kind, way, depth) for depth in launches.DEPTHS)
        counted[way] = launches._per_layer(few, many).both
    assert 0 < counted["ours"] <= 0.6 * counted["peft"]
    assert 0 < counted["ours, on a GPU"] <= 0.6 * counted["peft"]


def test_it_counts_kernels_alone():
    x = torch.randn(4, 6, requires_grad=True)
    with launches.Launches() as counted:
        y = torch.nn.functional.linear(x.view(2, 12).detach()[:, :6].t().reshape(2, 6), torch.empty(3, 6))
        y.new_empty(3).copy_(torch.zeros(3))
    assert counted.count == 4  # a copy that is not contiguous, a product, zeros and a copy


def test_the_table():
    cost, row = launches.Cost, launches.Row
    rows = [
        row("llama", "prefix", "peft", cost(40, 60), cost(3, 4), cost(200, 300)),
        row("llama", "prefix", "ours", cost(10, 30), cost(1, 1), cost(100, 150)),
        row("llama", "prefix", "ours, on a GPU", cost(40, 50), cost(1, 1), None),
    ]
    lines = launches.table(rows).splitlines()
    assert lines[3] == "| llama | prefix | ours | 10.0 30.0 40.0 | 0.40 | 2 | 100 150 250 | 0.50 |"
    assert lines[4].endswith("| 40.0 50.0 90.0 | 0.90 | 2 |  |  |")
