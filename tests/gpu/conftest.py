"""What is here runs on a GPU; with DEVICE=cpu in the environment, as in benchmarks/on_gpu.sh, a CPU rehearses it."""

import os

import pytest

DEVICE = "cpu" if os.environ.get("DEVICE") == "cpu" else pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[DEVICE])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def gpu(device: str) -> str:
    """The device of tests that a CPU cannot rehearse."""
    if device == "cpu":
        pytest.skip("a CPU has no streams and no graphs to rehearse it with")
    return device
