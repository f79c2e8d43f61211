"""The folder of a run: what it was asked, what it trained, and how it went."""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastprompt import tasks
from fastprompt._card import CARD
from fastprompt._extras import require
from fastprompt._files import CHECKSUM, check_json, check_known, read_json, write_aside, write_json, write_text
from fastprompt._measure import peak_memory_mb, seconds_per_step
from fastprompt._version import __version__
from fastprompt.models import PromptModel
from fastprompt.models.checkpoint import CONFIG as ADAPTER
from fastprompt.models.checkpoint import read
from fastprompt.models.load import load_backbone
from fastprompt.models.methods import AdapterConfig
from fastprompt.models.packed import PackedBackbone
from fastprompt.tasks.base import InputConfig, Task

from .alignment import AlignmentConfig
from .learner import TRAINED, Learner

RUN, METRICS, CURVES, SUMMARY = "run.json", "metrics.jsonl", "curves.png", "summary.json"
CHECKPOINT = "checkpoint-"
LOG = logging.getLogger("fastprompt")
_VERSION = 2


@dataclass(frozen=True)
class RunInfo:
    """What run.json says: all that makes the learner again.

    Attributes:
        backbone: "name" (a folder, or a name on the hub), "dtype" and "quantization", as `load_backbone` takes them.
        adapter, inputs, alignment: the learner's configurations.
        task: "name" and "settings" of the task; None: there is the alignment alone.
        arguments: the training's arguments that decide its result.
        data: how the command line was given its data, for a run that goes on; None from Python.
        content: digests of the data and of the backbone.
        counts: how many examples and pairs were given, and how many of them are used.
        language: the language of the data that is scored.
    """

    backbone: dict[str, Any]
    adapter: AdapterConfig
    inputs: InputConfig
    task: dict[str, Any] | None = None
    alignment: AlignmentConfig | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    content: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    language: str = "en"

    def new_task(self, kind: type[Task] | None = None) -> Task | None:
        """The run's task, not yet built; None for a run without one.

        Args:
            kind: its class, where it is not one of `fastprompt.tasks.NAMES`.

        Raises:
            ValueError: it is not one of these, and `kind` is None.
        """
        if self.task is None:
            return None
        name, settings = self.task["name"], self.task["settings"]
        if kind is not None:
            return kind(**settings)
        if name not in tasks.NAMES:
            raise ValueError(f"task must be the class of the run's own task {name!r}, got None")
        return tasks.get(name, **settings)

    def plain(self) -> dict[str, Any]:
        """Its fields as values of JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def write_run(folder: Path, info: RunInfo) -> None:
    """Write run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN, {"version": _VERSION, "fastprompt": __version__} | info.plain())


def read_run(folder: str | Path) -> RunInfo:
    """What run.json in a folder says.

    Raises:
        FileNotFoundError, ValueError: it is not there, is damaged, or is of another version.
    """
    file = Path(folder) / RUN
    if not file.is_file():
        raise FileNotFoundError(f"{folder} must be the folder of a run, {RUN} is not there")
    about = read_json(file)
    check_json(file, about)
    if about.get("version") != _VERSION:
        raise ValueError(f"{file} must be of version {_VERSION}, got {about.get('version', 1)}: train it again")
    about = {name: value for name, value in about.items() if name not in ("version", "fastprompt", CHECKSUM)}
    check_known(file, about, {each.name for each in dataclasses.fields(RunInfo)})
    kinds = {"adapter": AdapterConfig, "inputs": InputConfig, "alignment": AlignmentConfig}
    for name, kind in kinds.items():
        if about.get(name) is not None:
            check_known(file, about[name], {each.name for each in dataclasses.fields(kind)})
            about[name] = kind(**about[name])
    return RunInfo(**about)


