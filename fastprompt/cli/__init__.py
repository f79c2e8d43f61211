"""The command line: fastprompt info | train | evaluate | score | study | bench."""

import sys

from fastprompt._extras import require

try:
    require("typer", "train")
except ImportError as error:  # the console script exists without the extra, too
    if sys.argv[1:] != ["info"]:
        sys.exit(f"fastprompt: {error}")
    from fastprompt.info import describe

    sys.exit(describe())

from . import adapt, bench, score, study  # noqa: E402, F401  each module adds its commands to the app
from .app import app  # noqa: E402


def main() -> None:
    """The console script."""
    app(prog_name="fastprompt")
