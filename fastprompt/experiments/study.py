"""run_study: a grid of runs, each trained and scored; what is done is kept, and skipped the next time."""

import dataclasses
import itertools
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from fastprompt import tasks
from fastprompt._extras import require
from fastprompt._files import write_text
from fastprompt._measure import peak_memory_mb
from fastprompt.data.examples import Pair, Question
from fastprompt.data.parallel import read_pairs, split_pairs
from fastprompt.data.presets import read_examples, spread
from fastprompt.data.reading import tell_left_out
from fastprompt.models.load import load_backbone
from fastprompt.models.methods import AdapterConfig
from fastprompt.tasks.retrieval import retrieval_scores, sentence_groups
from fastprompt.training import Learner, Trainer
from fastprompt.training.streams import draw

from .config import StudyConfig
from .pseudo import pseudo_examples
from .records import FROZEN, RESULTS, RETRIEVAL, STUDY
from .settings import RunSettings


class Planned(NamedTuple):
    """One run of a study."""

    variant: str
    examples: int
    method: str
    seed: int


class Data(NamedTuple):
    """What the runs of a study share.

    Attributes:
        train, validation: labelled examples of the source language.
        tests: task -> language -> examples to be scored.
        pairs: parallel text of all languages; for retrieval language -> pairs for training, beside those in `tests`.
    """

    train: Sequence
    validation: Sequence
    tests: dict[str, dict[str, Sequence]]
    pairs: Sequence[Pair] | dict[str, Sequence[Pair]]


def run_study(
    config: StudyConfig,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    on_run: Callable[[int, int, Planned, dict | None], None] | None = None,
) -> list[dict]:
    """Run what is not yet in `out`/results.jsonl, one line for each finished run.

    A study that died goes on where it was: a run that was not finished begins anew.

    Args:
        config: the study's configuration.
        out: the study's folder. What was begun there must have been the same study; seeds, numbers of examples, methods
            and variants may be more.
        on_run: called before each run with its number, how many there are, the run and None, and after it with its
            record.

    Returns:
        The records of the runs done now.

    Raises:
        ValueError: another study is in `out`, or a setting that does not fit the data or the backbone.
        OSError: data or backbone cannot be read.
        FloatingPointError: at the end, naming the runs whose loss was no longer a number.
    """
    out, device = Path(out), torch.device(device)
    data = read_data(config)
    planned = plan(config, data)
    _settings(config, data, planned[0]).training(out, device)
    _begin(config, out)
    results = out / RESULTS
    done = _done(results, config.task)
    records, diverged = [], []
    for number, run in enumerate(planned, 1):
        if _key(run) in done:
            continue
        if on_run is not None:
            on_run(number, len(planned), run, None)
        try:
            made = _frozen_before(config, data, results, run) or _run(config, data, run, device)
        except FloatingPointError as error:  # the other runs can still be made
            diverged.append(f"{run.method} with {run.examples} examples and seed {run.seed}: {error}")
            continue
        with results.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in made))
            file.flush()
            os.fsync(file.fileno())
        records += made
        if on_run is not None:
            on_run(number, len(planned), run, made[-1])
    if diverged:
        raise FloatingPointError(f"{len(diverged)} runs are missing, all others are done; {'; '.join(diverged)}")
    return records


def read_data(config: StudyConfig) -> Data:
    """Read and check all data before the first run."""
    pairs = {language: _pairs(config.source, language, place) for language, place in config.parallel.items()}
    if config.task == RETRIEVAL:
        tests, train = {}, {}
        for language, each in pairs.items():
            if len(each) <= config.parallel_test:
                raise ValueError(
                    f"parallel_test must be below {len(each)}, the pairs of {config.parallel[language]}, "
                    f"got {config.parallel_test}"
                )
            tests[language], train[language] = split_pairs(
                each, config.parallel_test, len(each) - config.parallel_test, 0
            )
        return Data([], [], {RETRIEVAL: tests}, train)
    read = [config.task, config.data, config.source]
    there = read_examples(*read, config.train_split)
    train = [each for each in there if not isinstance(each, Question) or each.exact_answers]
    what = f"examples of {config.source!r}, whose answers do not stand where they say,"
    tell_left_out(config.train_split, len(there) - len(train), len(there), what)
    validation = read_examples(*read, config.validation_split) if config.validation_split else []
    own = {"data": config.data, "languages": config.languages, "split": config.test_split}
    tests = {
        task: _tests(task, config.test_limit, **about) for task, about in {config.task: own, **config.also}.items()
    }
    return Data(train, validation, tests, [pair for each in pairs.values() for pair in each])


