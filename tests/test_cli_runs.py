"""Whole runs from the command line: train, go on, evaluate, predict, embed, search, export."""

import csv
import json

import numpy as np
import pytest
from helpers import paraphrases, questions, save_backbone, translations, write_examples, write_questions
from typer.testing import CliRunner

from fastprompt import cli

SMALL = ["--max-length", 40, "--num-virtual-tokens", 2, "--batch-size", 8, "--epochs", 1]
COLUMNS = "text=first,text_pair=second,label=same"


def call(*arguments, input=None):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=input)


def good(*arguments, **more):
    done = call(*arguments, **more)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, tables whose columns have names of their own, and two runs: a task's and a language's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cli")
        patch.chdir(folder)
        patch.setenv("FASTPROMPT_CACHE", str(folder / "cache"))
        save_backbone("bert", folder / "backbone", num_hidden_layers=2)
        examples = paraphrases(12, seed=1)
        with (folder / "train.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("first", "second", "same"), *(each[1:] for each in examples)])
        with (folder / "new.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("nr", "first", "second"), *(each[:3] for each in examples)])
        pairs = translations(20)
        (folder / "pairs.tsv").write_text("".join(f"{pair.source}\t{pair.target}\n" for pair in pairs))
        (folder / "english.txt").write_text("".join(f"{pair.source}\n" for pair in pairs))
        data = ["--train", "train.csv", "--validation", "train.csv", "--columns", COLUMNS, "--parallel", "pairs.tsv"]
        done = good("train", "--backbone", "backbone", "--out", "task", "--task", "classification", *data, *SMALL)
        assert "Trained a prefix of 2 for the task classification, with an alignment, in 2 steps" in done.output
        assert "Best accuracy on the validation data: " in done.output
        assert "  fastprompt predict --adapter task --input new.csv" in done.output
        done = good("train", "--backbone", "backbone", "--out", "language", "--parallel", "pairs.tsv", *SMALL)
        assert "for an alignment with English in 3 steps" in done.output
        assert '  fastprompt search --adapter language --corpus english.txt --query "..."' in done.output
        yield folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("FASTPROMPT_CACHE", str(place / "cache"))


def test_a_run_goes_on(place, monkeypatch):
    """With nothing given again, from any folder; and longer."""
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert "in 2 steps" in good("train", "--resume", "--out", "../task").output
    assert "in 4 steps" in good("train", "--resume", "--out", "../task", "--epochs", 2).output
    done = call("train", "--resume", "--out", "../task", "--num-virtual-tokens", 3)
    assert "num_virtual_tokens must be as in the run in ../task, 2, or not given, got 3" in done.stderr


def test_predict(place):
    """Columns are those of the run; the rows are kept as they are; files, standard input and output alike."""
    assert (
        "12 predictions are in deep/p.csv"
        in good(*("predict", "--adapter", "task", "--input", "new.tsv", "--output", "deep/p.csv")).output
    )
    with open("deep/p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and list(rows[0]) == ["nr", "first", "second", "prediction", "probability"]
    assert rows[3]["nr"] == "p3" and {row["prediction"] for row in rows} <= {"0", "1"}
    good("predict", "--adapter", next((place / "task").glob("checkpoint-*")), "--input", "new.tsv")
    done = good("predict", "--adapter", "task", "--input", "-", input=(place / "new.tsv").read_text())
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prediction"] for line in lines] == [row["prediction"] for row in rows]
    done = good(
        *("predict", "--adapter", "task", "--input", "-", "--columns", "text=a,text_pair=b"),
        input='{"a": "w1 w2", "b": "w3", "more": [1]}\n',
    )
    assert json.loads(done.stdout).items() >= {"a": "w1 w2", "b": "w3", "more": [1]}.items()
    own = good("predict", "--adapter", "task", "--input", "-", input='{"text": "w1 w2", "text_pair": "w3"}\n')
    assert json.loads(own.stdout)["probability"] == json.loads(done.stdout)["probability"]  # without the run's columns


def test_evaluate_and_score(place):
    arguments = ["evaluate", "--adapter", "task", "--data", "train.csv", "--parallel", "pairs.tsv"]
    good(*arguments, "--json", "deep/s.json", "--csv", "s.csv", "--predictions", "predicted")
    scores = json.loads((place / "deep" / "s.json").read_text())
    assert set(scores) == {"en", "without", "with"} and set(scores["with"]) == {"r@1", "r@5", "cosine"}
    with open("s.csv", newline="") as file:
        rows = {row["scored"]: row for row in csv.DictReader(file)}
    assert float(rows["en"]["accuracy"]) == scores["en"]["accuracy"] and rows["en"]["r@1"] == ""
    done = good(
        *("score", "classification", "--data", "train.csv", "--columns", COLUMNS),
        *("--predictions", "predicted/en.jsonl", "--json", "again.json"),
    )
    assert json.loads((place / "again.json").read_text()) == scores["en"] and "(12 examples)" in done.output
    (place / "moved").mkdir()
    (place / "backbone").rename(place / "moved" / "backbone")
    try:
        assert "backbone" in call(*arguments).stderr
        good("evaluate", "--adapter", "language", "--parallel", "pairs.tsv", "--backbone", "moved/backbone")
    finally:
        (place / "moved" / "backbone").rename(place / "backbone")


def test_a_preset(place):
    """Its folder, and its languages."""
    for name, count in (("train-en", 9), ("dev-en", 4), ("test-en", 5), ("test-de", 6)):
        write_examples(place / f"{name}.tsv", paraphrases(count, seed=count))
    data = ["--task", "pawsx", "--data", ".", "--examples", 4, "--validation-split", "dev[:3]"]
    good("train", "--backbone", "backbone", "--out", "pawsx", *data, *SMALL)
    arguments = ["evaluate", "--adapter", "pawsx", "--data", "."]
    good(*arguments, "--languages", "en,de", "--json", "s.json", "--predictions", "pawsx-predicted")
    scores = json.loads((place / "s.json").read_text())
    assert set(scores) == {"en", "de"} and set(scores["de"]) == {"accuracy"}
    scored = good("score", "pawsx", "--data", "test-de.tsv", "--predictions", "pawsx-predicted/de.jsonl")
    assert f"accuracy {scores['de']['accuracy']:.2f} (6 pairs)" in scored.output
    assert "language must be one of" in call(*arguments, "--languages", "cy").stderr


def test_questions(place):
    """A preset on a file in SQuAD's form, and what it answers to questions whose answers are not known."""
    write_questions(place / "train.json", questions(5))
    write_questions(place / "xquad.de.json", questions(3, seed=2))
    data = ["--task", "xquad", "--train", "train.json[1:]", "--stride", 8]
    good("train", "--backbone", "backbone", "--out", "xquad", *data, *SMALL)
    assert json.loads((place / "xquad" / "run.json").read_text())["counts"]["given"] == 4
    arguments = ["evaluate", "--adapter", "xquad", "--data", ".", "--languages", "de", "--predictions", "answers"]
    good(*arguments, "--json", "s.json")
    scored = good("score", "xquad", "--data", "xquad.de.json", "--predictions", "answers/de.jsonl")
    assert f"f1 {json.loads((place / 's.json').read_text())['de']['f1']:.2f} (3 questions)" in scored.output
    done = good("predict", "--adapter", "xquad", "--input", "-", input='{"question": "w1", "context": "w1 w2 w3"}\n')
    assert isinstance(json.loads(done.stdout)["prediction"], str)


def test_embed_and_search(place):
    """Vectors of a corpus that were kept find what the corpus itself does."""
    common = ["--adapter", "language", "--input", "english.txt"]
    good("embed", *common, "--output", "target.npy")
    assert (
        "20 vectors of 48 numbers are in english.npy"
        in good("embed", *common, "--source", "--output", "english.npy").output
    )
    good("embed", *common, "--source", "--output", "english.parquet")
    assert np.load("english.npy").shape == (20, 48) and not np.array_equal(
        np.load("english.npy"), np.load("target.npy")
    )
    search = ["search", "--adapter", "language", "--top-k", 3, "--corpus"]
    found = [good(*search, "english.txt", "--query", "w21 w22", "--query", "w30").stdout]
    found += [good(*search, corpus, input="w21 w22\n\nw30\n").stdout for corpus in ("english.parquet", "english.npy")]
    rows = [[line.split("\t") for line in each.splitlines()] for each in found]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert [row[:4] for row in rows[2]] == [row[:4] for row in rows[0]] and rows[2][0][4] == ""
    query, rank, _, number, text = rows[0][3]
    assert (query, rank) == ("w30", "1") and (place / "english.txt").read_text().splitlines()[int(number) - 1] == text


def test_export(place, monkeypatch):
    from fastprompt import export

    monkeypatch.setattr(export, "push_to_hub", lambda folder, name, private: f"{folder} is in {name}, {private}")
    done = good("export", "task", "peft", "--to", "peft", "--push-to-hub", "me/model", "--private")
    assert done.stdout == "peft\npeft is in me/model, True\n"
    assert {"adapter_config.json", "README.md"} <= {file.name for file in (place / "peft").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--adapter", "none", "--input", "new.tsv"], "folder must be that of a run, got 'none'"),
        (["predict", "--adapter", "task", "--input", "none.csv"], "none.csv"),
        (["predict", "--adapter", "task", "--input", "new.tsv", "--output", "a.xls"], "output must end in .csv, .tsv"),
        (
            ["predict", "--adapter", "task", "--input", "english.txt"],
            "must have texts=2, as all examples, got no second one (text_pair)",
        ),
        (["predict", "--adapter", "task", "--input", "deep/p.csv"], "line 2: must have no column 'prediction'"),
        (["predict", "--adapter", "language", "--input", "new.tsv"], "adapter must be the run of a task"),
        (["evaluate", "--adapter", "task"], "data or parallel must be given"),
        (["evaluate", "--adapter", "language", "--data", "train.csv"], "data is for the run of a task"),
        (
            ["evaluate", "--adapter", "task", "--data", "train.csv", "--languages", "en,de"],
            "languages must be one for classification",
        ),
        (["embed", "--adapter", "language", "--input", "new.tsv", "--output", "a.npy"], "must have a column 'text'"),
        (["embed", "--adapter", "language", "--input", "english.txt", "--output", "a.bin"], "output must end in .npy"),
        (["export", "task", "x", "--to", "onnx"], "to must be one of"),
    ],
)
def test_one_clear_error(place, arguments, message):
    if "deep/p.csv" in arguments:
        (place / "deep").mkdir(exist_ok=True)
        (place / "deep" / "p.csv").write_text("first,second,prediction\nw1,w2,0\n")
    done = call(*arguments)
    assert done.exit_code == 1 and message in done.stderr and "Traceback" not in done.output, done.output
    assert not list(place.glob(".*part*"))
