"""The command line: fastprompt train | evaluate | predict | embed | search | export | score | study | info | bench."""

import sys

from fastprompt._extras import require

try:
    require("typer", "train")
except ImportError as error:  # the console script exists without the extra, too
    if sys.argv[1:] != ["info"]:
        sys.exit(f"fastprompt: {error}")
    from fastprompt.info import describe

    sys.exit(describe())

# Each module adds its commands to the app, in the order of --help. What they need to run they import when they do.
from . import train  # noqa: E402, F401  # isort: skip
from . import evaluate, predict, search, export, score, study, info, bench  # noqa: E402, F401  # isort: skip
from .app import app  # noqa: E402


def main() -> None:
    """The console script."""
    app(prog_name="fastprompt")
