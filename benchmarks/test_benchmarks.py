"""Every case of `fastprompt bench` under pytest-benchmark.

    python -m pytest benchmarks [--quick] [-k attention] [--benchmark-json=FILE]

pytest-benchmark's own table times our way alone; the comparison, ways in turns, is in `extra_info`. A case with wrong
numbers fails.
"""

import pytest
import torch

from fastprompt.bench.case import OURS, Case, dtype_of
from fastprompt.bench.registry import cases
from fastprompt.bench.run import measure

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
pytestmark = pytest.mark.timeout(0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_case(benchmark, case: Case, device: str, request: pytest.FixtureRequest) -> None:
    quick = request.config.option.quick
    if quick and not case.quick:
        pytest.skip("not among the quick ones")
    record = measure(case, device, budget=0.5 if quick else 3.0, memory=not quick)
    assert not record["wrong"]
    benchmark.group = case.group
    benchmark.extra_info |= record
    benchmark.pedantic(case.make(device, dtype_of(device), 0).ways[OURS], rounds=3, warmup_rounds=1)
