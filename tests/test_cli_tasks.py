"""Training on tasks and studies from the command line, and one clear line for each thing that is wrong."""

import json
import re

import pytest
import yaml
from helpers import paraphrases, questions, save_backbone, translations, write_examples, write_questions
from typer.testing import CliRunner

from fastprompt import cli

SMALL = {"num_virtual_tokens": 2, "max_length": 40, "stride": 8, "steps": 3, "batch_size": 4, "evaluate_every": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_backbone("bert", folder / "backbone", num_hidden_layers=2)
    for name, count in (("train-en", 9), ("dev-en", 4), ("test-en", 5), ("test-de", 6)):
        write_examples(folder / f"{name}.tsv", paraphrases(count, seed=count))
    write_questions(folder / "train.json", questions(5))
    write_questions(folder / "xquad.de.json", questions(3, seed=2))
    (folder / "pairs.tsv").write_text("".join(f"{pair.source}\t{pair.target}\n" for pair in translations(12)))
    return folder


@pytest.fixture(autouse=True)
def place(data, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def train(*arguments):
    options = [part for name, value in SMALL.items() for part in ("--" + name.replace("_", "-"), value)]
    return call("train", "--backbone", "data/backbone", "--out", "run", *options, *arguments)


def config(place, name="run") -> dict:
    return json.loads((place / name / "run.json").read_text())["config"]


def write(place, **about):
    (place / "settings.yaml").write_text(yaml.safe_dump(about))
    return ["--config", "settings.yaml"]


def failed(done, message) -> bool:
    said = re.fullmatch(rf"fastprompt: error: [^\n]*(?:{message})[^\n]*\n", done.stderr)
    return done.exit_code == 1 and said is not None and "Traceback" not in done.output


def test_options(place):
    done = train("--task", "pawsx", "--data", "data", "--examples", 4, "--validation-split", "dev[:3]", "--norms")
    assert done.exit_code == 0, done.output
    assert re.search(r"3 steps, loss \d+\.\d+, .* curves are in run", done.output)
    assert re.search(r"validation \d+\.\d\d at step 2: step 2 of 3, loss", done.output)
    about = config(place)
    assert (about["task"], about["examples"], about["norms"], about["steps"]) == ("pawsx", 4, True, 3)
    assert about["layers"] is None and about["train_head"] is True
    done = train("--task", "pawsx", "--data", "data", "--examples", 4, "--validation-split", "dev[:3]", "--norms")
    assert failed(done, "out run holds a run already")
    again = train(
        *("--task", "pawsx", "--data", "data", "--examples", 4, "--validation-split", "dev[:3]", "--norms"), "--resume"
    )
    assert again.exit_code == 0 and "3 steps" in again.output


def test_scores_of_each_language(place):
    common = ["--data", "data", "--validation-split", "dev"]
    assert train("--task", "pawsx", *common, "--alignment", 0.5, "--parallel", "data/pairs.tsv").exit_code == 0
    arguments = ["--backbone", "data/backbone", "--adapter", "run", "--data", "data", "--languages", "en,de"]
    done = call("evaluate", *arguments, "--predictions", "predicted", "--json", "deep/scores.json")
    assert done.exit_code == 0, done.output
    scores = json.loads((place / "deep" / "scores.json").read_text())
    assert set(scores) == {"en", "de"} and all(set(each) == {"accuracy"} for each in scores.values())
    assert re.search(rf"de .*{scores['de']['accuracy']:.3f}", done.output) and "adapter" not in done.output
    scored = call("score", "pawsx", "--data", "data/test-de.tsv", "--predictions", "predicted/de.txt")
    assert f"accuracy {scores['de']['accuracy']:.2f} (6 pairs)" in scored.output


def test_answers(place):
    done = train("--task", "xquad", "--train-split", "data/train.json[1:]", "--no-train-head", "--layers", "0,-1")
    assert done.exit_code == 0, done.output
    assert config(place)["layers"] == [0, -1] and config(place)["train_head"] is False
    arguments = ["--backbone", "data/backbone", "--adapter", "run", "--data", "data", "--languages", "de"]
    done = call("evaluate", *arguments, "--predictions", "predicted", "--json", "scores.json")
    assert done.exit_code == 0, done.output
    scored = call("score", "xquad", "--data", "data/xquad.de.json", "--predictions", "predicted/de.json")
    f1 = json.loads((place / "scores.json").read_text())["de"]["f1"]
    assert f"f1 {f1:.2f} (3 questions)" in scored.output


def test_a_file_of_settings_and_options_that_win(place):
    about = SMALL | dict(task="pawsx", data="data", backbone="data/backbone", out="run", lr=0.5, layers="0,1")
    done = call("train", *write(place, **about, method="prefix"), "--lr", 0.25, "--out", "other")
    assert done.exit_code == 0, done.output
    assert config(place, "other")["lr"] == 0.25 and config(place, "other")["layers"] == [0, 1]
    assert not (place / "run").exists()
    plain = {name: SMALL[name] for name in ("num_virtual_tokens", "max_length", "batch_size")}
    about = plain | dict(backbone="data/backbone", parallel="data/pairs.tsv", out="run", epochs=1, layers=[1])
    done = call("train", *write(place, **about))
    assert done.exit_code == 0 and config(place)["layers"] == [1], done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "squad"], "task must be one of .* got 'squad'"),
        (["--task", "retrieval", "--alignment", 1], "task must be one of xquad, mlqa, pawsx, got 'retrieval'"),
        (["--task", "pawsx", "--data", "nowhere/at/all"], "nowhere/at/all"),
        (["--task", "pawsx", "--data", "data", "--train-split", "trial"], "split must be one of .* got 'trial'"),
        (["--task", "pawsx", "--data", "data", "--language", "cy"], "language must be one of .* got 'cy'"),
        (["--task", "pawsx", "--data", "data", "--epochs", 3], "epochs is no setting of training with a task; there"),
        (["--task", "pawsx", "--data", "data", "--kind", "prefix"], "kind is no setting of training with a task; the"),
        (["--task", "pawsx", "--data", "data", "--alignment", 1], "pairs and an alignment above 0 go together, got 0"),
        (["--task", "pawsx", "--data", "data", "--parallel", "data/pairs.tsv"], "pairs and an alignment above 0 go"),
        (["--task", "pawsx", "--data", "data", "--examples", 10], "examples must be at most 9, .* got 10"),
        (["--task", "pawsx", "--data", "data", "--top-layers", 3], r"top_layers must be in \[0, 2\]"),
        (["--task", "pawsx", "--data", "data", "--max-length", 70], "max_length must be at most 62"),
        (["--task", "pawsx", "--data", "data", "--no-train-head"], "train_head must be True for pawsx"),
        (["--task", "pawsx", "--data", "data", "--resume"], "out run holds no run to resume"),
        (["--task", "xquad", "--train-split", "none.json"], r"none\.json"),
        (
            ["--parallel", "data/pairs.tsv"],
            "evaluate_every, steps, stride is no setting of training without a task; th",
        ),
        (["--data", "data"], "data must not be given without a task"),
    ],
)
def test_one_clear_error(place, arguments, message):
    assert failed(done := train(*arguments), message), done.output
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"task": "pawsx", "data": "data", "rate": 1},
            "rate is no setting of training with a task; there are task, me",
        ),
        ({"parallel": "data/pairs.tsv", "method": "lora"}, "method is no setting of training without a task"),
        ({"task": "pawsx", "resume": True}, r"settings\.yaml: resume must be given on the command line"),
        ({"task": None, "data": "data"}, r"settings\.yaml: task must be a string, got None"),
        ({"task": "pawsx", "data": "data", "lr": "fast"}, r"settings\.yaml: lr must be a number, got 'fast'"),
        ({"parallel": "data/pairs.tsv", "lr": "fast"}, r"settings\.yaml: lr must be a number, got 'fast'"),
        ({"task": "pawsx", "data": "data", "norms": 1}, r"settings\.yaml: norms must be true or false, got 1"),
        ({"parallel": "data/pairs.tsv", "cache_layers": "maybe"}, "cache_layers must be true or false, got 'maybe'"),
        ({"parallel": "data/pairs.tsv", "prefix_text": 5}, r"settings\.yaml: prefix_text must be a string, got 5"),
        ({"parallel": "data/pairs.tsv", "epochs": True}, r"settings\.yaml: epochs must be an integer, got True"),
        ({"parallel": 5}, r"settings\.yaml: parallel must be a string, got 5"),
        (
            {"parallel": "data/pairs.tsv", "layers": [0.5]},
            "layers must be a list, each of it an integer or no",
        ),
        ({"parallel": "data/pairs.tsv", "layers": "first"}, "layers must be numbers joined by commas"),
        ({"task": "pawsx", "data": "data", "backbone": "./nowhere"}, r"backbone '\./nowhere' must be a model's folder"),
        ({"task": "pawsx", "data": "data", "backbone": None}, "backbone must be given, with --backbone or in the file"),
        ({}, "parallel must be given, with --parallel or in the file of --config"),
    ],
)
def test_one_clear_error_of_a_file(place, about, message):
    about = {
        name: value for name, value in ({"backbone": "data/backbone"} | about).items() if name != "backbone" or value
    }
    assert failed(done := call("train", *write(place, **about), "--out", "run"), message), done.output
    assert not (place / "run").exists()


