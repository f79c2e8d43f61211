"""The tests that need a GPU, as many as there is time for, in an order that is always the same.

First all of tests/gpu, then one test of each function and backend, then another, ...: so each kind runs, the small
suites run whole, and a share of the large ones. Tests that passed are recorded by a hash of their names, and left out
by the next run: it takes the next share. A rehearsal runs tests/gpu, on the CPU.
"""

import os
import subprocess
import sys
import time
from importlib.util import find_spec

from .records import DEVICE, OUT, ROOT, NotThere, Records, read

WORKERS = 12


def cases() -> dict:
    return {"pytest": suite}


def suite() -> dict:
    if not find_spec("pytest"):
        raise NotThere("the package pytest is not installed")
    chosen = ["tests/gpu"] if DEVICE == "cpu" else ["tests", "-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "benchmarks.gpu.pytest_records", *chosen]
    command += ["-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "--continue-on-collection-errors"]
    if find_spec("pytest_timeout"):
        command += ["--timeout", "60", "--timeout-method", "thread"]  # a signal waits for a kernel that hangs
    if find_spec("xdist"):
        count = min(WORKERS, os.cpu_count() or 1)
        command += ["-n", str(count), "--maxschedchunk", "4", "--max-worker-restart", "30"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    seconds = float(os.environ.get("DEADLINE") or time.time() + 110) - time.time() - 5
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            process.kill()  # its workers end with it, or with this process's group
    mine = [
        each for each in read(OUT / "results.jsonl") if each["phase"] == "tests" and each["run"] == os.environ["RUN"]
    ]
    passed = sum(len(record.get("passed", ())) for record in mine)
    failed = sum("error" in record for record in mine)
    says = f"{passed} passed, {failed} failed" + ("" if status is not None else ", the rest had no time")
    nothing = status == 5 and not Records("tests").known  # else all are held
    if nothing or status not in (None, 0, 1, 5):
        raise RuntimeError(f"pytest ended with exit status {status}, after {says}")
    return {"says": says} | ({} if status in (0, 5) else {"partial": True})
