"""benchmarks/on_gpu.sh: what fails costs its own case alone, and what is recorded is not done again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = """
import os, pathlib, signal, sys, time, types
from benchmarks.gpu import records, run

records.SOURCES["fake"] = ()

def fine():
    with open(os.environ["RAN"], "a") as file:
        file.write("fine ")
    return {"figure": 1.5, "process": os.getpid(), "says": "one and a half"}

def raises():
    raise ValueError("no such thing\\nand more")

def breaks():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def missing():
    raise records.NotThere("no tool")

known = dict(fine=fine, raises=raises, dies=os.abort, breaks=breaks, hangs=lambda: time.sleep(60), missing=missing)
module = types.ModuleType("benchmarks.gpu.fake")
module.cases = lambda: {name: known[name.partition("-")[0]] for name in sys.argv[2:]}
sys.modules["benchmarks.gpu.fake"] = module
if __name__ == "__main__":
    run.main("fake", sys.argv[2:])
"""
DRIVER = """
import cases, pathlib, sys, tempfile
from benchmarks.gpu import records
from benchmarks.gpu.driver import Job, Phase, run

records.SCRATCH = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1]))

def job(*names):
    return Job("fake", names, (sys.executable, cases.__file__))

sys.exit(run([
    Phase("one", 24, [job(*"fine raises dies fine-2 breaks fine-6 hangs missing fine-3".split())], case_seconds=2),
    Phase("late", 0.4, [job("hangs-2", "fine-4")]),
    Phase("side", 5, [job("fine-5"), job("dies-2"), Job("fake", ("start",), (sys.executable, "-c", "0/0"))], workers=2),
], 30))
"""


def driven(folder: Path) -> tuple[int, str, list[dict]]:
    """Exit status, screen and records of a run of the fake phases."""
    (folder / "cases.py").write_text(CASES)
    (folder / "drive.py").write_text(DRIVER)
    environment = {"OUT": f"{folder}/out", "PROGRESS": f"{folder}/progress.jsonl", "RAN": f"{folder}/ran"}
    environment = os.environ | environment | {"PYTHONPATH": str(ROOT), "DEVICE": "cpu"}
    (folder / "ran").write_text("")
    command = [sys.executable, folder / "drive.py", folder]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = (folder / "out/results.jsonl").read_text().splitlines()
    return found.returncode, found.stdout + found.stderr, [json.loads(line) for line in lines]


def test_keeps_going_and_takes_up(tmp_path):
    status, screen, records = driven(tmp_path)
    assert status == 1
    fine = {"fine", "fine-2", "fine-3", "fine-5", "fine-6"}
    processes = {record["case"]: record["process"] for record in records if record.get("figure") == 1.5}
    assert set(processes) == fine and processes["fine-2"] != processes["fine-6"]  # what broke the device is between
    errors = {record["case"]: record["error"] for record in records if "error" in record}
    assert set(errors) == {"raises", "dies", "breaks", "hangs", "hangs-2", "dies-2", "start"}
    assert errors["raises"] == "ValueError: no such thing"
    assert "SIGABRT" in errors["dies"] and "stopped after 2 s" in errors["hangs"]
    assert "limit" in errors["hangs-2"] and "ZeroDivisionError" in errors["start"]
    assert [record["missing"] for record in records if record["case"] == "missing"] == ["no tool"]
    assert len(records) == len({record["case"] for record in records}) == 13  # each once, however often it restarted
    for shown in ("fine: one and a half", "FAILED dies-2: ", "not there: no tool", "1 had no turn: fine-4"):
        assert shown in screen.partition("== summary")[2]
    assert len([file for file in (tmp_path / "out").rglob("*") if file.is_file()]) <= 8
    assert "ZeroDivisionError" in (tmp_path / "out/log.txt").read_text()
    assert (tmp_path / "ran").read_text().split() == ["fine"] * 5

    # Committed, in another folder and after a line that was cut short, these records spare what they hold.
    (tmp_path / "progress.jsonl").write_text((tmp_path / "out/results.jsonl").read_text() + '{"phase": "fa')
    (tmp_path / "out/results.jsonl").unlink()
    _, screen, records = driven(tmp_path)
    assert not fine & {record["case"] for record in records} and {"dies", "missing"} <= {r["case"] for r in records}
    assert "fine: one and a half" in screen


@pytest.fixture
def gpu(monkeypatch):
    """The modules of benchmarks/gpu that need the standard library alone."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu import natives, records

    return natives, records