def _pairs(source: str, language: str, place: str | dict) -> list[Pair]:
    if isinstance(place, str):
        return read_pairs(place, third_column="ignore")
    # PAWS-X's first sentences: its ids tell which is the translation of which.
    first, other = (read_examples("pawsx", place["pawsx"], each, place["split"]) for each in (source, language))
    english = {example.id: example.text for example in first}
    pairs = [Pair(english[example.id], example.text) for example in other if example.id in english]
    tell_left_out(place["pawsx"], len(other) - len(pairs), len(other), f"pairs of {language!r}, not in {source!r},")
    if len(pairs) < len(other) // 2:
        raise ValueError(f"parallel of {language} must have the ids of {source}: {len(pairs)} of {len(other)} do")
    return pairs


def _tests(task: str, limit: int | None, data: str, languages: Sequence[str], split: str) -> dict[str, Sequence]:
    tests = {}
    for name in languages:
        language, _, own = name.partition("@")
        tests[name] = spread(read_examples(task, data, language, own or split), limit)
    return tests


def plan(config: StudyConfig, data: Data) -> list[Planned]:
    """All runs, those with few examples first. A number of examples that is not there is left out, and told."""
    there = _there(config, data)
    counts = sorted({there if count == "all" else count for count in config.examples})
    beyond = [count for count in counts if count > there]
    tell_left_out(f"examples {beyond}, of which there are {there}", len(beyond), len(counts), "numbers")
    runs = itertools.product(config.variants, [n for n in counts if n <= there], config.seeds, config.methods)
    return [Planned(variant, count, method, seed) for variant, count, seed, method in runs]


def _there(config: StudyConfig, data: Data) -> int:
    return min(map(len, data.pairs.values())) if config.task == RETRIEVAL else len(data.train)


def _settings(config: StudyConfig, data: Data, run: Planned) -> RunSettings:
    everything = "all" in config.examples and run.examples == _there(config, data)
    return config.run_settings("all" if everything else run.examples, run.method, run.seed)


def _begin(config: StudyConfig, out: Path) -> None:
    """Write study.json, or check that it is of the same study; cut off what is not the whole of a run."""
    about = json.loads(json.dumps(dataclasses.asdict(config)))
    file, results = out / STUDY, out / RESULTS
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))["config"]
        more = ("methods", "method_settings", "examples", "examples_settings", "seeds", "variants", "title")
        for name in about.keys() - set(more):
            if before.get(name, about[name]) != about[name]:
                raise ValueError(f"{name} must be as in the study in {out}: {before[name]!r}, got {about[name]!r}")
        for grid, name in (("methods", "method_settings"), ("examples", "examples_settings")):
            for each in map(str, before[grid]):
                old, new = (study.get(name, {}).get(each) for study in (before, about))
                if old != new:
                    raise ValueError(f"{name} of {each!r} must be as in the study in {out}: {old}, got {new}")
    out.mkdir(parents=True, exist_ok=True)
    versions = {name: metadata.version(name) for name in ("fastprompt", "torch", "transformers")}
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    study = {"study": config.study, "title": config.title or f"{config.study}: {config.task}", "config": about}
    write_text(file, json.dumps(study | {"versions": versions, "machine": machine}, indent=2) + "\n")
    if results.is_file():
        lines = results.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        while lines and json.loads(lines[-1])["task"] != config.task:  # of a run whose last line is missing
            lines.pop()
        os.truncate(results, sum(map(len, lines)))


def _run(config: StudyConfig, data: Data, run: Planned, device: torch.device) -> list[dict]:
    """The records of one run, the study's own task last: when it is there, the run is done."""
    start = time.perf_counter()
    if config.task == RETRIEVAL:
        tests = data.tests[RETRIEVAL]
        made = [_retrieve(config, data, run, language, device) for language in tests]
        scores = {RETRIEVAL: {name: each for name, (_, _, each) in zip(tests, made, strict=True)}}
        learner, records, _ = made[0]
        for name in ("loss", "gradient_norm"):  # of a step: the mean over languages
            for n, record in enumerate(records):
                record[name] = sum(each[n][name] for _, each, _ in made) / len(made)
    else:
        learner, records = _answer(config, data, run, device)
        scores = {
            task: {name: _scores(task, learner, name, examples) for name, examples in tests.items()}
            for task, tests in data.tests.items()
        }
    trained = {} if run.method == FROZEN else learner.trained()
    about = {
        "method": run.method,
        "examples": run.examples,
        "seed": run.seed,
        "variant": run.variant,
        "source": config.source,
        "validation": max((record["validation"] for record in records if "validation" in record), default=0.0),
        "seconds": round(time.perf_counter() - start, 2),
        "steps": len(records),
        "trained_parameters": sum(parameter.numel() for parameter in trained.values()),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "losses": [round(record["loss"], 5) for record in records],
        "gradient_norms": [round(record["gradient_norm"], 5) for record in records],
    }
    if config.task == "pawsx":
        tests = data.tests["pawsx"]
        about["baseline"] = {"majority": {name: _majority(examples) for name, examples in tests.items()}}
    return [{"task": task, "scores": scores[task], **about} for task in [*config.also, config.task]]


