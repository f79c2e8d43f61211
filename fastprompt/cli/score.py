"""fastprompt score: predictions of a task against its data."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from .app import Option, app, one_clear_error

_TASKS = ("xquad", "mlqa", "pawsx")


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="xquad, mlqa or pawsx.")],
    data: Annotated[Path, Option(help="The task's file: JSON in SQuAD's form, or PAWS-X's .tsv.")],
    predictions: Annotated[
        Path, Option(help="JSON: answers by question id; for pawsx 0 or 1, one a line, for each pair that is scored.")
    ],
    language: Annotated[
        str | None, Option(help="Of the contexts, which mlqa's rules go by; without it, by the name of --data.")
    ] = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the scores here, too.")] = None,
) -> None:
    """Score predictions, in percent, as the task's official script does."""
    with one_clear_error():
        from fastprompt._files import write_text
        from fastprompt.tasks._reading import check_choice

        check_choice("task", task, _TASKS)
        if task == "pawsx":
            scores, scored = _score_labels(data, predictions)
        else:
            scores, scored = _score_answers(
                data, predictions, _mlqa_language(data, language) if task == "mlqa" else None
            )
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            write_text(json_file, json.dumps(scores) + "\n")
    typer.echo(", ".join(f"{name} {value:.2f}" for name, value in scores.items()) + f" ({scored})")


def _score_answers(data: Path, predictions: Path, language: str | None) -> tuple[dict[str, float], str]:
    from fastprompt.tasks.metrics import mlqa_scores, squad_scores
    from fastprompt.tasks.squad import read_squad

    questions = read_squad(data)
    answers = _read_answers(predictions)
    scores = squad_scores(questions, answers) if language is None else mlqa_scores(questions, answers, language)
    ids = {question.id for question in questions}
    missing, unknown = len(ids - answers.keys()), len(answers.keys() - ids)
    if missing:
        typer.echo(f"{missing} of {len(ids)} questions have no prediction: they score 0", err=True)
    if unknown:
        typer.echo(f"{unknown} of {len(answers)} predictions have an id that is not in the data: ignored", err=True)
    return scores, f"{len(questions)} questions"


def _score_labels(data: Path, predictions: Path) -> tuple[dict[str, float], str]:
    from fastprompt.tasks._reading import read_lines, shorten
    from fastprompt.tasks.metrics import accuracy
    from fastprompt.tasks.pawsx import read_file

    examples = read_file(data)
    labels = [line.strip() for line in read_lines(predictions)]
    for number, label in enumerate(labels, 1):
        if label not in ("0", "1"):
            raise ValueError(f"{predictions}, line {number}: got {shorten(label)}, expected 0 or 1")
    if len(labels) != len(examples):
        raise ValueError(
            f"{predictions} has {len(labels)} predictions, {data} has {len(examples)} pairs to score "
            "(those with NS or without a text left out), expected equally many"
        )
    return accuracy([example.label for example in examples], [int(label) for label in labels]), f"{len(examples)} pairs"


def _mlqa_language(data: Path, language: str | None) -> str:
    named = re.fullmatch(r"\w+-context-(\w+)-question-\w+\.json", data.name)
    if named is None and language is None:
        raise ValueError(f"language must be given, {data.name} does not name that of the contexts")
    if named and language not in (None, named[1]):  # easily the language of the questions
        raise ValueError(f"language must be that of the contexts, {named[1]!r} by the name of {data}, got {language!r}")
    return language or named[1]


def _read_answers(path: Path) -> dict[str, str]:
    from fastprompt.tasks._reading import read_json, shorten

    answers = read_json(path)
    if not isinstance(answers, dict):
        raise ValueError(f"{path}: got {shorten(answers)}, expected an object of answers by question id")
    for id, answer in answers.items():
        if not isinstance(answer, str):
            raise ValueError(f"{path}, id {id!r}: got {shorten(answer)}, expected a string")
    return answers
