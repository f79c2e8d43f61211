"""fastprompt evaluate: the scores of a run."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fastprompt._extras import require

from .app import Adapter, Backbone, BatchSize, Columns, Device, Option, app, quiet
from .data import PRESETS, examples_in, recorded_columns
from .options import columns_of
from .progress import counting

Scores = dict[str, dict[str, float]]
Json = Annotated[Path | None, Option("--json", help="Write the scores here, too.", show_default=False)]
Csv = Annotated[Path | None, Option("--csv", help="The same as a table.", show_default=False)]


@app.command()
def evaluate(
    adapter: Adapter,
    data: Annotated[
        str | None, Option("--data", "--test", help="Labelled examples: a file, ...; of xquad, mlqa, pawsx the folder.")
    ] = None,
    split: Annotated[
        str | None, Option(help="Of --data, where it has several; a slice may follow: test[:100].")
    ] = None,
    columns: Columns = None,
    languages: Annotated[
        str | None, Option(help="Of xquad, mlqa, pawsx those to score, such as en,de; else that of --data.")
    ] = None,
    parallel: Annotated[str | None, Option(help="Translations: is the English sentence found by them?")] = None,
    parallel_target: Annotated[str | None, Option(help="As in training.")] = None,
    third_column: Annotated[str | None, Option(help="As in training.")] = None,
    parallel_columns: Annotated[str | None, Option(help="As in training.")] = None,
    predictions: Annotated[Path | None, Option(help="A folder for the predictions: LANGUAGE.jsonl.")] = None,
    json_file: Json = None,
    csv_file: Csv = None,
    batch_size: BatchSize = 32,
    backbone: Backbone = None,
    device: Device = None,
) -> None:
    """Score a run.

    On labelled examples (--data) its task; on translations (--parallel) how
    well they find their English sentences, without and with the adapter.
    """
    if data is None and parallel is None:
        raise ValueError("data or parallel must be given: what is the run to be scored on?")
    from fastprompt.data.parallel import read_pairs
    from fastprompt.inference import load

    named, parallel_named = columns_of("columns", columns), columns_of("parallel_columns", parallel_columns)
    quiet()
    loaded = load(adapter, backbone=backbone, device=device)
    scores: Scores = {}
    if data is not None:
        named = named or recorded_columns(loaded)
        scores |= _task_scores(loaded, data, split, named, languages, batch_size, predictions)
    if parallel is not None:
        pairs = read_pairs(parallel, parallel_target, third_column=third_column, columns=parallel_named)
        scores |= retrieval(loaded, pairs, batch_size)
    show_scores(f"Scores of {adapter}", scores)
    write_scores(scores, json_file, csv_file)


def _task_scores(loaded, data: str, split, columns, languages, batch_size: int, folder: Path | None) -> Scores:
    from fastprompt._files import write_text

    task = loaded.learner.task
    if task is None:
        raise ValueError("data is for the run of a task, and this one has none: give --parallel")
    chosen = languages.split(",") if languages else [loaded.language]
    if len(chosen) > 1 and task.name not in PRESETS:
        raise ValueError(f"languages must be one for {task.name}, that of the data, got {', '.join(chosen)}")
    tests = {language: examples_in(task, data, split=split, columns=columns, language=language) for language in chosen}
    scores: Scores = {}
    for language, examples in tests.items():
        with counting(f"inputs of {language}") as on_batch:
            found = loaded.predict(examples, batch_size=batch_size, on_batch=on_batch)
        scores[language] = task.scores(examples, found, language.partition("-")[0])
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            rows = [{"id": example.id} | each for example, each in zip(examples, found, strict=True)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / f"{language}.jsonl", text)
    return scores


def retrieval(loaded, pairs, batch_size: int = 32) -> Scores:
    """How well translations find their English sentences: by the backbone as it came, and with what was trained."""
    import torch

    from fastprompt.tasks.retrieval import retrieval_scores, sentence_groups

    sources, targets = ([getattr(pair, side) for pair in pairs] for side in ("source", "target"))
    groups = sentence_groups(loaded.learner.tokenize(sources))

    def vectors(texts: list[str], source: bool):
        return torch.from_numpy(loaded.encode(texts, source=source, batch_size=batch_size))

    english = vectors(sources, True)
    return {
        "without": retrieval_scores(vectors(targets, True), english, groups),
        "with": retrieval_scores(vectors(targets, False), english, groups),
    }


def show_scores(title: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print them as a table, a row for each language."""
    table = require("rich.table", "train").Table(title=title)
    names = list(dict.fromkeys(name for each in scores.values() for name in each))
    for heading in ("", *names):
        table.add_column(heading, justify="right" if heading else "left")
    for row, each in scores.items():
        table.add_row(row, *(f"{each[name]:.3f}" if name in each else "" for name in names))
    require("rich.console", "train").Console().print(table)


def write_scores(scores: Mapping[str, Any], json_file: Path | None, csv_file: Path | None) -> None:
    """Write scores by row as JSON, and as CSV."""
    from fastprompt._files import write_aside, write_text

    for file in (json_file, csv_file):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        write_text(json_file, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    if csv_file is not None:
        names = list(dict.fromkeys(name for each in scores.values() for name in each))

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["scored", *names])
                writer.writerows([row, *(each.get(name, "") for name in names)] for row, each in scores.items())

        write_aside(csv_file, write)
