"""`pytest benchmarks` measures; result files tell hardware and versions, no names of machines or people."""

import pytest

from fastprompt.bench import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a few cases of each group, timed briefly, without memory")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable = False  # which pyproject.toml sets for the tests
    machine.keep_freed_memory()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.clear()
    machine_info |= machine.describe("cpu") | machine.state("cpu")


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    output_json["commit_info"] = {"id": output_json.get("commit_info", {}).get("id")}
