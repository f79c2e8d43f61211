"""Settings in YAML files: values are what they look like, and each is held to its field's type."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path

from fastprompt._extras import require

_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_NUMBERS = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    types.NoneType: "nothing",
    object: "anything",
}
# Fields of AlignmentConfig, and what they are called among all settings of a run.
ALIGNMENT = {"weight": "alignment", "distance": "distance", "temperature": "temperature"}
ALIGNMENT |= {name: f"alignment_{name}" for name in ("schedule", "form", "layer", "warmup_steps", "batch_size")}
# Shorter names of options that are written often, and names that options had.
ALIASES = {
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "patience": "early_stopping_patience",
}
RENAMED = {
    "kind": "method",
    "weights_lr": "weights_learning_rate",
    "head_lr": "head_learning_rate",
    "projection_lr": "projection_learning_rate",
    "evaluate_every": "eval_steps",
    "alignment_first": "alignment_warmup_steps",
}


def setting(default, help: str, *, basic: bool = False, choices: Sequence[str] = ()):
    """A dataclass's field with what the command line says about it: a basic one is among the first that it shows."""
    return dataclasses.field(default=default, metadata={"help": help, "basic": basic, "choices": tuple(choices)})


def read_yaml(path: Path) -> dict:
    """Names and values of a YAML file, by YAML 1.2: `no` is a word, the language's name, and `1e-2` a number.

    Raises:
        FileNotFoundError, ValueError: it is not there, or is no YAML of that kind.
    """
    yaml = require("yaml", "train")
    try:
        about = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be YAML: {error}") from error
    if not isinstance(about, dict) or not all(isinstance(name, str) for name in about):
        raise ValueError(f"{path}: must hold names and values, got {type(about).__name__}")
    return about


def read_value(text: str):
    """What YAML takes a value for: "1e-2" is a number, "true" is True, "no" a word, "[1, 2]" a list.

    Raises:
        ValueError: it is no YAML.
    """
    yaml = require("yaml", "train")
    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} must be a value as YAML has it: {error}".replace("\n", " ")) from error


def _loader() -> type:
    """PyYAML's safe loader, which goes by YAML 1.1, with the plain values of YAML 1.2."""
    yaml = require("yaml", "train")

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}

    for kind, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?\d+", list("-+0123456789")),
        ("float", _NUMBERS, list("-+.0123456789")),
        ("merge", r"<<", ["<"]),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{pattern})$"), first)
    # 010 is ten: PyYAML's own would take it for eight, and 1:30 for ninety.
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    return Loader


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean seed?" for an error about a name that is near one of the known ones, else nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_fields(kind: type, values: dict, where: str = "") -> dict:
    """`values` for the fields of the dataclass `kind`, each as its field's type has it; other names are left alone.

    An integer will do for a number, and yes, no, on or off for true or false.

    Raises:
        ValueError: after `where`, the name, what is expected and what came.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name in values]
    return values | {name: _checked(hints[name], values[name], where + name) for name in names}


def _checked(hint, value, where: str):
    fits, value = _fit(hint, value)
    if not fits:
        raise ValueError(f"{where} must be {_described(hint, value)}, got {value!r}")
    return value


def _fit(hint, value) -> tuple[bool, object]:
    """Whether a value is of a type, and the value as that type has it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next(((True, made) for each in inner for fits, made in [_fit(each, value)] if fits), (False, value))
    if hint is typing.Any:
        return True, value
    if origin is typing.Literal:
        return value in inner, value
    if hint is bool and isinstance(value, str) and value.lower() in _WORDS:
        return True, _WORDS[value.lower()]
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    if origin is dict:
        if not isinstance(value, dict):
            return False, value
        parts = [(_fit(inner[0], name), _fit(inner[1], each)) for name, each in value.items()]
        return all(name[0] and each[0] for name, each in parts), {name[1]: each[1] for name, each in parts}
    if origin is not None and issubclass(origin, Sequence):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return False, value
        parts = [_fit(inner[0], each) for each in value]
        return all(fits for fits, _ in parts), value
    if hint is int:
        return type(value) is int, value
    return isinstance(value, origin or hint), value


def _described(hint, value=None) -> str:
    """What a type is called; of lists and of names and values, what is in them only where `value` is such a one."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_described(each, value) for each in inner))
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if hint is dict or origin is dict:
        return "names and values" + (
            f", each of them {_described(inner[1])}" if isinstance(value, dict) and inner else ""
        )
    if origin is not None and issubclass(origin, Sequence):
        return "a list" + (f", each of it {_described(inner[0])}" if isinstance(value, list | tuple) else "")
    if issubclass(hint, Enum):  # of transformers, whose members are written as strings
        return _NAMES[str]
    return _NAMES.get(hint) or f"a {hint.__name__}"
