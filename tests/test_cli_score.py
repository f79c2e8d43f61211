"""fastprompt score: each task, what is written, what is told, and one clear line for each thing that is wrong."""

import json
import re

import pytest
from typer.testing import CliRunner

from fastprompt import cli

CONTEXTS = {"1": "Der Hof des Bauern brannte.", "2": "Anna sah es vom Dorf aus."}
ANSWERS = {"1": "Der Hof des Bauern", "2": "Anna"}
NAMED = "dev-context-de-question-en.json"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paragraphs = [
        {"context": text, "qas": [{"id": id, "question": "?", "answers": [{"text": ANSWERS[id], "answer_start": 0}]}]}
        for id, text in CONTEXTS.items()
    ]
    for name in ("data.json", NAMED):
        write(tmp_path / name, {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]})
    write(tmp_path / "answers.json", {"1": "Hof, Bauern", "2": "anna"})
    (tmp_path / "dev-de.tsv").write_text("a\tb\t1\nNS\tb\t0\nc\td\t0\ne\tf\t1\n")
    (tmp_path / "dev_2k.tsv").write_text("id\tsentence1\tsentence2\tlabel\n7\ta\tb\t1\n8\tc\tNS\t1\n9\tc\td\t0\n")
    (tmp_path / "labels.txt").write_text("1\n1\n1\n")
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def score(task, data, predictions, *arguments):
    return CliRunner().invoke(cli.app, ["score", task, "--data", data, "--predictions", predictions, *arguments])


@pytest.mark.parametrize(
    ("arguments", "exact_match", "f1"),
    [
        (["xquad", "data.json", "answers.json"], 50.0, 100 * (2 / 3 + 1) / 2),
        (["xquad", "data.json", "answers.json", "--language", "de"], 50.0, 100 * (2 / 3 + 1) / 2),
        (["mlqa", NAMED, "answers.json"], 100.0, 100.0),
        (["mlqa", NAMED, "answers.json", "--language", "de"], 100.0, 100.0),
        (["mlqa", "data.json", "answers.json", "--language", "en"], 50.0, 100 * (2 / 3 + 1) / 2),
    ],
)
def test_answers(files, arguments, exact_match, f1):
    done = score(*arguments, "--json", "deep/scores.json")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"exact_match {exact_match:.2f}, f1 {f1:.2f} (2 questions)\n" and done.stderr == ""
    expected = {"exact_match": pytest.approx(exact_match), "f1": pytest.approx(f1)}
    assert json.loads((files / "deep" / "scores.json").read_text()) == expected


def test_missing_and_unknown_answers(files):
    write(files / "answers.json", {"2": "Anna", "3": "Hof", "4": "Dorf"})
    done = score("xquad", "data.json", "answers.json")
    assert done.exit_code == 0 and done.stdout == "exact_match 50.00, f1 50.00 (2 questions)\n"
    assert "1 of 2 questions have no prediction: they score 0" in done.stderr
    assert "2 of 3 predictions have an id that is not in the data: ignored" in done.stderr


def test_labels(files):
    done = score("pawsx", "dev-de.tsv", "labels.txt", "--json", "scores.json")
    assert done.exit_code == 0 and done.stdout == "accuracy 66.67 (3 pairs)\n", done.output
    assert json.loads((files / "scores.json").read_text()) == {"accuracy": 2 / 3 * 100}
    (files / "labels.txt").write_text("1\r\n0\r\n")
    done = score("pawsx", "dev_2k.tsv", "labels.txt")
    assert done.exit_code == 0 and done.stdout == "accuracy 100.00 (2 pairs)\n", done.output


TABLES = {
    "classification": ("text,label\na,no\nb,yes\n", "no\nno\n", "accuracy", 50.0),
    "tagging": ('{"words": ["a", "b"], "tags": ["O", "B-X"]}\n', '"[""O"", ""B-X""]"\n', "f1", 100.0),
    "qa": ('{"id": 7, "question": "?", "context": "a b", "answer": "b", "answer_start": 2}\n', "b\n", "f1", 100.0),
}


@pytest.mark.parametrize("task", TABLES)
def test_tables_of_ones_own(files, task):
    """Of every task, predictions in order or by id, of whatever type the ids are."""
    data, predicted, metric, expected = TABLES[task]
    name = "own.csv" if data.startswith("text") else "own.jsonl"
    (files / name).write_text(data)
    (files / "p.csv").write_text("prediction\n" + predicted)
    done = score(task, name, "p.csv", "--json", "scores.json", "--csv", "scores.csv")
    assert done.exit_code == 0, done.output
    assert json.loads((files / "scores.json").read_text())[metric] == pytest.approx(expected)
    assert (files / "scores.csv").read_text().startswith("scored,")
    ids = ["7"] if task == "qa" else ["0", "1"][: len(predicted.splitlines())]
    rows = [f"{id},{line}" for id, line in zip(ids, predicted.splitlines(), strict=True)]
    (files / "p.csv").write_text("\n".join(["id,prediction", *reversed(rows), ""]))
    done = score(task, name, "p.csv", "--json", "again.json")
    assert (files / "again.json").read_text() == (files / "scores.json").read_text(), done.output
    (files / "p.csv").write_text("id,prediction\nz,no\n")
    assert f"p.csv has no prediction of {len(rows)} ids, such as" in score(task, name, "p.csv").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["squad", "data.json", "answers.json"], "task must be one of xquad, mlqa, pawsx, .* got 'squad'"),
        (["xquad", "none.json", "answers.json"], r"none\.json"),
        (["xquad", "answers.json", "answers.json"], r"answers\.json, data: missing"),
        (
            ["xquad", "data.json", "labels.txt"],
            r"labels\.txt has 3 predictions, data\.json has 2 questions to",
        ),
        (["xquad", "data.json", "broken.json"], r"broken\.json, line 1, column 2: not JSON"),
        (["xquad", "data.json", "number.json"], r"number\.json, id '2': got 5, expected a string"),
        (
            ["mlqa", "data.json", "answers.json"],
            r"language must be given, data\.json does not name that of the context",
        ),
        (
            ["mlqa", NAMED, "answers.json", "--language", "en"],
            "language must be that of the contexts, 'de' .* got 'en'",
        ),
        (["mlqa", "data.json", "answers.json", "--language", "cy"], "language must be one of en, .* got 'cy'"),
        (["pawsx", "dev_2k.tsv", "labels.txt"], r"labels\.txt has 3 predictions, dev_2k\.tsv has 2 pairs .* to score"),
        (["pawsx", "dev-de.tsv", "words.txt"], r"words\.txt, line 2: got 'yes', expected 0 or 1"),
        (["pawsx", "data.json", "labels.txt"], r"data\.json, line 1: 1 column in .*, expected 3"),
    ],
)
def test_one_clear_error(files, arguments, message):
    (files / "broken.json").write_text("{1: 2}")
    write(files / "number.json", {"1": "Hof", "2": 5})
    (files / "words.txt").write_text("1\nyes\n0\n")
    done = score(*arguments, "--json", "scores.json")
    assert done.exit_code == 1
    assert re.search(f"^fastprompt: error: .*{message}.*\n$", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.output and not (files / "scores.json").exists()