def test_words_and_numbers_of_a_file(place):
    """Plain values are what they look like."""
    (place / "settings.yaml").write_text(
        "task: pawsx\ndata: data\nbackbone: data/backbone\nmax_length: 40\nsteps: 3\nlr: 1e-2\nnorms: yes\n"
    )
    assert call("train", "--config", "settings.yaml", "--out", "run").exit_code == 0
    assert (config(place)["lr"], config(place)["norms"]) == (0.01, True)


def test_one_clear_error_of_evaluate(place):
    assert train("--task", "pawsx", "--data", "data").exit_code == 0
    common = ["--backbone", "data/backbone", "--adapter", "run"]
    for arguments, message in (
        ([], r"exactly one of --parallel \(a language's run\) and --data \(a task's run\) must be given"),
        (["--data", "data"], "languages must be given with --data"),
        (["--data", "data", "--languages", "en,cy"], "language must be one of .* got 'cy'"),
        (["--data", "data", "--languages", "en", "--split", "trial"], "split must be one of .* got 'trial'"),
        (["--data", "data", "--languages", "en", "--adapter", "data"], "adapter data must be the folder of a run on a"),
        (["--parallel", "data/pairs.tsv"], "adapter run must be the run of a language, got one on the task 'pawsx'"),
    ):
        assert failed(done := call("evaluate", *common, *arguments), message), done.output
    save_backbone("bert", place / "wider", num_hidden_layers=3)
    done = call("evaluate", *common, "--backbone", "wider", "--data", "data", "--languages", "en")
    assert failed(done, "does not fit the backbone and configuration"), done.output


