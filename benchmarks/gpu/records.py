"""The records: a JSON object a line, written as soon as it is known.

    {"phase", "case", "card", "sources": hash of the files its figures depend on, "run": when the run began,
     "seconds": that the case took, and its figures}

An "error" is its first line; "missing" says what is not there; "partial" is true where more is left to do. One with any
of these is not held: another run tries again. "says" is for the summary.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("DEVICE", "cuda")
RESULTS = ROOT / "benchmarks/results/gpu"
OUT = Path(os.environ.get("OUT") or (RESULTS if DEVICE == "cuda" else ROOT / "build/on_gpu")).absolute()
PROGRESS = Path(os.environ.get("PROGRESS") or RESULTS / "results.jsonl").absolute()
SCRATCH = Path(os.environ.get("SCRATCH", "/tmp"))  # of this run, not among the results
# What the figures of a phase depend on, beside its own file.
OPERATORS = ("csrc", "setup.py", "fastprompt/ops", "fastprompt/_native.py")
PACKAGE = (*OPERATORS, "fastprompt/nn", "fastprompt/models")
SOURCES = {
    "smoke": PACKAGE,
    "tests": (*PACKAGE, "tests"),
    "attention": (*OPERATORS, "fastprompt/bench"),
    "steps": PACKAGE,
    "tiles": ("fastprompt/ops",),
    "sanitize": PACKAGE,
}


class NotThere(Exception):
    """What a case needs is not on this machine."""


@cache
def sources(phase: str) -> str:
    """A hash of the files that the phase's figures depend on."""
    paths = [ROOT / name for name in SOURCES.get(phase, ())]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    files += [Path(__file__).with_name(f"{phase}.py")]
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file() and file.suffix in kinds):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def read(file: Path) -> Iterator[dict]:
    """The records of a file; a line that was cut short is none."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            print(f"{file}: no record: {line[:80]}", file=sys.stderr)


class Records:
    """Those of one phase, of this card and these sources."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.key = {"phase": phase, "card": os.environ.get("CARD", DEVICE), "sources": sources(phase)}
        self.run = os.environ.get("RUN", "")
        known = [*read(PROGRESS), *(read(OUT / "results.jsonl") if OUT / "results.jsonl" != PROGRESS else ())]
        self.known = [record for record in known if all(record.get(name) == self.key[name] for name in self.key)]

    def held(self, case: str) -> bool:
        """Whether its figures are there. What depends on no sources is of this machine, and always taken."""
        return self.phase in SOURCES and any(
            each["case"] == case and not {"error", "missing", "partial"} & set(each) for each in self.known
        )

    def todo(self, cases: list[str]) -> list[str]:
        """Those without figures that this run has not tried; what failed before comes last."""
        tried = {record["case"] for record in self.known if record.get("run") == self.run}
        failed = {record["case"] for record in self.known}
        return sorted((case for case in cases if not self.held(case) and case not in tried), key=failed.__contains__)

    def add(self, case: str, **figures) -> None:
        record = {**self.key, "case": case, "run": self.run, **figures}
        self.known.append(record)
        # One write at the end of the file: several processes share it.
        line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
        handle = os.open(OUT / "results.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
