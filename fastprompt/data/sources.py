"""Rows of whatever holds them: a file, standard input, a folder, a dataset's name on the hub, or objects."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fastprompt._extras import require

from .files import SUFFIXES, Placed, file_rows, object_rows, stdin_rows
from .reading import load_dataset, parse_split, shorten, tell

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAME_SPLIT = ("validation", "valid", "dev", "val")


def placed_rows(
    source: Any, split: str | None, subset: str | None, format: str | None, known: Collection[str]
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield rows as they stand, each with its number, from 0, and its place.

    Args:
        source, split, subset, format: as `fastprompt.data.table.iter_rows` takes them.
        known: names of columns that tell a header in standard input from a sentence.
    """
    slices = []
    if split is not None:
        split, rows = parse_split(split)
        slices.append(rows)
    if isinstance(source, str) and not Path(source).exists():
        source, rows = parse_split(source, "source")
        slices.append(rows)
    numbered: Iterator = enumerate(_rows_of(source, split, subset, format, known))
    for rows in slices:
        numbered = islice(numbered, rows.start, rows.stop)
    return ((number, *placed) for number, placed in numbered)


def _rows_of(source: Any, split: str | None, subset: str | None, format: str | None, known: Collection[str]):
    if not isinstance(source, str | Path):
        _refuse("rows in memory", subset=subset, format=format)
        return _rows_in_memory(source, "rows", split)
    is_stdin, path = source == "-", Path(source)
    named = path.suffix.lower() in SUFFIXES or path.suffix == ".txt" or format is not None
    if not is_stdin and named and not path.exists():
        raise FileNotFoundError(f"{source}: no such file")
    if is_stdin or path.is_file():
        _refuse(f"a file, {source}", split=split, subset=subset)
        return stdin_rows(format, known) if is_stdin else file_rows(path, format, known)
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            _refuse(f"a saved dataset, {source}", subset=subset, format=format)
            return _rows_in_memory(require("datasets", "train").load_from_disk(str(path)), str(source), split)
        files = _files_of(path, split) if subset is None else []
        if files:
            return chain.from_iterable(file_rows(file, format, known) for file in files)
    if not path.exists() and not _ON_HUB.fullmatch(str(source)):
        raise FileNotFoundError(f"{shorten(str(source))}: no such file or folder, and no owner/name of a data set")
    _refuse(f"a dataset, {source}", format=format)
    where = ", ".join([str(source), *([f"config {subset}"] if subset else []), *([f"split {split}"] if split else [])])
    return _rows_in_memory(load_dataset(source, subset, split), where, None)


def _refuse(what: str, **options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must be left out for {what}, got {value!r}")


def _rows_in_memory(source: Any, where: str, split: str | None) -> Iterator[Placed]:
    if isinstance(source, Mapping):  # a DatasetDict
        name = _choose(list(source), split, where)
        source, where = source[name], f"{where}, split {name}"
    elif split is not None:
        raise ValueError(f"split must be left out, as {where} has none; got {split!r}")
    if not isinstance(source, Iterable):
        raise ValueError(f"source must be a file, a dataset, its name, or rows, got {type(source).__name__}")
    return object_rows(source, where, getattr(source, "features", None))


def _files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of a split in a folder, by their names; none where the folder says itself how it is to be read."""
    about = folder / "README.md"
    if about.is_file() and "\nconfigs:" in about.read_text(encoding="utf-8", errors="replace"):
        return []
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in (*SUFFIXES, ".txt"):
            shard = _SHARD.fullmatch(file.stem)
            splits.setdefault(shard[1] if shard else file.stem, []).append(file)
    if not splits:
        return []
    files = splits[_choose(list(splits), split, str(folder))]
    kinds = {file.suffix for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{folder}: {', '.join(file.name for file in files)}: which of them? Name one as the source")
    tell("%s: read %s", folder, ", ".join(file.name for file in files))
    return files


def _choose(splits: list[str], split: str | None, where: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    found = [each for each in splits if each == split] or [each for each in splits if {each, split} <= {*_SAME_SPLIT}]
    if len(found) != 1:
        raise ValueError(f"split must be one of {', '.join(splits)}, of {where}, got {split!r}")
    return found[0]
