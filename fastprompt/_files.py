"""Files that matter are written aside and renamed: a reader finds the old one or the new one, whole, and can tell."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
CHECKSUM = "checksum"  # of what else is in a JSON file, under this name in it
_DIGEST = "sha256"  # of the tensors of a safetensors file, under this name in its metadata


def cache_folder() -> Path:
    """Where what can be made again is kept: $FASTPROMPT_CACHE, or ~/.cache/fastprompt."""
    return Path(os.environ.get("FASTPROMPT_CACHE") or Path.home() / ".cache" / "fastprompt")


def write_aside(path: Path, write: Callable[[Path], Result]) -> Result:
    """Have `write` write a file beside `path`, of the same suffix, put it in its place and return what `write` did.

    When this returns it is on the disk, under its name, and stays there if the machine fails.
    """
    # No process id: processes of two machines, or threads, may share the folder.
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        result = write(aside)
        sync(aside)
        os.replace(aside, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            sync(path.parent)
        return result
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, about: dict) -> None:
    """Write names and values as JSON, with their checksum."""
    whole = about | {CHECKSUM: _checksum(about)}
    write_text(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """Read what `write_json` wrote, `CHECKSUM` included; other JSON objects as well, which have none.

    Raises:
        FileNotFoundError, ValueError: it is not there, is no JSON object, or has changed since it was written.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged: it must be JSON: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} is damaged: it must be a JSON object, got {type(about).__name__}")
    return about


def check_json(path: Path, about: dict) -> None:
    """Compare what `read_json` gave with its checksum, where it has one.

    Raises:
        ValueError: it has changed since it was written.
    """
    expected = about.get(CHECKSUM)
    found = _checksum({name: value for name, value in about.items() if name != CHECKSUM})
    if expected is not None and expected != found:
        raise ValueError(f"{path} is damaged: its checksum is {expected}, that of what it holds {found}")


def check_known(path: Path, about: dict, known: set[str]) -> None:
    """Raise a ValueError for names that are not `known`: files of later versions may have more."""
    unknown = sorted(about.keys() - known)
    if unknown:
        raise ValueError(
            f"{path} has {', '.join(unknown)}, which this version of fastprompt does not know: a newer one wrote it, "
            "or it is damaged"
        )


def _checksum(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class Stored(NamedTuple):
    """What is in a safetensors file: tensors by name, its metadata, and a digest of the tensors and their names."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    digest: str


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file with a digest of the tensors in its metadata; return the digest."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = _digest(whole)
    write_aside(path, lambda aside: save_file(whole, aside, {"format": "pt"} | (metadata or {}) | {_DIGEST: digest}))
    return digest


def read_tensors(path: Path) -> Stored:
    """Read a safetensors file, and compare its tensors with their digest, where `write_tensors` wrote it.

    Raises:
        FileNotFoundError, ValueError: it is not there, is no such file, or has changed since it was written.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dictionary
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    digest = _digest(tensors)
    if metadata.get(_DIGEST, digest) != digest:
        raise ValueError(f"{path} is damaged: its checksum is {metadata[_DIGEST]}, that of its tensors {digest}")
    return Stored(tensors, metadata, digest)


def _digest(tensors: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
