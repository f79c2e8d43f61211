"""Runs the phases of benchmarks/on_gpu.sh, each in processes of its own, and prints what came of them.

Every phase gets its share of the time that is left, so that what one spares, or finds held already, the later ones
have. A process that dies, hangs or breaks the device costs its case: the cases after it run in a new one.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from . import records, summary

BROKEN = 75  # as in run.py, which is not imported: it is for processes that may break


class Job(NamedTuple):
    """Cases that share a process; the command takes their names."""

    phase: str
    cases: tuple[str, ...] = ()  # none: all of the phase
    command: tuple[str, ...] = (sys.executable, "-m", "benchmarks.gpu.run")


@dataclass
class Phase:
    """Jobs that run side by side, `workers` at a time.

    Attributes:
        seconds: its share of LIMIT.
        case_seconds: after which one case is stopped.
    """

    name: str
    seconds: float
    jobs: Sequence[Job]
    workers: int = 1
    case_seconds: float = 60.0


def phases() -> list[Phase]:
    from . import compile, sanitize, smoke

    def each(phase: str, names: Sequence[str]) -> list[Job]:
        held = records.Records(phase)
        return [Job(phase, (name,)) for name in names if not held.held(name)]

    cpu = records.DEVICE == "cpu"
    workers = max(2, (os.cpu_count() or 2) - 2)
    tests = [Job("tests"), *([] if cpu else [Job("compile", (name,)) for name in compile.PARTS])]
    return [
        Phase("info", 150, [Job("info")], case_seconds=150),  # it may have to build
        # One process on a CPU, where importing takes longer than the rest.
        Phase("smoke", 100 if cpu else 40, [Job("smoke")] if cpu else each("smoke", list(smoke.CASES)), workers),
        Phase("tests", 120, tests, len(tests), 600),
        Phase("attention", 140, [Job("attention")], case_seconds=45),
        Phase("steps", 100, [Job("steps")], case_seconds=45),
        Phase("tiles", 55, [Job("tiles")], case_seconds=30),
        Phase("sanitize", 60, each("sanitize", list(sanitize.CASES)), workers),
    ]


@dataclass
class Running:
    """A process and the note it keeps of its cases (run.note)."""

    job: Job
    process: subprocess.Popen
    log: Path
    state: Path
    begin: float = field(default_factory=time.time)

    @property
    def noted(self) -> dict:
        try:
            return json.loads(self.state.read_text())
        except (OSError, ValueError):
            return {"todo": None, "since": self.begin}  # it is still importing

    def kill(self) -> None:
        """It and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


