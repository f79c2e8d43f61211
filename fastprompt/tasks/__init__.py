"""Tasks: what each reads, and what it makes of a model's hidden states. `get` makes one by its name."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Task

# Where each task stands, and the settings that make a preset of it. Nothing is imported before it is asked for.
_TASKS = {
    "classification": ("classification", "Classification", {}),
    "tagging": ("tagging", "Tagging", {}),
    "qa": ("qa", "Qa", {}),
    "generation": ("generation", "Generation", {}),
    "retrieval": ("retrieval", "Retrieval", {}),
    "xquad": ("qa", "Qa", {"metrics": "xquad"}),
    "mlqa": ("qa", "Qa", {"metrics": "mlqa"}),
    "pawsx": ("classification", "PawsX", {}),
}
NAMES = tuple(_TASKS)
_CLASSES = {name: module for module, name, _ in _TASKS.values()} | {"Task": "base", "InputConfig": "base"}

__all__ = ["NAMES", "get", *_CLASSES]


def task_class(name: str) -> "type[Task]":
    """The class of the task with that name, for what it says of itself: its columns.

    Raises:
        ValueError: there is no such task.
    """
    if name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(NAMES)}, got {name!r}")
    module, kind, _ = _TASKS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)


def get(name: str, **settings) -> "Task":
    """The task with that name.

    Args:
        name: one of `NAMES`. "xquad", "mlqa" and "pawsx" are "qa" and "classification" with their official scores.
        settings: keyword arguments of the task's class; also what `settings()` of such a task returned.

    Example:
        >>> get("classification", labels=["bad", "good"]).columns
        {'id': ..., 'text': ..., 'text_pair': ..., 'label': ...}

    Raises:
        ValueError: there is no such task, or it has no such setting or value.
    """
    import inspect

    kind, preset = task_class(name), _TASKS[name][2]
    parameters = inspect.signature(kind).parameters
    known = [each for each in parameters if each != "name"]
    for each in settings:
        if each not in known:
            raise ValueError(f"task {name!r} has no setting {each!r}, only {', '.join(known) or 'none'}")
    own = {"name": name} if "name" in parameters else {}  # of a class that serves several presets
    return kind(**(preset | settings), **own)


def __getattr__(name: str):
    if name in _CLASSES:
        return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
