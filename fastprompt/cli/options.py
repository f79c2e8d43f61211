"""Options made of dataclasses: the name, type, default and help of each are written once, at the field."""

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import fastprompt
from fastprompt._settings import read_value, setting

_METAVARS = {"int": "INT", "float": "NUMBER", "str": "TEXT", "Sequence[int]": "0,1,.."}


class Declared(NamedTuple):
    """A dataclass's field that is an option.

    Attributes:
        name: the option's name, with _ for -.
        type: as the field has it, without None.
        field: the dataclass's own, with its default and what `setting` put into its metadata.
        panel: the heading under which help shows it.
    """

    name: str
    type: str
    field: dataclasses.Field
    panel: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        """What help says about it: the field's help, its choices and its default."""
        default, choices, said = self.field.default, self.field.metadata["choices"], self.field.metadata["help"]
        if not all(each in said for each in choices):
            named = [f"{each} (default)" if each == default else each for each in choices]
            return f"{said.rstrip('.')}: {', '.join(named)}."
        if default is True:
            return f"{said} Default: yes; otherwise {self.flag.replace('--', '--no-')}."
        plain = default in (None, False, "", -1) and not isinstance(default, float)
        return said if plain else f"{said} Default: {default}."


def declared_in(file: str, kind: str, panel: str, names: dict[str, str] | None = None) -> list[Declared]:
    """The fields that the class `kind` of a file of this package declares with `setting`.

    They are read off the source: to import it would import torch and transformers, and --help is not to wait for them.

    Args:
        names: names of options by names of fields, where they differ.
    """
    tree = ast.parse((Path(fastprompt.__file__).parent / file).read_text(encoding="utf-8"))
    constants: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                constants[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # no plain value
                continue

    def value(node: ast.expr):
        return constants[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)

    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    found = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and node.value.func.id == "setting":
            field = setting(
                *map(value, node.value.args), **{each.arg: value(each.value) for each in node.value.keywords}
            )
            name = (names or {}).get(node.target.id, node.target.id)
            found.append(Declared(name, _without_none(ast.unparse(node.annotation)), field, panel))
    return found


def declared_by(kind: type, panels: dict[str, Sequence[str]]) -> list[Declared]:
    """The fields of a dataclass, which has its types as they are written, under the panels that name them."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    return [
        Declared(name, _without_none(inspect.get_annotations(kind)[name]), fields[name], panel)
        for panel, names in panels.items()
        for name in names
    ]


def _without_none(annotation) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", None) or str(annotation)
    return text.replace("collections.abc.", "").removesuffix(" | None")


def with_options(declared: Sequence[Declared]) -> Callable[[Callable], Callable]:
    """A command of `function(..., settings, ...)`: with its own options and, there, one for each of `declared`.

    `settings` gets the values that were given, by name.
    """

    def decorate(function: Callable) -> Callable:
        own = list(inspect.signature(function).parameters.values())
        place = [each.name for each in own].index("settings")

        @functools.wraps(function)
        def command(**values):
            given = {each.name: values.pop(each.name) for each in declared}
            settings = {each.name: parse(each, given[each.name]) for each in declared if given[each.name] is not None}
            return function(**values, settings=settings)

        parameters = [*own[:place], *map(_parameter, declared), *own[place + 1 :]]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        del command.__wrapped__
        return command

    return decorate


def _parameter(declared: Declared) -> inspect.Parameter:
    flag = f"{declared.flag}/--no-{declared.flag[2:]}" if declared.type == "bool" else declared.flag
    option = typer.Option(
        flag,
        help=declared.help.replace("[", r"\["),
        hidden=not declared.field.metadata["basic"],
        rich_help_panel=declared.panel,
        show_default=False,
        metavar=None if declared.type == "bool" else _METAVARS.get(declared.type, "A=B,.."),
    )
    kind = Annotated[(bool if declared.type == "bool" else str) | None, option]
    return inspect.Parameter(declared.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind, default=None)


def parse(declared: Declared, value):
    """The text of an option as its field wants it; other values as they are.

    Raises:
        ValueError: the option, what it must be, and what came.
    """
    if not isinstance(value, str) or declared.type in ("str", "bool"):
        return value
    if declared.type.startswith("dict"):
        return names_and_values(declared.name, value, plain=declared.type == "dict[str, str]")
    number, what = (float, "a number") if declared.type == "float" else (int, "an integer")
    try:
        if declared.type == "Sequence[int]":
            what = "numbers joined by commas, such as 0,1,-1,"
            return [int(part) for part in value.split(",")]
        return number(value)
    except ValueError:
        raise ValueError(f"{declared.name} must be {what}, got {value!r}".replace(",,", ",")) from None


def names_and_values(name: str, text: str, *, plain: bool = False) -> dict[str, Any]:
    """{"text": "review", "label": "stars"} for "text=review,label=stars"; unless they are `plain`, values are what YAML
    takes them for, and a list in brackets may have commas of its own.

    Raises:
        ValueError: a part that is none, or a name that comes twice.
    """
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^\[{]*[\]}])", text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"{name} must be names and values such as name=value, got {part!r}")
        if key in found:
            raise ValueError(f"{name} must have each name once, got {key!r} twice")
        found[key] = value.strip() if plain else read_value(value)
    return found


def columns_of(name: str, text: str | None) -> dict[str, str] | None:
    """The columns that an option such as text=review,label=stars names; None where it is not given."""
    return names_and_values(name, text, plain=True) if text else None


def show_all(context: typer.Context, value: bool) -> None:
    """Help with all options, hidden ones included: what --help-all does."""
    if value:
        for parameter in context.command.params:
            parameter.hidden, parameter.secondary_opts = False, []  # --no-...: names get the room
        typer.echo(context.get_help())
        raise typer.Exit()


HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=show_all, help="Show all options and exit.")
]
