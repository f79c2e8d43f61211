"""What a result file tells of where it was measured: hardware and versions, no names of machines or people."""

import platform

import torch

import fastprompt


def pytest_benchmark_update_machine_info(config, machine_info: dict) -> None:
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info |= {
        "cpu": cpu.get("brand_raw", platform.machine()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastprompt": fastprompt.__version__,
    }


def pytest_benchmark_update_json(config, benchmarks: list, output_json: dict) -> None:
    output_json["commit_info"] = {"id": output_json.get("commit_info", {}).get("id")}
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
