"""What a result file tells of where it was measured: hardware and versions, no names of machines or people."""

import platform
import statistics

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
    output_json["summary"] = summary(output_json["benchmarks"])
    print(f"\n{output_json['summary']}")


def summary(benchmarks: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Geometric mean, least and most over the shapes of each test: of each ratio, and of its useful GFLOP/s."""
    values: dict[str, dict[str, list[float]]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if "ratios" not in info:
            continue
        scalars = {name: info[name] for name in ("best_rival_over_ours", "useful_gflops")}
        of_test = values.setdefault(benchmark["name"].split("[")[0], {})
        for name, value in (info["ratios"] | scalars).items():
            of_test.setdefault(name, []).append(value)
    return {
        test: {
            name: {"mean": statistics.geometric_mean(each), "least": min(each), "most": max(each)}
            for name, each in of_test.items()
        }
        for test, of_test in values.items()
    }
