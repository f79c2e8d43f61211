"""Files that matter are written aside and renamed: a reader finds the old one or the new one, whole."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from fastprompt._extras import require

Result = TypeVar("Result")


def cache_folder() -> Path:
    """Where what can be made again is kept: $FASTPROMPT_CACHE, or ~/.cache/fastprompt."""
    return Path(os.environ.get("FASTPROMPT_CACHE") or Path.home() / ".cache" / "fastprompt")


def write_aside(path: Path, write: Callable[[Path], Result]) -> Result:
    """Have `write` write a file beside `path`, of the same suffix, put it in its place and return what `write` did."""
    # No process id: processes of two machines, or threads, may share the folder.
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        result = write(aside)
        os.replace(aside, path)
        return result
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_aside(path, lambda aside: save_file(whole, aside, {"format": "pt"} | (metadata or {})))


def read_yaml(path: Path) -> dict:
    """Names and values of a YAML file.

    Raises:
        FileNotFoundError, ValueError: it is not there, or is no YAML of that kind.
    """
    yaml = require("yaml", "train")
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be YAML: {error}") from error
    if not isinstance(about, dict) or not all(isinstance(name, str) for name in about):
        raise ValueError(f"{path}: must hold names and values, got {type(about).__name__}")
    return about
