"""What a study leaves behind: study.json, and results.jsonl with one line for each finished run."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from fastprompt.data.reading import shorten

STUDY = "study.json"
RESULTS = "results.jsonl"
STUDIES = ("scarcity", "stability", "pseudo")
MAIN_METRICS = ("f1", "accuracy", "r@1")  # a run is judged by the first of them that it has
MAJORITY = "majority"
RETRIEVAL = "retrieval"  # the task without labels: examples are pairs, and nothing but the alignment trains
FROZEN = "frozen"  # the method that is none: the backbone as it is


@dataclass(frozen=True)
class Record:
    """One finished run, named as the fields of its line in results.jsonl."""

    task: str
    method: str
    examples: int  # labelled training examples
    seed: int
    variant: str  # what it was trained on, or ""
    scores: dict[str, dict[str, float]]  # language, or pair of languages -> metric -> score
    source: str  # the training language
    validation: float  # the best; 0 where there is nothing to choose by
    seconds: float
    steps: int
    trained_parameters: int
    peak_memory_mb: float
    losses: list[float]  # one a step; not finite where the run diverged
    gradient_norms: list[float]
    baseline: dict[str, dict[str, float]] | None = None  # {"majority": language -> accuracy}

    @property
    def main(self) -> str:
        """The metric by which the run is judged."""
        return next(metric for metric in MAIN_METRICS if metric in self.metrics)

    @property
    def metrics(self) -> list[str]:
        return list(next(iter(self.scores.values())))

    def is_source(self, language: str) -> bool:
        """Whether `language`, of whichever split, is the training language, or the pair of it with itself."""
        return language.partition("@")[0] in (self.source, f"{self.source}-{self.source}")

    def mean(self, metric: str) -> float:
        """Macro mean over the languages."""
        return sum(score[metric] for score in self.scores.values()) / len(self.scores)

    def transfer(self, metric: str) -> float | None:
        """Macro mean over the languages other than the source; None without any."""
        others = [score[metric] for language, score in self.scores.items() if not self.is_source(language)]
        return sum(others) / len(others) if others else None


def read_results(folder: Path) -> tuple[dict, list[Record]]:
    """Read the study in `folder` and its finished runs, in the order of the file.

    A last line that was cut off, because the study ended while it was written, is left out. Without results.jsonl no
    run is finished.

    Returns:
        study.json as a dictionary with "study", "title", "config", "versions" and "machine", and the runs.

    Raises:
        FileNotFoundError: no study.json.
        ValueError: a file, or a line of it, that is not as expected; or two lines of one run, or runs of one task that
            were scored by other metrics or in other languages, whose means would not compare.
    """
    study = _read_study(folder / STUDY)
    path = folder / RESULTS
    records: list[Record] = []
    if not path.is_file():
        return study, records
    *lines, last = path.read_bytes().split(b"\n")
    first: dict[str, tuple[int, Record]] = {}  # task -> its first line
    seen: dict[tuple, int] = {}
    for number, line in enumerate([*lines, last], start=1):
        try:
            about = json.loads(line.decode("utf-8")) if line.strip() else None
        except ValueError as error:  # not JSON, or not UTF-8
            if number > len(lines):
                break  # cut off: the newline is missing too
            raise ValueError(f"{path}, line {number}: must be one JSON object, got {shorten(line)}: {error}") from error
        if about is None and not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _record(about, where)
        _check_like(record, *first.setdefault(record.task, (number, record)), where)
        run = (record.task, record.method, record.examples, record.seed, record.variant)
        if run in seen:
            raise ValueError(f"{where}: a run must have one line, got the run of line {seen[run]} again: {run}")
        seen[run] = number
        records.append(record)
    return study, records


def _read_study(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no study: it has no {path.name}")
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON: {error}") from error
    _expect(isinstance(study, dict), path, "the file", "one JSON object", study)
    _check(study, {"study": _STUDY, "title": _TEXT, "config": _OBJECT, "versions": _OBJECT, "machine": _OBJECT}, path)
    return study


def _record(about: object, where: str) -> Record:
    _expect(isinstance(about, dict), where, "the line", "one JSON object", about)
    _check(about, _FIELDS, where)
    scores = about["scores"]
    first_language, metrics = next(iter(scores.items()))
    _expect(any(name in metrics for name in MAIN_METRICS), where, "scores", f"by one of {MAIN_METRICS}", list(metrics))
    for language, score in scores.items():
        name = f"scores[{language!r}]"
        _expect(score.keys() == metrics.keys(), where, name, f"by {list(metrics)}, as {first_language!r}", list(score))
    if about.get("baseline") is not None:
        _check(about["baseline"], {MAJORITY: _NUMBERS}, f"{where}: baseline")
        majority = about["baseline"][MAJORITY]
        _expect(majority.keys() == scores.keys(), where, "baseline", f"for the languages {list(scores)}", majority)
    return Record(**{field.name: about.get(field.name) for field in fields(Record)})


def _check_like(record: Record, number: int, first: Record, where: str) -> None:
    for what, now, then in (
        ("languages", record.scores.keys(), first.scores.keys()),
        ("metrics", set(record.metrics), set(first.metrics)),
    ):
        if now != then:
            raise ValueError(
                f"{where}: scores must have the {what} of line {number}, of the same task {record.task!r}: "
                f"{sorted(then)}, got {sorted(now)}"
            )


def _check(about: dict, expected: dict[str, tuple[str, Callable]], where: object) -> None:
    for name, (description, holds) in expected.items():
        if name not in about:
            raise ValueError(f"{where}: {name} is missing; it must be {description}")
        _expect(holds(about[name]), where, name, description, about[name])


def _expect(holds: bool, where: object, name: str, description: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{where}: {name} must be {description}, got {shorten(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return _is_number(value) and isinstance(value, int) and value >= 0


def _is_object_of(value: object, holds: Callable) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(map(holds, value.values()))


_TEXT = ("a string that is not empty", lambda value: isinstance(value, str) and value != "")
_OBJECT = ("a JSON object", lambda value: isinstance(value, dict))
_STUDY = (f"one of {STUDIES}", lambda value: value in STUDIES)
_COUNT = ("an integer of 0 or more", _is_count)
_NUMBER = ("a finite number", _is_finite)
_NUMBERS = ("an object of language -> finite number", lambda value: _is_object_of(value, _is_finite))
_SERIES = ("a list of numbers, one a step", lambda value: isinstance(value, list) and all(map(_is_number, value)))
_SCORES = (
    "an object of language -> metric -> finite number",
    lambda value: _is_object_of(value, lambda score: _is_object_of(score, _is_finite)),
)
_FIELDS = {
    "task": _TEXT,
    "method": _TEXT,
    "examples": _COUNT,
    "seed": ("an integer", lambda value: _is_number(value) and isinstance(value, int)),
    "variant": ("a string", lambda value: isinstance(value, str)),
    "scores": _SCORES,
    "source": _TEXT,
    "validation": _NUMBER,
    "seconds": _NUMBER,
    "steps": _COUNT,
    "trained_parameters": _COUNT,
    "peak_memory_mb": _NUMBER,
    "losses": _SERIES,
    "gradient_norms": _SERIES,
}