def _frozen_before(config: StudyConfig, data: Data, results: Path, run: Planned) -> list[dict]:
    """The backbone as it is scores the same whatever the seed and the examples, with settings that are the same."""
    if run.method != FROZEN or not results.is_file():
        return []

    def settings(of: Planned) -> RunSettings:
        return _settings(config, data, of._replace(seed=0))

    records = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    before = [each for each in records if each["method"] == FROZEN and settings(Planned(*_key(each))) == settings(run)]
    own = run._asdict()
    return [record | own for record in before if _key(record) == _key(before[-1])]


def _train_examples(config: StudyConfig, data: Data, run: Planned) -> list:
    real = draw(data.train, run.examples, run.seed)
    if run.variant in ("", "real"):
        return real
    made = pseudo_examples(config, data.train, data.pairs, run.seed)
    return made if run.variant == "pseudo" else real + made


def _answer(config: StudyConfig, data: Data, run: Planned, device: torch.device) -> tuple[Learner, list[dict]]:
    """What answers a task after a run, and the records of the run's steps."""
    settings, task = _settings(config, data, run), tasks.get(config.task)
    model, tokenizer = load_backbone(config.backbone, device)
    if run.method == FROZEN:
        return Learner(model, tokenizer, settings.adapter, settings.inputs, task), []
    pairs = None if settings.alignment is None else data.pairs
    about = {"task": task, "train_dataset": _train_examples(config, data, run), "eval_dataset": data.validation}
    return _train(settings, model, tokenizer, device, pairs=pairs, language=config.source, **about)


def _scores(task: str, learner: Learner, name: str, examples: Sequence) -> dict[str, float]:
    language = name.partition("@")[0].partition("-")[0]  # of mlqa's pairs, that of the contexts
    rules = learner.task if learner.task.name == task else tasks.get(task)
    return rules.scores(examples, learner.predict(examples), language)


def _retrieve(
    config: StudyConfig, data: Data, run: Planned, language: str, device: torch.device
) -> tuple[Learner, list[dict], dict[str, float]]:
    """Train for one language, and find the English sentences of its test pairs; as `_answer`, and the scores.

    They are taken once, after the last step: nothing is chosen by them.
    """
    settings, tests = _settings(config, data, run), data.tests[RETRIEVAL][language]
    model, tokenizer = load_backbone(config.backbone, device, head="none")
    plain = AdapterConfig("head", num_layers=settings.adapter.num_layers)
    learner, records = Learner(model, tokenizer, plain, settings.inputs), []
    english = [pair.source for pair in tests]
    targets, groups = learner.vectors(english), sentence_groups(learner.tokenize(english))
    if run.method != FROZEN:
        pairs = draw(data.pairs[language], run.examples, run.seed)
        learner, records = _train(settings, model, tokenizer, device, pairs=pairs)
    queries = learner.vectors([pair.target for pair in tests])
    return learner, records, retrieval_scores(queries, targets, groups)


class _Trainer(Trainer):
    """One that nobody will look at the folder of: a study has its own report."""

    def _summarise(self, folder: Path) -> None:
        pass


def _train(
    settings: RunSettings, model: torch.nn.Module, tokenizer: Callable, device: torch.device, **data
) -> tuple[Learner, list[dict]]:
    """Train in a folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        args = settings.training(folder, device)
        if not data.get("eval_dataset"):
            args = dataclasses.replace(args, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
        configs = {"adapter": settings.adapter, "inputs": settings.inputs, "alignment": settings.alignment}
        trainer = _Trainer(model, args, processing_class=tokenizer, **configs, **data)
        trainer.remove_callback(require("transformers", "train").PrinterCallback)
        trainer.train()
    if trainer.stopped:
        raise KeyboardInterrupt  # half a run is worth nothing
    return trainer.learner, trainer.records


def _majority(examples: Sequence) -> float:
    return 100 * max(Counter(example.label for example in examples).values()) / len(examples)


def _key(run: Planned | dict) -> tuple:
    get = run.get if isinstance(run, dict) else run._asdict().get
    return tuple(get(name) for name in Planned._fields)


def _done(results: Path, task: str) -> set[tuple]:
    if not results.is_file():
        return set()
    records = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {_key(record) for record in records if record["task"] == task}