class Driver:
    def __init__(self, limit: float) -> None:
        self.end = time.time() + limit
        self.run = time.strftime("%Y%m%d-%H%M%S")
        self.running: list[Running] = []
        self.left: dict[str, list[str]] = {}  # of each phase, the cases that had no turn
        self.started = 0
        records.OUT.mkdir(parents=True, exist_ok=True)
        os.environ |= {"RUN": self.run, "CARD": _card(), "OUT": str(records.OUT)}

    def all(self, phases: Sequence[Phase]) -> None:
        for n, phase in enumerate(phases):
            share = phase.seconds / sum(each.seconds for each in phases[n:])
            # What is left of a second is for the summary.
            self.phase(phase, time.time() + max(0.0, self.end - time.time() - 1) * share)

    def phase(self, phase: Phase, deadline: float) -> None:
        print(f"== {phase.name}: {len(phase.jobs)} jobs, {deadline - time.time():.0f} s", flush=True)
        begin, waiting = time.time(), list(phase.jobs)
        try:
            while (waiting or self.running) and time.time() < deadline:
                while waiting and len(self.running) < phase.workers:
                    self.running.append(self.start(waiting.pop(0), deadline))
                time.sleep(0.05)
                for running in list(self.running):
                    if self.ended(running, phase):
                        self.running.remove(running)
                        self.keep_log(running)
                        if self.goes_on(running):
                            waiting.append(running.job)
            for running in self.running:
                running.kill()
                self.lost(running, f"stopped at the phase's limit, {time.time() - begin:.0f} s")
                todo = running.noted["todo"]
                self.left.setdefault(running.job.phase, []).extend((running.job.cases if todo is None else todo)[1:])
            for job in waiting:
                self.left.setdefault(job.phase, []).extend(job.cases or ["all"])
        finally:
            for running in self.running:
                running.kill()
                self.keep_log(running)
            self.running.clear()
        print(f"== {phase.name}: {time.time() - begin:.0f} s", flush=True)

    def start(self, job: Job, deadline: float) -> Running:
        self.started += 1
        stem = records.SCRATCH / f"{self.started}-{job.phase}"
        log, state = stem.with_suffix(".log"), stem.with_suffix(".json")
        environment = os.environ | {"STATE": str(state), "DEADLINE": str(deadline)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*job.command, job.phase, *job.cases],
                cwd=records.ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to be stopped as one
            )
        return Running(job, process, log, state)

    def ended(self, running: Running, phase: Phase) -> bool:
        """Whether it is over, by itself or because a case took too long."""
        status = running.process.poll()
        if status is None:
            if time.time() - running.noted["since"] < phase.case_seconds:
                return False
            running.kill()
            self.lost(running, f"stopped after {phase.case_seconds:.0f} s")
            return True
        running.kill()  # what it left running
        if status not in (0, BROKEN):
            self.lost(running, f"died of {_cause(status)}: {_last_line(running.log)}")
        return True

    def lost(self, running: Running, why: str) -> None:
        """Record the case that ran, or that the process did not come so far."""
        todo = running.noted["todo"]
        if todo == []:
            return  # it was on its way out
        seconds = round(time.time() - running.noted["since"], 1)
        case = todo[0] if todo else running.job.cases[0] if running.job.cases else "start"
        known = records.Records(running.job.phase)
        if not any(each["case"] == case and each["run"] == self.run for each in known.known):  # recorded just before
            known.add(case, seconds=seconds, error=why)

    def goes_on(self, running: Running) -> bool:
        """Whether cases are left to a new process: each has begun one, or it would never end."""
        todo = running.noted["todo"]
        return bool(todo) and (len(todo) > 1 or running.process.returncode == BROKEN)

    def keep_log(self, running: Running) -> None:
        text = running.log.read_bytes()
        if len(text) > 200_000:
            text = text[:100_000] + b"\n...\n" + text[-100_000:]
        with (records.OUT / "log.txt").open("ab") as log:
            log.write(f"== {self.run} {running.job.phase} {' '.join(running.job.cases)}\n".encode() + text + b"\n")


def _card() -> str:
    if records.DEVICE == "cpu":
        return "cpu"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_bytes()[-4000:].decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def run(chosen: Sequence[Phase], limit: float) -> int:
    """Run the phases and print the summary; the exit status."""
    driver = Driver(limit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is stopped
    begin = time.time()
    try:
        driver.all(chosen)
    finally:
        text, failed = summary.of(driver.run, [job.phase for phase in chosen for job in phase.jobs], driver.left)
        text += f"\n{time.time() - begin:.0f} s of {limit:.0f}; records, log and this in {records.OUT}"
        (records.OUT / "summary.txt").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
    return 1 if failed else 0


def main(names: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="on_gpu-", ignore_cleanup_errors=True) as folder:
        records.SCRATCH = Path(folder)
        shared = {
            "SCRATCH": folder,
            "DEVICE": records.DEVICE,
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FASTPROMPT_CACHE"):
            shared.setdefault(name, os.environ.get(name) or f"{folder}/{name.lower()}")
        if records.DEVICE == "cpu":
            shared |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.environ |= shared
        known = {phase.name: phase for phase in phases()}
        if unknown := [name for name in names if name not in known]:
            print(f"unknown phase: {' '.join(unknown)} (must be of {' '.join(known)})", file=sys.stderr)
            return 2
        chosen = [phase for name, phase in known.items() if name in names or not names]
        return run(chosen, float(os.environ.get("LIMIT") or (300 if records.DEVICE == "cpu" else 540)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