def test_sources(gpu, monkeypatch, tmp_path):
    _, records = gpu
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setitem(records.SOURCES, "tiles", ("ops",))

    def now() -> str:
        records.sources.cache_clear()
        return records.sources("tiles")

    for name, place in {"__file__": "records.py", "OUT": "", "PROGRESS": "results.jsonl"}.items():
        monkeypatch.setattr(records, name, type(getattr(records, name))(tmp_path / place))
    (tmp_path / "ops").mkdir()
    (tmp_path / "tiles.py").write_text("x = 1")
    hashes = [now()]
    records.Records("tiles").add("one", figure=1)
    assert records.Records("tiles").held("one") and not records.Records("tiles").held("two")
    for name, text in (("ops/a.py", "a"), ("ops/a.py", "b"), ("ops/c.cuh", "b"), ("tiles.py", "x = 2")):
        (tmp_path / name).write_text(text)
        hashes.append(now())
    (tmp_path / "ops/notes.md").write_text("no source")
    assert len(set(hashes)) == 5 and now() == hashes[-1]
    assert not records.Records("tiles").held("one")
    records.sources.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_natives_import_what_torch_exports(gpu, monkeypatch, tmp_path, device):
    natives, _ = gpu
    library = ROOT / f"fastprompt/_C_{device}.so"
    if not library.exists():
        pytest.skip("it is not built")
    assert natives.foreign(library) == []
    fewer = tmp_path / "symbols.txt"
    fewer.write_text(natives.EXPORTED.read_text().replace("torch_call_dispatcher", ""))
    monkeypatch.setattr(natives, "EXPORTED", fewer)
    assert natives.foreign(library) == ["torch_call_dispatcher"]


def test_each_kind_of_test_has_its_turn(gpu):
    """The order is always the same, and begins with all of tests/gpu and one test of each function and backend."""
    from benchmarks.gpu.pytest_records import in_turns

    first = [f"tests/gpu/test_a.py::test[{n}]" for n in range(9)]
    kinds = [f"tests/ops/test_{n}.py::test" for n in "abc"]
    tests = [f"{kind}[{backend}-{n}]" for kind in kinds for backend in ("native", "triton") for n in range(50)]
    found = in_turns(tests + first)
    assert found == in_turns(first + tests[::-1]) and sorted(found) == sorted(tests + first)
    assert set(found[:9]) == set(first)
    assert {test.rpartition("-")[0] for test in found[9:15]} == {test.rpartition("-")[0] for test in tests}


def test_suite_is_recorded_and_outlives_a_broken_device(tmp_path):
    """Under pytest-xdist the worker whose device is broken is replaced."""
    (tmp_path / "test_few.py").write_text(
        "def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pass\n"
        "def test_d(): raise RuntimeError('CUDA error: unspecified launch failure')\n"
    )
    (tmp_path / "test_lost.py").write_text("import nowhere_to_be_found")
    out = tmp_path / "out"
    out.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "OUT": str(out), "PROGRESS": "/nowhere", "RUN": "1", "DEVICE": "cpu"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # Without what the workers of an outer pytest-xdist are told.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.pytest_records", "-p", "xdist", "-n", "1"]
    command += [
        "--continue-on-collection-errors",
        "--max-worker-restart",
        "9",
        "--rootdir",
        tmp_path,
        "-p",
        "no:cacheprovider",
        tmp_path,
    ]
    screen = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    passed = [name for record in records for name in record.get("passed", ())]
    assert len(passed) == len(set(passed)) == 2, screen.stdout
    assert "[gw0] node down" in screen.stdout
    assert {"test_few.py::test_b", "test_few.py::test_d"} <= {record["case"] for record in records}
    assert [record["case"] for record in records if "missing" in record] == ["test_lost.py"]
    command[-1:] = ["-n", "0", "--collect-only", tmp_path]
    screen = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "2 deselected" in screen.stdout, screen.stdout


@pytest.mark.skipif(not (ROOT / "fastprompt/_C_cpu.so").exists(), reason="it would build the native library")
def test_rehearsal(tmp_path):
    environment = {"DEVICE": "cpu", "OUT": str(tmp_path), "PROGRESS": "/nowhere", "PYTHON": sys.executable}
    command = [ROOT / "benchmarks/on_gpu.sh", "info", "sanitize"]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)
    assert "natives: loaded as they were brought" in found.stdout and found.returncode == 0, found.stdout
    assert "not there: ncu needs a GPU" in found.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"results.jsonl", "log.txt", "summary.txt"}
    found = subprocess.run([command[0], "nothing"], env=os.environ | environment, capture_output=True, text=True)
    assert found.returncode == 2 and "unknown phase: nothing" in found.stderr
