"""Errors in one line, and the traceback for --debug."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import typer

UsageError = typer.BadParameter.__bases__[0]  # typer has had click's own, and has one of its own
# What the user can mend; its message says how.
_EXPECTED = (ArithmeticError, ImportError, OSError, TypeError, ValueError)
debug = ContextVar("debug", default=False)  # whether the traceback is shown as well


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # not "[Errno 2] No such file ..."
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


@contextmanager
def one_clear_error() -> Iterator[None]:
    """Tell what goes wrong in one line: exit status 2 for options that are none, 1 for all else, 130 after Ctrl-C."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        typer.echo("fastprompt: stopped", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug.get():
            traceback.print_exc()
        usage = isinstance(error, UsageError)
        text = " ".join((error.format_message() if usage else _message(error)).split())
        if not isinstance(error, (*_EXPECTED, UsageError)):
            text = f"{type(error).__name__}: {text} (--debug shows where)"
        typer.echo(f"fastprompt: error: {text}", err=True)
        raise typer.Exit(2 if usage else 1) from error
