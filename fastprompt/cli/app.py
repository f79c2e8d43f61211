"""What the commands share: the app, its help and errors, and options of one meaning."""

import logging
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from fastprompt import __version__
from fastprompt._extras import require
from fastprompt._settings import ALIASES, RENAMED

from . import errors
from .errors import UsageError, one_clear_error

Option = typer.Option


class Commands(TyperGroup):
    """All commands; --debug may stand anywhere."""

    def main(self, args=None, **more):
        args = list(sys.argv[1:] if args is None else args)
        errors.debug.set("--debug" in args)
        return super().main([each for each in args if each != "--debug"], **more)

    def parse_args(self, context, args):
        with one_clear_error():
            return super().parse_args(context, args)

    def invoke(self, context):
        with one_clear_error():
            return super().invoke(context)


class Command(TyperCommand):
    """A command of ours: an option that would be taken once is refused twice, as the first would be lost in silence."""

    def parse_args(self, context, args):
        *_, found = self.make_parser(context).parse_args(args=list(args))
        for each in found:
            if found.count(each) > 1 and each.param_type_name == "option" and not each.multiple:
                flag = max(each.opts, key=len)
                raise UsageError(f"{flag} must be given once, got it {found.count(each)} times")
        return super().parse_args(context, args)


class App(typer.Typer):
    """Typer, whose commands are ours."""

    def command(self, name=None, *, cls=Command, **more):
        return super().command(name, cls=cls, **more)


class Training(Command):
    """A command with the options of a run: shorter names are taken for theirs, and names of old ones are told."""

    def parse_args(self, context, args):
        return super().parse_args(context, [_by_its_name(each) for each in args])


def _by_its_name(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    name = flag[2:].replace("-", "_")
    if not flag.startswith("--"):
        return argument
    if name in RENAMED:
        raise UsageError(f"no such option: {flag}; it is now --{RENAMED[name].replace('_', '-')}")
    if name in ALIASES:
        return f"--{ALIASES[name].replace('_', '-')}{equals}{value}"
    return argument


app = App(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Adapter = Annotated[str, Option(help="Folder of a run, or of an adapter that PEFT wrote.", show_default=False)]
Backbone = Annotated[str | None, Option(help="Where the run's backbone is now, if it has moved.")]
Columns = Annotated[str | None, Option(help="Your columns: text=review,label=stars. Default: the run's.")]
Device = Annotated[str | None, Option(help="Where to compute: cpu, cuda, ... Default: a GPU where there is one.")]
BatchSize = Annotated[int, Option(min=1, help="Inputs of a pass.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fastprompt {__version__}")
        raise typer.Exit()


@app.callback()
def fastprompt(
    version: Annotated[bool, Option("--version", is_eager=True, callback=_version, help="Show the version.")] = False,
    debug: Annotated[bool, Option("--debug", help="With any command: show the traceback of an error.")] = False,
) -> None:
    """Soft prompts and prefix tuning, made cheap."""
    log = logging.getLogger("fastprompt")
    log.setLevel(logging.INFO)
    if not any(isinstance(each, _Told) for each in log.handlers):
        log.addHandler(_Told())


class _Told(logging.Handler):
    """What was decided on the way, such as which columns are read, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main():
            typer.echo(f"fastprompt: {record.getMessage()}", err=True)


def say(text: str) -> None:
    """Print a line, once where several processes run."""
    if is_main():
        typer.echo(text)


def is_main() -> bool:
    """Whether this is the only process, or the first of those that torchrun or accelerate has started."""
    return os.environ.get("RANK", "0") == "0"


def quiet() -> None:
    """No bars of transformers."""
    require("transformers", "train").utils.logging.disable_progress_bar()


def torch_device(name: str | None):
    """The device of that name; without one, a GPU where there is one."""
    from fastprompt.models.load import find_device

    return find_device(name)
