"""Optional dependencies: imported where they are used, missed with an error that says what to install."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra which brings it.

    Args:
        module: dotted name, such as "transformers" or "matplotlib.pyplot".
        extra: the extra of fastprompt that installs it, such as "train": one of those in pyproject.toml.

    Raises:
        ImportError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the module is there; what it needs itself is not
        raise ImportError(f"{module} is needed here: pip install 'fastprompt[{extra}]'", name=module) from error
