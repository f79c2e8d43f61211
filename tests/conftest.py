"""Fixtures and marks for all tests."""

import hashlib
import random

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", default="0", help="of the random inputs; 'fresh' draws one and prints it")
    parser.addoption("--fuzz-seconds", default="60", help="for all of tests/fuzz together")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed == "fresh":
        config.option.seed = str(random.SystemRandom().randrange(2**32))  # an option: the workers of -n inherit it


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed of the random inputs: {config.option.seed}"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """A failure can be repeated: what a test draws depends on its name and --seed, not on what ran before it."""
    digest = hashlib.sha256(f"{request.config.option.seed} {request.node.nodeid}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]))
    random.seed(digest)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device type there are kernels for."""
    return request.param
