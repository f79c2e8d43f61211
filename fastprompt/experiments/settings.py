"""RunSettings: what one run of a study is made of, by the names that the dataclasses' fields have."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastprompt._settings import ALIASES, ALIGNMENT, RENAMED, check_fields, did_you_mean
from fastprompt.models.methods import AdapterConfig
from fastprompt.tasks.base import InputConfig
from fastprompt.training import AlignmentConfig, TrainingArguments

# As the command line calls them: batch_size alone would be the task's.
_OLD = ALIASES | RENAMED
# What a study says by other means: its methods, its seeds, and the device it is run on.
_OWN = ("method", "seed", "output_dir", "resume_from_checkpoint", "use_cpu")
_KINDS = (AdapterConfig, InputConfig, TrainingArguments)


class RunSettings(NamedTuple):
    """Of one run; what is equal trains the same on the same data.

    Attributes:
        adapter, inputs: the learner's configurations.
        alignment: how parallel text is aligned, beside the task's examples or alone; None: there is none.
        arguments: arguments of `TrainingArguments`, beside the folder and the device.
    """

    adapter: AdapterConfig
    inputs: InputConfig
    alignment: AlignmentConfig | None
    arguments: dict[str, Any]

    def training(self, folder: str | Path, device: torch.device) -> TrainingArguments:
        """The arguments of a training in a folder.

        Raises:
            ValueError: a value that does not fit, or a device that a Trainer does not take.
        """
        quiet = {"disable_tqdm": True, "logging_strategy": "no"}
        args = TrainingArguments(str(folder), use_cpu=device.type == "cpu", **(quiet | self.arguments))
        if device not in (args.device, torch.device(args.device.type)):
            raise ValueError(
                f"device must be 'cpu' or {str(args.device)!r}, which a Trainer takes, got {str(device)!r}"
            )
        return args


def run_settings(given: Mapping[str, Any], own: Mapping[str, Any], *, alone: bool) -> RunSettings:
    """What one run is made of.

    Args:
        given: by the names of `AdapterConfig`, `InputConfig`, `TrainingArguments` and `AlignmentConfig`; of the latter
            as the command line has them: alignment (the weight), alignment_form, ..., distance, temperature.
        own: method and seed, by the same names.
        alone: there is the alignment alone. Else there is one where `given` has its weight.

    Raises:
        ValueError: naming a setting that is unknown, does not fit, or would not be read.
    """
    _check_names(given)
    wrong = [name for name in given if name.startswith("alignment")] if alone else []
    if wrong:
        raise ValueError(
            f"settings: {wrong[0]} must not be given for retrieval, whose pairs are all there is: "
            "per_device_train_batch_size of them a step, with weight 1"
        )
    settings = {**given, **own}
    adapter, inputs, arguments = (
        check_fields(kind, {each: settings[each] for each in _fields(kind) if each in settings}, "settings: ")
        for kind in _KINDS
    )
    aligned = {field: settings[name] for field, name in ALIGNMENT.items() if name in settings}
    alignment = AlignmentConfig(**check_fields(AlignmentConfig, aligned, "settings: alignment "))
    alignment = alignment if alone or "alignment" in given else None
    made = RunSettings(AdapterConfig(**adapter), InputConfig(**inputs), alignment, arguments)
    made.training("unused", torch.device("cpu"))
    return made


def _fields(kind: type) -> list[str]:
    return [each.name for each in dataclasses.fields(kind)]


def _check_names(given: Mapping[str, Any]) -> None:
    known = {*ALIGNMENT.values(), *(name for kind in _KINDS for name in _fields(kind))} - {*_OWN}
    for name in given:
        if name in _OLD:
            raise ValueError(f"settings: {name} is called {_OLD[name]} now")
        if name in _OWN:
            raise ValueError(f"settings must not have {name}: a study's methods and seeds say it, or its caller")
        if name not in known:
            raise ValueError(
                "settings must be of AdapterConfig, InputConfig, AlignmentConfig and TrainingArguments, "
                f"got {name!r}{did_you_mean(name, known)}"
            )
