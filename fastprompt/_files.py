"""Files that matter are written aside and renamed: a reader finds the old one or the new one, whole."""

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor


def cache_folder() -> Path:
    """Where what can be made again is kept: $FASTPROMPT_CACHE, or ~/.cache/fastprompt."""
    return Path(os.environ.get("FASTPROMPT_CACHE") or Path.home() / ".cache" / "fastprompt")


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file beside `path`, of the same suffix, then put it in its place."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
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
