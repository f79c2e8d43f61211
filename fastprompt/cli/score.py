"""fastprompt score: predictions of a task against its data."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Columns, Option, app
from .evaluate import Csv, Json, write_scores
from .options import columns_of, names_and_values


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="xquad, mlqa, pawsx, or classification, tagging, qa, generation.")],
    data: Annotated[
        str, Option(help="The labelled examples: SQuAD's form, PAWS-X's .tsv, or any table of the task's columns.")
    ],
    predictions: Annotated[
        Path,
        Option(
            help="JSON: by id; JSON lines, CSV, TSV, Parquet: columns prediction and id; else one a line, in order."
        ),
    ],
    split: Annotated[str | None, Option(help="Of --data, where it has several.")] = None,
    columns: Columns = None,
    task_settings: Annotated[str | None, Option(help="As in training, such as problem=multi.")] = None,
    language: Annotated[
        str | None, Option(help="Of the contexts, which mlqa's rules go by; without it, by the name of --data.")
    ] = None,
    json_file: Json = None,
    csv_file: Csv = None,
) -> None:
    """Score predictions, in percent; those of xquad, mlqa and pawsx as the official scripts do."""
    from fastprompt import tasks
    from fastprompt.data.reading import check_choice
    from fastprompt.data.table import read_examples

    check_choice("task", task, ("xquad", "mlqa", "pawsx", "classification", "tagging", "qa", "generation"))
    named = columns_of("columns", columns)
    if task in ("xquad", "mlqa"):
        scores, scored = _score_answers(
            Path(data), predictions, _mlqa_language(Path(data), language) if task == "mlqa" else None
        )
    elif task == "pawsx" and not named:
        scores, scored = _score_labels(Path(data), predictions)
    else:
        made = tasks.get(task, **(names_and_values("task_settings", task_settings) if task_settings else {}))
        examples = read_examples(made, data, split=split, columns=named)
        found = _in_order(examples, _read(predictions), predictions, f"{data} has {len(examples)} examples")
        scores, scored = _scores(made, examples, found, language or "en"), f"{len(examples)} examples"
    write_scores(scores, json_file, None)
    write_scores({data: scores}, None, csv_file)
    typer.echo(", ".join(f"{name} {value:.2f}" for name, value in scores.items()) + f" ({scored})")


def _score_answers(data: Path, file: Path, language: str | None) -> tuple[dict[str, float], str]:
    from fastprompt.data.reading import shorten
    from fastprompt.data.squad import read_squad
    from fastprompt.tasks.metrics import mlqa_scores, squad_scores

    questions = read_squad(data)
    answers = _read(file)
    if isinstance(answers, list):
        ids = [question.id for question in questions]
        answers = dict(zip(ids, _in_order(questions, answers, file, f"{data} has {len(ids)} questions"), strict=True))
    for id, answer in answers.items():
        if not isinstance(answer, str):
            raise ValueError(f"{file}, id {id!r}: got {shorten(answer)}, expected a string")
    scores = squad_scores(questions, answers) if language is None else mlqa_scores(questions, answers, language)
    ids = {question.id for question in questions}
    missing, unknown = len(ids - answers.keys()), len(answers.keys() - ids)
    if missing:
        typer.echo(f"{missing} of {len(ids)} questions have no prediction: they score 0", err=True)
    if unknown:
        typer.echo(f"{unknown} of {len(answers)} predictions have an id that is not in the data: ignored", err=True)
    return scores, f"{len(questions)} questions"


def _score_labels(data: Path, file: Path) -> tuple[dict[str, float], str]:
    from fastprompt import tasks
    from fastprompt.data.pawsx import read_file
    from fastprompt.data.reading import shorten

    examples = read_file(data)
    found = _in_order(
        examples, _read(file), file, f"{data} has {len(examples)} pairs (those with NS or without a text left out)"
    )
    for number, label in enumerate(found, 1):
        if label not in ("0", "1"):
            raise ValueError(f"{file}, line {number}: got {shorten(label)}, expected 0 or 1")
    return _scores(tasks.get("pawsx"), examples, found, "en"), f"{len(examples)} pairs"


def _scores(task, examples: Sequence, found: Sequence[Any], language: str) -> dict[str, float]:
    task.fit(examples)
    predictions = [{"prediction": _like(example[-1], each)} for example, each in zip(examples, found, strict=True)]
    return task.scores(examples, predictions, language)


def _like(truth: Any, prediction: Any) -> Any:
    """A prediction as a table has it, of the kind of what is right: a number, or a list of tags or classes."""
    if isinstance(truth, float) and isinstance(prediction, str):
        return float(prediction)
    if isinstance(truth, list) and isinstance(prediction, str) and all(isinstance(each, str) for each in truth):
        return json.loads(prediction) if prediction.startswith("[") else prediction.split()
    return prediction


def _read(file: Path) -> dict[str, Any] | list[Any]:
    """Predictions by id, as strings, where the file has ids; else in order."""
    from fastprompt.data.reading import read_json, read_lines
    from fastprompt.data.table import read_rows

    if file.suffix == ".json":
        found = read_json(file)
        return found if isinstance(found, dict | list) else [found]
    if file.suffix not in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        return [line.strip() for line in read_lines(file)]
    rows = read_rows(str(file))
    for number, row in enumerate(rows, 1):
        if "prediction" not in row:
            raise ValueError(f"{file}, row {number}: no column prediction, only {', '.join(row)}")
    if not all("id" in row for row in rows):
        return [row["prediction"] for row in rows]
    by_id = {str(row["id"]): row["prediction"] for row in rows}
    if len(by_id) < len(rows):
        raise ValueError(f"{file} must have each id once, got {len(rows)} rows of {len(by_id)} ids")
    return by_id


def _in_order(examples: Sequence, found: dict | list, file: Path, there: str) -> list:
    """The prediction of each example: by its id where there are ids, which are compared as they are written.

    Raises:
        ValueError: some have none; `there` says what there is.
    """
    if isinstance(found, list):
        if len(found) != len(examples):
            raise ValueError(f"{file} has {len(found)} predictions, {there} to score, expected equally many")
        return found
    missing = [example.id for example in examples if str(example.id) not in found]
    if missing:
        raise ValueError(f"{file} has no prediction of {len(missing)} ids, such as {missing[0]!r}; {there} to score")
    return [found[str(example.id)] for example in examples]


def _mlqa_language(data: Path, language: str | None) -> str:
    named = re.fullmatch(r"\w+-context-(\w+)-question-\w+\.json", data.name)
    if named is None and language is None:
        raise ValueError(f"language must be given, {data.name} does not name that of the contexts")
    if named and language not in (None, named[1]):  # easily the language of the questions
        raise ValueError(f"language must be that of the contexts, {named[1]!r} by the name of {data}, got {language!r}")
    return language or named[1]