def check_same(before: RunInfo, now: RunInfo, folder: Path) -> None:
    """Raise a ValueError unless a run that is to go on is the run before; it may be longer, and its backbone's folder
    may have moved.
    """
    may_differ = (("arguments", "num_train_epochs"), ("arguments", "max_steps"), ("backbone", "name"))
    for part in ("backbone", "adapter", "inputs", "task", "alignment", "arguments", "content"):
        old, new = (_flat(part, each.plain()[part]) for each in (before, now))
        for name in dict.fromkeys([*old, *new]):  # the data before the backbone, of which its words are read
            if old.get(name) != new.get(name) and (part, name) not in may_differ:
                whole = f"{part} {name}" if part in ("backbone", "task", "alignment") else name
                raise ValueError(
                    f"{whole} must be as in the run to resume in {folder}: {old.get(name)!r}, got {new.get(name)!r}"
                )


def _flat(name: str, value: Any) -> dict[str, Any]:
    return value if isinstance(value, Mapping) else {name: value}


def load_learner(
    folder: str | Path,
    *,
    backbone: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    task: type[Task] | None = None,
) -> Learner:
    """What a run trained, ready to predict. A folder that PEFT wrote works too, without a task and a projection.

    Of a run that was killed its last checkpoint is read, and a warning says so.

    Args:
        folder: the run's folder, or one of its checkpoints.
        backbone: the backbone's folder, or its name on the hub, where it is no longer the one that the run knows.
        device: where the backbone goes; None: a GPU where there is one.
        dtype: the dtype of its weights, as `load_backbone` takes it; None: the run's.
        task: the class of the run's task, where it is not one of `fastprompt.tasks.NAMES`.

    Raises:
        FileNotFoundError, ValueError: it is not there, is damaged, or does not fit the backbone.
    """
    folder = Path(folder)
    home = home_of(folder)
    if home is None and (folder / TRAINED).is_file():
        raise FileNotFoundError(f"{folder} must hold {RUN}, of the run that wrote its {TRAINED}: it is not there")
    if home is None and (folder / ADAPTER).is_file():
        return _load_adapter(folder, backbone, device, dtype)
    home = home or folder
    info, place = read_run(home), folder
    if not (place / TRAINED).is_file():
        place = last_checkpoint(home)
        if place is None:
            raise FileNotFoundError(
                f"{folder} holds nothing that was trained: the run ended before its first checkpoint"
            )
        LOG.warning("%s was not finished: what %s holds is taken", folder, place.name)
    name = backbone or info.backbone["name"]
    if not name:
        raise ValueError(f"backbone must be given for {folder}, which was trained on a model without a name")
    loaded = load_backbone(
        name,
        device,
        dtype=dtype or info.backbone["dtype"],
        quantization=info.backbone["quantization"],
        head="none" if info.task is None else "auto",
    )
    learner = Learner(*loaded, info.adapter, info.inputs, info.new_task(task), info.alignment)
    learner.load(place)
    return learner


def home_of(folder: Path) -> Path | None:
    """The folder of the run that is in `folder`, or of which it is a checkpoint; None: there is no run."""
    places = (folder, folder.parent) if folder.name.startswith(CHECKPOINT) else (folder,)
    return next((each for each in places if (each / RUN).is_file()), None)


def _load_adapter(folder: Path, backbone: str | None, device, dtype: str | None) -> Learner:
    """A prompt that PEFT, or `PromptModel.save_pretrained`, wrote."""
    name = backbone or read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"backbone must be given for {folder}, whose {ADAPTER} does not name one")
    loaded = load_backbone(name, device, dtype=dtype or "float32", head="auto")
    config = read(folder).config
    adapter = AdapterConfig(
        method=config.kind,
        num_virtual_tokens=config.num_virtual_tokens,
        layers=config.layers,
        position_offset=config.position_offset,
        adapter_size=config.adapter_size,
    )
    room = PackedBackbone(loaded[0]).geometry.positions
    longest = InputConfig.max_length if room is None else min(InputConfig.max_length, room - config.num_virtual_tokens)
    learner = Learner(*loaded, adapter, InputConfig(max_length=longest))
    prompted = PromptModel.from_pretrained(learner.backbone, folder)
    learner.adapted.prompted = prompted.to(learner.device).requires_grad_(False)
    return learner


