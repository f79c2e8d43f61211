"""The cases of one phase, in a process of their own:  python -m benchmarks.gpu.run PHASE [CASE ...]

A module of a phase has `cases()`: name -> a function that takes no argument and returns the figures to record.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from .records import NotThere, Records

BROKEN = 75  # exit status: the device is of no more use to this process
BREAKS = ("CUDA error", "illegal memory access", "device-side assert", "misaligned address", "unspecified launch")


def main(phase: str, names: list[str]) -> None:
    records = Records(phase)
    cases = importlib.import_module(f"benchmarks.gpu.{phase}").cases()
    todo = records.todo(names or list(cases))
    for n, name in enumerate(todo):
        note(todo[n:])
        begin = time.perf_counter()
        try:
            figures = cases[name]()
        except NotThere as error:
            figures = {"missing": str(error)}
        except Exception as error:  # recorded, and the next case has its turn
            traceback.print_exc()
            figures = {"error": first_line(error)}
        records.add(name, seconds=round(time.perf_counter() - begin, 3), **figures)
        print(f"{phase}/{name}: {figures}"[:2000], flush=True)
        if any(word in figures.get("error", "") for word in BREAKS):
            note(todo[n + 1 :])
            sys.stdout.flush()
            os._exit(BROKEN)  # not exit: what is destroyed then would ask the device
    note([])


def note(todo: list[str]) -> None:
    """Tell the driver what runs, since when, and what is left."""
    if file := os.environ.get("STATE"):
        aside = Path(f"{file}.new")
        aside.write_text(json.dumps({"todo": todo, "since": time.time()}))
        aside.replace(file)


def first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
