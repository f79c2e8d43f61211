"""The settings of a run: what was given on the command line, what a file says, what a run's folder holds."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from fastprompt._settings import ALIASES, ALIGNMENT, RENAMED, check_fields, did_you_mean, read_value, read_yaml, setting

from .options import declared_by, declared_in, parse


@dataclass(frozen=True)
class Places:
    """Where a run's model and data come from, and where it goes."""

    backbone: str | None = setting(None, "Folder of a model, or its name on the hub.", basic=True)
    out: str | None = setting(None, "Folder of the run.", basic=True)
    dtype: str = setting("float32", "Of its weights.", choices=("float32", "bfloat16", "float16", "auto"))
    quantization: str | None = setting(None, "Of its weights, by bitsandbytes.", choices=("4bit", "8bit"))
    task: str | None = setting(None, "What to learn: classification, tagging, qa, generation, retrieval.", basic=True)
    train: str | None = setting(None, "Labelled examples: a file, a folder, or a name on the hub.", basic=True)
    validation: str | None = setting(None, "The same to choose the best checkpoint by.", basic=True)
    columns: dict[str, str] | None = setting(None, "Your columns: text=review,label=stars.", basic=True)
    train_split: str | None = setting(None, "Split of --train, or of --data; a slice may follow: train[:1000].")
    validation_split: str | None = setting(None, "Split of --validation, or else of what --train or --data names.")
    language: str = setting("en", "Of the examples.", basic=True)
    examples: int | None = setting(None, "Train on that many examples, drawn by --seed.", basic=True)
    data: str | None = setting(None, "With --task xquad, mlqa or pawsx: its folder, or its name on the hub.")
    task_settings: dict | None = setting(None, "Settings of the task: problem=multi,answers=head,...")
    parallel: str | None = setting(None, "A file of translations: English, tab, translation; or .po.", basic=True)
    parallel_target: str | None = setting(None, "The translations, where --parallel is English alone, line by line.")
    third_column: str | None = setting(None, "What a third column of --parallel is.", choices=("label", "ignore"))
    parallel_columns: dict[str, str] | None = setting(None, "Your columns: source=english,target=yoruba.")
    validation_parallel: str | None = setting(None, "Translations to score the alignment by.")