def check_empty(folder: Path) -> None:
    """Raise a FileExistsError where a new run would write over, or later take for its own, what is there."""
    if (folder / RUN).exists():
        raise FileExistsError(f"output_dir {folder} holds a run already: resume it, or choose another folder")
    found = [name for name in (METRICS, CURVES, SUMMARY, CARD, TRAINED, ADAPTER) if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob(CHECKPOINT + "*"))
    if found:
        raise FileExistsError(f"output_dir {folder} holds {', '.join(found)}, and no run: choose another folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process alone, until the end or the process's.

    A lock of the operating system on the folder itself: none is left behind, and no file. Where there are no such locks
    (on some network folders), nothing is held.

    Raises:
        FileExistsError: another process, or another Trainer of this one, holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"output_dir {folder} is being written by a run that goes on now") from error
        except OSError:  # no locks there
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # or processes forked from this one would hold it on
    finally:
        os.close(descriptor)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder."""
    found = [
        (int(path.name.removeprefix(CHECKPOINT)), path)
        for path in folder.glob(CHECKPOINT + "*")
        if path.is_dir() and path.name.removeprefix(CHECKPOINT).isdecimal()
    ]
    return max(found)[1] if found else None


# -- how it went ------------------------------------------------------------------------------------------------------


def write_records(folder: Path, records: Sequence[dict]) -> None:
    """Write the metrics of all steps anew."""
    write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in records))


def read_records(folder: Path, step: int) -> list[dict]:
    """The metrics of the steps up to `step`; what the file has beyond them is not of the run that goes on.

    Raises:
        ValueError: there are fewer, or a line is damaged.
    """
    file, records = folder / METRICS, []
    lines = file.read_bytes().splitlines()[:step] if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is damaged: {error}") from error
    if len(records) < step:
        raise ValueError(f"{file} is damaged: it must have the {step} steps of the checkpoint, got {len(records)}")
    return records


def write_summary(folder: Path, records: Sequence[dict], planned: int, stopped: bool, more: dict) -> dict:
    """Write and return steps, done and planned, whether it was stopped, last loss, median seconds of a step, and peak
    memory in MiB; with `more`.
    """
    summary = {
        "steps": len(records),
        "planned_steps": planned,
        "stopped": stopped,
        "loss": records[-1]["loss"],
        "seconds_per_step": seconds_per_step([record["seconds"] for record in records]),
        "peak_memory_mb": peak_memory_mb(),
    } | more
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def read_scores(folder: Path) -> dict[str, float]:
    """The best score of a run's evaluations, by its name; none of a run without, or one that is not done."""
    file = folder / SUMMARY
    summary = read_json(file) if file.is_file() else {}
    return {summary["metric"]: summary["best"]} if "best" in summary else {}


def draw_curves(folder: Path, records: Sequence[dict]) -> None:
    """Write the curves: each part of the loss, step by step and averaged over a twentieth of the steps."""
    require("matplotlib", "train")
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    steps = torch.tensor([float(record["step"]) for record in records])
    width = max(1, len(steps) // 20)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for color, part in enumerate(name for name in ("alignment", "task") if name in records[-1]):
        loss = torch.tensor([record.get(part, math.nan) for record in records])  # alignment may come first
        axes.plot(steps, loss, color=f"C{color}", alpha=0.25, linewidth=0.8)
        mean = loss.unfold(0, width, 1).mean(1)
        axes.plot(steps[width - 1 :], mean, color=f"C{color}", label=f"{part} (mean of {width})")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    write_aside(folder / CURVES, lambda aside: figure.savefig(aside, dpi=120))
