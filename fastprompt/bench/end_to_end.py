"""Whole training jobs on a real encoder and real parallel sentences: stock PEFT and plain PyTorch against fastprompt.

- retrieval: a prefix trained so that translations find their English sentences, `fastprompt.Trainer` against the
  demo's stock job. The score is R@1 of the held-out pairs, at first without any prefix.
- accuracy: is a sentence English or the other language? A PeftModel with prefix and classification head in one and the
  same loop, as it is and after `fastprompt.fuse`.

Both ways of a job begin with the same weights and take the same batches, so that their losses must agree. Each runs in
a process of its own, on the CPU; Linux only.

    python -m fastprompt.bench.end_to_end JOB WAY SETTINGS      SETTINGS as JSON; prints what the run gave, as JSON
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastprompt._extras import require
from fastprompt._measure import WARMUP_STEPS
from fastprompt.data.parallel import read_pairs

from .case import OURS
from .jobs import BATCH, JOBS, PREFIX_ROWS, SCORES, WAYS, Settings, distinct, run_job
from .records import END_TO_END
from .timing import Interval, median_interval

COMPARED_STEPS = 5  # from here on rounding errors have grown too much
TOLERANCE = 1e-3  # of a loss, relative


def measure_jobs(
    backbone: str,
    parallel: str,
    *,
    jobs: Sequence[str] = JOBS,
    steps: int = 100,
    rounds: int = 1,
    threads: int | None = None,
    train: int = 400,
    test: int = 200,
    evaluate_every: int = 10,
    targets: Sequence[float] = (),
) -> Iterator[dict]:
    """Run the jobs, the two ways of each in alternation, and give a record of each job as it is done.

    Args:
        backbone: folder of an encoder and its tokenizer.
        parallel: file of sentence pairs, as `fastprompt.data.parallel.read_pairs` reads it; of pairs that share a side
            the last counts.
        jobs: which of JOBS.
        steps: of a job, at least: it does whole epochs. No more is trained on than so many steps take in one.
        rounds: how often each way runs; the seconds of the steps are pooled.
        threads: of PyTorch; None: as the environment says.
        train, test: training and held-out pairs; accuracy takes one sentence of each.
        evaluate_every: steps between two scores.
        targets: scores whose time is told. Default: halfway between the score before training and the best that both
            ways reach, rounded down to two digits; none where that is no better than before.

    Yields:
        What `fastprompt.bench.run.measure` returns, with another content of "ways". Of each way:
        "seconds_per_step": median and interval, without the first three steps of a run;
        "tokens_per_second": text tokens of the sentences that go through the model, without
            padding and prefix, in these steps;
        "flops_per_step": see `fastprompt.bench.flops`; mean of some steps;
        "seconds_to": seconds of training, without evaluation, at the first score that reaches a target, or None;
        "seconds_in_all", "curve" ([step, seconds, score], ...): median over the rounds; scores are the first round's;
        "resident_bytes": the process's peak until training ends, with all that is loaded;
        "scores": "before" training and "after";
        "error" (ours): largest relative difference of the first losses from the rival's. If it is above the tolerance
            it stands in "wrong", and no way has a time;
        "over_ours" (rivals): ratio of the medians, between the extremes that the two intervals allow.

    Raises:
        ValueError: a file is missing or an argument does not fit, before anything runs.
        RuntimeError: a process failed; the message has the end of what it printed.
    """
    require("peft", "bench")
    unknown = [job for job in jobs if job not in JOBS]
    if unknown:
        raise ValueError(f"jobs must be of {JOBS}, got {unknown}")
    if not (Path(backbone) / "config.json").is_file():
        raise ValueError(f"backbone must be a folder with a model and its tokenizer, got {str(backbone)!r}")
    if not Path(parallel).is_file():
        raise ValueError(f"parallel must be a file of sentence pairs, got {str(parallel)!r}")
    least = {"steps": 1, "rounds": 1, "train": 4, "test": 4, "evaluate_every": 1, "threads": 1}
    for name, value in zip(least, (steps, rounds, train, test, evaluate_every, threads), strict=True):
        if value is not None and value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}")
    there = len(distinct(read_pairs(parallel)))
    if train + test > there:
        raise ValueError(
            f"train and test must be at most the {there} different pairs of {parallel}, got {train + test}"
        )
    train = min(train, steps * BATCH)
    settings = Settings(str(backbone), str(parallel), steps, train, test, evaluate_every, threads)
    return (_measure(job, settings, rounds, targets) for job in jobs)


def _measure(job: str, settings: Settings, rounds: int, targets: Sequence[float]) -> dict:
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way in WAYS[:: -1 if turn % 2 else 1]:
            runs[way].append(_in_process(job, way, settings))
    return record_of(job, settings, runs, targets)


def _in_process(job: str, way: str, settings: Settings) -> dict:
    threads = {} if settings.threads is None else {"OMP_NUM_THREADS": str(settings.threads)}
    text = json.dumps(dataclasses.asdict(settings))
    command = [sys.executable, "-m", "fastprompt.bench.end_to_end", job, way, text]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"end-to-end/{job}, {way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def record_of(job: str, settings: Settings, runs: dict[str, list[dict]], targets: Sequence[float]) -> dict:
    """The record of a job, of what the rounds of each way gave; see `run_job`."""
    first = runs[OURS][0]
    record = {
        "name": f"{END_TO_END}/{job}",
        "group": END_TO_END,
        "sizes": {
            "batch": BATCH,
            "P": PREFIX_ROWS,
            "steps": len(first["seconds"]),
            "train": settings.train,
            "test": settings.test,
        },
        "sweep": None,
        "missing": {},
        "wrong": {},
        "ways": {},
    }
    rivals = [way for way in runs if way != OURS]
    error = max(_difference(ours, rival) for ours in runs[OURS] for way in rivals for rival in runs[way])
    if not error <= TOLERANCE:
        record["wrong"][OURS] = error
        return record
    curves = {way: _curve(rounds) for way, rounds in runs.items()}
    targets = targets or _target(list(curves.values()))
    intervals = {way: median_interval(_pooled(rounds, "seconds")) for way, rounds in runs.items()}
    for way, rounds in runs.items():
        curve = curves[way]
        record["ways"][way] = {
            "seconds_per_step": intervals[way]._asdict(),
            "tokens_per_second": sum(_pooled(rounds, "tokens")) / sum(_pooled(rounds, "seconds")),
            "flops_per_step": rounds[0]["flops_per_step"],
            "seconds_to": {f"{SCORES[job]} {target:.2f}": seconds_to(target, curve) for target in targets},
            "seconds_in_all": statistics.median(sum(each["seconds"]) for each in rounds),
            "resident_bytes": max(each["resident_bytes"] for each in rounds),
            "scores": {"before": curve[0][2], "after": curve[-1][2]},
            "curve": curve,
        }
    record["ways"][OURS]["error"] = error
    for way in rivals:
        record["ways"][way]["over_ours"] = _quotient(intervals[way], intervals[OURS])._asdict()
    return record


def seconds_to(target: float, curve: Sequence[tuple[int, float, float]]) -> float | None:
    """Seconds at the first score of a curve (step, seconds, score) that reaches `target`; None: none does."""
    return next((seconds for _, seconds, score in curve if score >= target), None)


def _target(curves: Sequence[Sequence]) -> list[float]:
    before = max(curve[0][2] for curve in curves)
    best = min(max(score for _, _, score in curve) for curve in curves)
    target = math.floor(50 * (before + best) + 1e-9) / 100
    return [target] if target > before else []


def _curve(rounds: Sequence[dict]) -> list[list]:
    points = zip(*(each["curve"] for each in rounds), strict=True)
    return [[same[0][0], statistics.median(seconds for _, seconds, _ in same), same[0][2]] for same in points]


def _pooled(rounds: Sequence[dict], name: str) -> list[float]:
    """Of the steps of all rounds, without the first few of each where there are more."""
    return [value for each in rounds for value in each[name][WARMUP_STEPS:] or each[name]]


def _difference(ours: dict, rival: dict) -> float:
    pairs = zip(ours["losses"][:COMPARED_STEPS], rival["losses"][:COMPARED_STEPS], strict=True)
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)


def _quotient(theirs: Interval, ours: Interval) -> Interval:
    return Interval(theirs.median / ours.median, theirs.low / ours.high, theirs.high / ours.low)


if __name__ == "__main__":
    print(json.dumps(run_job(sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3])))))