_MODEL = ("backbone", "out", "dtype", "quantization")
_DATA = tuple(each.name for each in fields(Places) if each.name not in _MODEL)
# Of TrainingArguments, those with an option of their own; the others through --set.
_TRAINING = ("per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "weights_learning_rate")
_TRAINING += ("head_learning_rate", "projection_learning_rate", "warmup_ratio", "lr_scheduler_type", "weight_decay")
_TRAINING += ("gradient_accumulation_steps", "max_tokens", "static_shapes", "cache_layers", "eval_strategy")
_TRAINING += ("eval_steps", "save_strategy", "save_steps", "load_best_model_at_end", "early_stopping_patience")
_TRAINING += ("bf16", "gradient_checkpointing", "report_to", "seed", "dataloader_num_workers")

_MAY_DIFFER = ("out", "num_train_epochs", "max_steps")  # of a run that goes on: it may be longer
_NO_SETTINGS = ("config", "resume", "device", "debug")  # of the command line alone


def options() -> list:
    """All settings that are options of `train`."""
    training = {each.name: each for each in declared_in("training/arguments.py", "TrainingArguments", "Training")}
    return [
        *declared_by(Places, {"Model and output": _MODEL, "Data": _DATA}),
        *declared_in("models/methods.py", "AdapterConfig", "What trains"),
        *declared_in("tasks/base.py", "InputConfig", "Inputs"),
        *declared_in("training/alignment.py", "AlignmentConfig", "Alignment", ALIGNMENT),
        *(training[name] for name in _TRAINING),
    ]


class Plan(NamedTuple):
    """A run, as the settings have it."""

    places: Places
    adapter: Any
    inputs: Any
    alignment: Any  # None where there is no parallel text
    arguments: Any


def plan(settings: dict[str, Any]) -> Plan:
    """The dataclasses of a run, made of settings by the options' names.

    Raises:
        ValueError: naming the setting that is wrong.
    """
    from fastprompt.models.methods import AdapterConfig
    from fastprompt.tasks.base import InputConfig
    from fastprompt.training.alignment import AlignmentConfig
    from fastprompt.training.arguments import TrainingArguments

    names = {option: field for field, option in ALIGNMENT.items()}
    aligned = {names[name]: value for name, value in settings.items() if name in names}
    made = [
        kind(**check_fields(kind, {each.name: settings[each.name] for each in fields(kind) if each.name in settings}))
        for kind in (Places, AdapterConfig, InputConfig)
    ]
    places = made[0]
    parallel = places.parallel is not None
    wrong = [name for name in (*names, "parallel_target", "third_column", "parallel_columns") if name in settings]
    if wrong and not parallel:
        raise ValueError(f"{wrong[0]} must not be given without parallel")
    alignment = AlignmentConfig(**check_fields(AlignmentConfig, aligned)) if parallel else None
    return Plan(*made, alignment, _arguments(TrainingArguments, settings, places.out))


def _arguments(kind: type, settings: dict[str, Any], out: str | None):
    known = {each.name for each in fields(kind)}
    chosen = {name: settings[name] for name in _TRAINING if name in settings}
    for name, value in settings.get("set", {}).items():
        if name in _TRAINING:
            raise ValueError(f"set must not have {name}: it is an option of its own, --{name.replace('_', '-')}")
        if name in ("output_dir", "resume_from_checkpoint"):
            raise ValueError(f"set must not have {name}: --out says where the run goes, and --resume goes on with it")
        if name not in known:
            raise ValueError(f"set must have names of TrainingArguments, got {name!r}{did_you_mean(name, known)}")
        chosen[name] = value
    return kind(**check_fields(kind, chosen) | {"output_dir": out})


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, each of its type as far as that is known without the model's packages.

    Raises:
        FileNotFoundError, ValueError: naming the file and the setting.
    """
    declared = {each.name: each for each in options()}
    found: dict[str, Any] = {}
    for given, value in read_yaml(path).items():
        name = ALIASES.get(given, given)
        if name in _NO_SETTINGS:
            raise ValueError(f"{path}: {name} must be given on the command line")
        if name in RENAMED:
            raise ValueError(f"{path}: no such setting: {given}; it is now {RENAMED[name]}")
        if name not in declared and name != "set":
            raise ValueError(f"{path}: no such setting: {given}{did_you_mean(given, [*declared, *ALIASES, 'set'])}")
        if name in found:
            raise ValueError(f"{path}: {name} must be given once, got it by two names")
        if name == "set" and not isinstance(value, dict):
            raise ValueError(f"{path}: set must be names and values, got {value!r}")
        found[name] = parse(declared[name], value) if name in declared else value
    _check_types(path, found)
    return {name: value for name, value in found.items() if value is not None}


def _check_types(path: Path, found: dict[str, Any]) -> None:
    from fastprompt.models.methods import AdapterConfig
    from fastprompt.tasks.base import InputConfig
    from fastprompt.training.alignment import AlignmentConfig
    from fastprompt.training.arguments import TrainingArguments

    for kind in (Places, AdapterConfig, InputConfig, TrainingArguments):
        found |= check_fields(kind, found, f"{path}: ")
    for field, name in ALIGNMENT.items():
        if name in found:
            try:
                check_fields(AlignmentConfig, {field: found[name]})
            except ValueError as error:
                raise ValueError(f"{path}: {name}{str(error).removeprefix(field)}") from error


def from_run(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run in a folder, to go on with it; those that are given must be the same.

    Raises:
        FileNotFoundError, ValueError: there is no run, it was started from Python, or a setting differs.
    """
    from fastprompt.training.run import RUN, read_run

    if not (folder / RUN).is_file():
        raise FileNotFoundError(f"out {folder} holds no run to resume")
    run = read_run(folder)
    if run.data is None:
        raise ValueError(
            f"out {folder} holds a run that was started from Python: go on with it there, with the same data, by "
            "Trainer.train(resume_from_checkpoint=True)"
        )
    declared = {each.name: each.field.default for each in options()}
    recorded = dict(run.data)
    for name, value in given.items():
        then = recorded.get(name, declared.get(name))
        if name in _MAY_DIFFER:
            recorded[name] = value
        elif value != then:
            raise ValueError(f"{name} must be as in the run in {folder}, {then!r}, or not given, got {value!r}")
    return recorded | {"out": str(folder)}


def with_places(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with whole names of the files among them: they are found again from any folder."""
    names = ("backbone", "train", "validation", "data", "parallel", "parallel_target", "validation_parallel")
    found = dict(settings)
    for name in names:
        file, bracket, rows = str(found.get(name, "")).partition("[")  # a slice may follow
        if file and os.path.exists(file):
            found[name] = os.path.abspath(file) + bracket + rows
    return found


def pairs_of(values: list[str] | None) -> dict[str, Any]:
    """What --set name=value, given any number of times, says."""
    found: dict[str, Any] = {}
    for each in values or []:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ValueError(f"set must be a name and a value such as adam_beta2=0.99, got {each!r}")
        if name in found:
            raise ValueError(f"set must have each name once, got {name!r} twice")
        found[name] = read_value(value)
    return found
