"""The folder of a training run: what it was asked, how far it is, and how it went."""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import torch

from fastprompt._extras import require
from fastprompt._files import check_json, check_known, read_json, sync, write_aside, write_json, write_text
from fastprompt._measure import peak_memory_mb, seconds_per_step

from .config import TrainingConfig
from .task_config import TaskConfig

RUN, STATE, METRICS, CURVES, SUMMARY = "run.json", "training_state.pt", "metrics.jsonl", "curves.png", "summary.json"
_NO_COMMENT, _COMMENT = b"\x00\x00", b"\x40\x00"  # a zip archive's last field: how many bytes of comment follow
_SEAL = len(_COMMENT) + 64


class Run:
    """A run's folder, new or to be resumed.

    Args:
        folder: made if it is not there.
        config: of the run.
        content: digests of the backbone and of the sentences, which a resumed run must find unchanged.
        labels: the classes of the pairs.
        resume: go on with what the folder holds.
        counts: of what was given and what is used, for the record.

    Raises:
        FileExistsError: the folder holds a run and `resume` was not asked for.
        FileNotFoundError: there is nothing to resume.
        ValueError: what is to be resumed was another run: other settings, backbone or sentences; or a file of it is
            damaged.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainingConfig | TaskConfig,
        content: dict[str, str],
        labels: list[str],
        resume: bool,
        counts: dict[str, int] | None = None,
    ) -> None:
        self.folder, self.counts = folder, counts or {}
        self.records: list[dict] = []
        about = {"config": _plain(dataclasses.asdict(config)), "content": content, "labels": labels}
        about |= {"counts": self.counts} if self.counts else {}
        defaults = _plain(dataclasses.asdict(type(config)()))  # for settings that an older run did not know
        state = folder / STATE
        if not resume:
            if (folder / RUN).exists():
                raise FileExistsError(f"out {folder} holds a run already: resume it, or choose another folder")
            folder.mkdir(parents=True, exist_ok=True)
        else:
            if not (folder / RUN).is_file():
                raise FileNotFoundError(f"out {folder} holds no run to resume: {RUN} is not there")
            before = read_json(folder / RUN)
            check_json(folder / RUN, before)
            _check_same(before, about, defaults, folder)
        self.state = _read_state(state) if resume and state.is_file() else None
        if self.state is not None:
            self.records = _read_records(folder / METRICS, self.state)
        write_json(folder / RUN, about)
        self.write_records()

    def record(self, **metrics: float) -> None:
        """Append one step's metrics."""
        self.records.append(metrics)
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def save_state(self, step: int, tensors: dict, optimizer: dict, **more) -> None:
        """Write what a resumed run begins with: one file, so that its parts are of one step."""
        state = {"step": step, "trained": tensors, "optimizer": optimizer, **more}
        # Of all records up to this step: those that the file has beyond them are left out when it is read.
        state["metrics"] = hashlib.sha256(self._lines().encode()).hexdigest()
        sync(self.folder / METRICS)  # what the state counts on must not come after it
        write_aside(self.folder / STATE, lambda aside: _write_sealed(state, aside))

    def write_records(self) -> None:
        """Write all records anew."""
        write_text(self.folder / METRICS, self._lines())

    def _lines(self) -> str:
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def summarise(self, planned: int, stopped: bool) -> dict:
        """Write and return steps, done and planned, whether the user stopped it, last loss, median seconds of a step,
        and peak memory in MiB.
        """
        summary = {
            "steps": len(self.records),
            "planned_steps": planned,
            "stopped": stopped,
            "loss": self.records[-1]["loss"],
            "seconds_per_step": seconds_per_step([record["seconds"] for record in self.records]),
            "peak_memory_mb": peak_memory_mb(),
        } | ({"counts": self.counts} if self.counts else {})
        write_text(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary

    def draw(self) -> None:
        """Write the curves: each part of the loss, step by step and averaged over a twentieth of the steps."""
        require("matplotlib", "train")
        from matplotlib.figure import Figure  # no pyplot: no display, no global state

        steps = torch.tensor([float(record["step"]) for record in self.records])
        width = max(1, len(steps) // 20)
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for color, part in enumerate(name for name in ("alignment", "task") if name in self.records[-1]):
            loss = torch.tensor([record.get(part, math.nan) for record in self.records])  # alignment may come first
            axes.plot(steps, loss, color=f"C{color}", alpha=0.25, linewidth=0.8)
            mean = loss.unfold(0, width, 1).mean(1)
            axes.plot(steps[width - 1 :], mean, color=f"C{color}", label=f"{part} (mean of {width})")
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
        write_aside(self.folder / CURVES, lambda aside: figure.savefig(aside, dpi=120))


def read_run(folder: Path) -> dict | None:
    """ "config" (a TrainingConfig or a TaskConfig) and "labels" of a run's folder; None where there was no run."""
    file = folder / RUN
    if not file.is_file():
        return None
    about = read_json(file)
    check_json(file, about)
    missing = [name for name in ("config", "labels") if name not in about]
    if missing:
        raise ValueError(f"{file} is damaged: it has no {', '.join(missing)}")
    kind = TaskConfig if "task" in about["config"] else TrainingConfig
    check_known(file, about["config"], {field.name for field in dataclasses.fields(kind)})
    return {"config": kind(**about["config"]), "labels": about["labels"]}


def _write_sealed(state: dict, file: Path) -> None:
    """torch's file, and the SHA-256 of it as the comment that a zip archive may end with."""
    torch.save(state, file)
    digest = _sha256(file)
    with file.open("r+b") as archive:
        archive.seek(-len(_NO_COMMENT), os.SEEK_END)
        archive.write(_COMMENT + digest.encode())


def _read_state(file: Path) -> dict:
    """What a run goes on from; of what an older version wrote there is no checksum."""
    with file.open("rb") as archive:
        archive.seek(max(0, file.stat().st_size - _SEAL))
        comment, expected = archive.read(len(_COMMENT)), archive.read()
    if comment == _COMMENT:
        found = _sha256(file, without=_SEAL)
        if expected != found.encode():
            raise ValueError(f"{file} is damaged: its checksum is {expected.decode('latin-1')!r}, not {found!r}")
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # of a file that is none of its own, torch raises whatever comes, and gives advice
        raise ValueError(f"{file} is damaged, or no state of a run ({type(error).__name__})") from error


def _sha256(file: Path, without: int = 0) -> str:
    """Of an archive without a comment; `without` bytes at the end are taken for one."""
    whole, left = hashlib.sha256(), file.stat().st_size - (without or len(_NO_COMMENT))
    with file.open("rb") as archive:
        while part := archive.read(min(left, 1 << 20)):
            whole.update(part)
            left -= len(part)
    return whole.hexdigest()


def _read_records(file: Path, state: dict) -> list[dict]:
    """The records up to the state's step; what the file has beyond them was never saved."""
    step, lines = state["step"], []
    if file.is_file():
        lines = file.read_bytes().splitlines(keepends=True)[:step]
    if len(lines) < step:
        raise ValueError(f"{file} is damaged: it must have the {step} steps of {STATE} beside it, got {len(lines)}")
    found = hashlib.sha256(b"".join(lines)).hexdigest()
    if state.get("metrics", found) != found:
        raise ValueError(f"{file} is damaged: the checksum of {step} lines is {state['metrics']}, not {found}")
    return [json.loads(line) for line in lines]


def _plain(config: dict) -> dict:
    return config | {"layers": None if config["layers"] is None else list(config["layers"])}


def _check_same(before: dict, now: dict, defaults: dict, folder: Path) -> None:
    old, new = (
        {**defaults, **about["config"], **about["content"], "labels": about["labels"]} for about in (before, now)
    )
    for name in new:
        if name != "epochs" and old.get(name) != new[name]:  # more epochs are a longer run of the same kind
            raise ValueError(
                f"{name} must be as in the run to resume in {folder}: {old.get(name)!r}, got {new[name]!r}"
            )
