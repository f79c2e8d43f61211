"""What the commands share: the app, options of one meaning, and errors told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Option = typer.Option

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Soft prompts and prefix tuning, made cheap.")

Device = Annotated[str | None, Option(help="Where to compute; a GPU where there is one.")]


@contextmanager
def one_clear_error() -> Iterator[None]:
    """What the user can mend is told in one line, without a traceback."""
    try:
        yield
    except (ArithmeticError, ImportError, OSError, TypeError, ValueError) as error:
        typer.echo(f"fastprompt: error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def info() -> None:
    """Print versions, devices, and which native libraries and backends there are, with the reason where one is not."""
    from fastprompt.info import describe

    describe()


def torch_device(name: str | None):
    """The device of that name; without one, a GPU where there is one."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a device of torch, got {name!r}: {error}") from error
