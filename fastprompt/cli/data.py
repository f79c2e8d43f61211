"""The data that the commands' options name, read."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from fastprompt.data import presets
from fastprompt.data.parallel import read_pairs
from fastprompt.data.presets import TASKS as PRESETS
from fastprompt.data.table import read_examples

from .settings import Places


class Data(NamedTuple):
    """What a run trains on and is scored by."""

    examples: list | None
    validation: list | None
    pairs: list | None
    validation_pairs: list | None


def read_data(places: Places, task) -> Data:
    """Read all that a run's settings name.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: what is missing or cannot be read; settings that do not go
            together.
    """
    _check(places)
    examples = validation = None
    if task is not None:
        read = partial(examples_in, task, columns=places.columns, language=places.language)
        source = places.train or places.data or "."
        examples = read(source, split=places.train_split or (None if _is_file(source) else "train"))
        if places.validation is not None:
            validation = read(places.validation, split=places.validation_split)
        elif places.validation_split is not None:
            validation = read(source, split=places.validation_split)
    return Data(examples, validation, *_read_pairs(places))


def _check(places: Places) -> None:
    if places.task is None:
        if places.parallel is None:
            raise ValueError("task or parallel must be given: what is to be learned?")
        of_task = ("train", "validation", "columns", "train_split", "validation_split", "examples", "data")
        for name in (*of_task, "task_settings"):
            if getattr(places, name) is not None:
                raise ValueError(f"{name} must not be given without a task: --task says which")
    elif places.task not in PRESETS and places.data is not None:
        raise ValueError(f"data is for {', '.join(PRESETS)}: the examples of {places.task} are given with --train")
    elif places.task not in PRESETS and places.train is None:
        raise ValueError(f"train must be given for the task {places.task}: a file, a folder or a dataset's name")
    if places.validation_parallel is not None and places.parallel is None:
        raise ValueError("validation_parallel must not be given without parallel")


def examples_in(task, source: str, *, split: str | None = None, columns=None, language: str = "en") -> list:
    """The examples of a file, a folder or a dataset; of a preset, in its own folder or dataset, those of a language."""
    if task.name in PRESETS and not _is_file(source):
        return list(presets.read_examples(task.name, source, language, split or "test"))
    return read_examples(task, source, split=split, columns=columns)


def _is_file(source: str) -> bool:
    """A file has no splits; a slice of its rows may follow its name."""
    return Path(source.partition("[")[0]).is_file()


def _read_pairs(places: Places) -> tuple[list | None, list | None]:
    if places.parallel is None:
        return None, None
    how = {"third_column": places.third_column, "columns": places.parallel_columns}
    pairs = read_pairs(places.parallel, places.parallel_target, **how)
    if places.validation_parallel is None:
        return pairs, None
    return pairs, read_pairs(places.validation_parallel, **how)


def recorded_columns(adapter) -> dict[str, str] | None:
    """The columns that an adapter's run was trained with, where the command line named them."""
    return ((adapter.info and adapter.info.data) or {}).get("columns")