def test_study(place):
    about = dict(task="pawsx", backbone="data/backbone", data="data", languages=["en", "de"], settings=SMALL)
    about |= dict(methods=["head", "prefix"], examples=[4], seeds=[0])
    arguments = ["study", "scarcity", *write(place, **about), "--out", "deep/out"]
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    assert re.search(r"^1/2 head 4 examples, seed 0: accuracy \d+\.\d\d \(\d+ s\)$", done.output, re.MULTILINE)
    assert (place / "deep" / "out" / "report.html").is_file() and "report.md" in done.output
    assert len((place / "deep" / "out" / "results.jsonl").read_text().splitlines()) == 2
    done = call(*arguments)
    assert done.exit_code == 0 and "1/2" not in done.output
    for changed, message in (
        ({"examples": "all"}, r"settings\.yaml: examples must be a list, got 'all'"),
        ({"data": "nowhere/at/all"}, "nowhere/at/all"),
        ({"settings": SMALL | {"steps": 9}}, "settings must be as in the study in deep/out"),
        ({"seed": 1}, r"settings\.yaml: unknown names \['seed'\]"),
    ):
        write(place, **about | changed)
        assert failed(done := call(*arguments), message), done.output
    assert failed(call("study", "scaling", *write(place, **about), "--out", "out"), "study must be one of .* 'scaling'")
    assert not (place / "out").exists()
