"""What a frozen model computes, kept on disk under a key of content: once written, mapped into memory."""

import math
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fastprompt._files import write_aside

LIMIT = 16 << 30  # bytes of a folder, unless $FASTPROMPT_CACHE_BYTES says otherwise
_SUFFIX, _CHECKSUM = ".tensor", 4  # a file is the tensor's bytes and their CRC-32, little-endian
_ABANDONED = 24 * 3600.0  # seconds after which a file written aside must be a killed process's


def cached(
    folder: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype, blocks: Callable[[], Iterable[Tensor]]
) -> Tensor:
    """The tensor of that key, mapped from its file in `folder`; where there is none, computed and written first.

    Files are written aside and renamed: a process that is killed leaves none, and processes that write the same key at
    once each get a whole one. A torn file (cut short, or of another checksum) is made anew. Nothing is ever changed in
    place, so a mapped tensor stays whatever becomes of its file.

    Before a file is written, those not used for longest are removed until it has room below the limit
    ($FASTPROMPT_CACHE_BYTES, or 16 GiB), also those that killed processes left behind a day ago. Processes that write
    different keys at once may pass the limit by what they write.

    Args:
        folder: made if it is not there.
        key: a file name for the content: what has the same key is the same.
        shape, dtype: what the tensor must have.
        blocks: gives the tensor in parts, along the first dimension, on the CPU.

    Raises:
        OSError: it cannot be written.
        RuntimeError: `blocks` gives another shape or dtype.
        ValueError: the tensor alone is above the limit.
    """
    file = folder / (key + _SUFFIX)
    tensor = _read(file, shape, dtype)
    if tensor is not None:
        with suppress(OSError):  # removed meanwhile, or another user's
            os.utime(file)
        return tensor
    folder.mkdir(parents=True, exist_ok=True)
    _make_room(folder, math.prod(shape) * dtype.itemsize + _CHECKSUM)

    def write(aside: Path) -> Tensor:
        checksum = 0
        with aside.open("xb") as out:
            for block in blocks():
                data = block.contiguous().view(torch.uint8).numpy()
                out.write(data)
                checksum = zlib.crc32(data, checksum)
            out.write(checksum.to_bytes(_CHECKSUM, "little"))
        tensor = _read(aside, shape, dtype)  # before it has a name that others may remove
        if tensor is None:
            raise RuntimeError(f"blocks must give {tuple(shape)} of {dtype}; {aside} does not hold that")
        return tensor

    return write_aside(file, write)


def _read(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The tensor in a file, mapped; None if there is no such file or it is torn."""
    try:
        opened = file.open("rb")
    except FileNotFoundError:
        return None
    with opened:
        left, checksum = math.prod(shape) * dtype.itemsize, 0
        if os.fstat(opened.fileno()).st_size != left + _CHECKSUM:
            return None
        while part := opened.read(min(left, 1 << 20)):  # not through the map: pages read only now need not be held
            left -= len(part)
            checksum = zlib.crc32(part, checksum)
        if opened.read(_CHECKSUM) != checksum.to_bytes(_CHECKSUM, "little"):
            return None
        # Copied on write, as torch takes no map that is read-only.
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)


def _make_room(folder: Path, need: int) -> None:
    limit = int(os.environ.get("FASTPROMPT_CACHE_BYTES") or LIMIT)
    if need > limit:
        raise ValueError(f"FASTPROMPT_CACHE_BYTES must be at least the {need} bytes to keep in {folder}, got {limit}")
    files = []
    for path in folder.glob("*" + _SUFFIX):
        with suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for used, size, path in sorted(files):
        aside = path.name.startswith(".")
        if time.time() - used > _ABANDONED if aside else total + need > limit:
            path.unlink(missing_ok=True)
            total -= size
