"""The folder of a training run: what it was asked, how far it is, and how it went."""

import dataclasses
import json
import math
from pathlib import Path

import torch

from fastprompt._extras import require
from fastprompt._files import write_aside, write_text
from fastprompt._measure import peak_memory_mb, seconds_per_step

from .config import TrainingConfig
from .task_config import TaskConfig

RUN, STATE, METRICS, CURVES, SUMMARY = "run.json", "training_state.pt", "metrics.jsonl", "curves.png", "summary.json"


class Run:
    """A run's folder, new or to be resumed.

    Args:
        folder: made if it is not there.
        config: of the run.
        content: digests of the backbone and of the sentences, which a resumed run must find unchanged.
        labels: the classes of the pairs.
        resume: go on with what the folder holds.

    Raises:
        FileExistsError: the folder holds a run and `resume` was not asked for.
        FileNotFoundError: there is nothing to resume.
        ValueError: what is to be resumed was another run: other settings, backbone or sentences.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainingConfig | TaskConfig,
        content: dict[str, str],
        labels: list[str],
        resume: bool,
    ) -> None:
        self.folder = folder
        self.records: list[dict] = []
        about = {"config": _plain(dataclasses.asdict(config)), "content": content, "labels": labels}
        defaults = _plain(dataclasses.asdict(type(config)()))  # for settings that an older run did not know
        state = folder / STATE
        if not resume:
            if (folder / RUN).exists():
                raise FileExistsError(f"out {folder} holds a run already: resume it, or choose another folder")
            folder.mkdir(parents=True, exist_ok=True)
        else:
            if not (folder / RUN).is_file():
                raise FileNotFoundError(f"out {folder} holds no run to resume: {RUN} is not there")
            _check_same(json.loads((folder / RUN).read_text(encoding="utf-8")), about, defaults, folder)
        write_text(folder / RUN, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        self.state = torch.load(state, weights_only=True) if resume and state.is_file() else None
        if self.state is not None:
            lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
            self.records = [json.loads(line) for line in lines[: self.state["step"]]]
        self.write_records()

    def record(self, **metrics: float) -> None:
        """Append one step's metrics."""
        self.records.append(metrics)
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def save_state(self, step: int, tensors: dict, optimizer: dict, **more) -> None:
        """Write what a resumed run begins with: one file, so that its parts are of one step."""
        state = {"step": step, "trained": tensors, "optimizer": optimizer, **more}
        write_aside(self.folder / STATE, lambda aside: torch.save(state, aside))

    def write_records(self) -> None:
        """Write all records anew."""
        write_text(self.folder / METRICS, "".join(json.dumps(record) + "\n" for record in self.records))

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
        }
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
    about = json.loads(file.read_text(encoding="utf-8"))
    config = (TaskConfig if "task" in about["config"] else TrainingConfig)(**about["config"])
    return {"config": config, "labels": about["labels"]}


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
