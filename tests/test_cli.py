"""The command line: what it prints and writes, and one clear line for each thing that is wrong."""

import json
import re
import subprocess
import sys

import pytest
import transformers
from helpers import save_backbone
from typer.testing import CliRunner

from fastprompt import cli

PAIRS = "w1 w2\tw21 w22\nw3 w4 w5\tw23 w24 w25\nw6\tw26\nw7 w8\tw27 w28\nw9 w1\tw29 w21\n"
SMALL = ["--max-length", "30", "--num-virtual-tokens", "3", "--epochs", "2", "--batch-size", "2"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    save_backbone("bert", tmp_path / "backbone")
    (tmp_path / "pairs.tsv").write_text(PAIRS)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_info():
    done = subprocess.run([sys.executable, "-m", "fastprompt.cli", "info"], capture_output=True, text=True, check=True)
    assert "native libraries" in done.stdout and "prefix_attention" in done.stdout


def test_without_the_extra():
    """A plain install has no typer: info works all the same, the rest says what to install."""
    program = "import sys, runpy; sys.modules['typer'] = None; sys.argv = ['fastprompt', *sys.argv[1:]]; "
    program += "runpy.run_module('fastprompt.cli', run_name='__main__')"
    for command, code, said in (("info", 0, "native libraries"), ("train", 1, r"pip install 'fastprompt\[train\]'")):
        done = subprocess.run([sys.executable, "-c", program, command], capture_output=True, text=True)
        assert done.returncode == code and re.search(said, done.stdout + done.stderr), done.stderr


def test_train_and_evaluate(files):
    common = ["--backbone", "backbone", "--parallel", "pairs.tsv"]
    done = call("train", *common, "--out", "run", *SMALL, "--prefix-text", "w0 ", "--distance", "infonce")
    assert done.exit_code == 0, done.output
    assert re.search(r"6 steps, loss \d+\.\d+, .* adapter and curves are in run", done.output)
    assert "epoch 2: step 4 of 6" in done.output
    assert json.loads((files / "run" / "run.json").read_text())["config"]["prefix_text"] == "w0 "
    done = call("evaluate", *common, "--adapter", "run", "--json", "deep/scores.json")
    assert done.exit_code == 0, done.output
    scores = json.loads((files / "deep" / "scores.json").read_text())
    assert set(scores) == {"without", "with"} and set(scores["with"]) == {"r@1", "r@5", "cosine"}
    assert re.search(rf"with adapter .*{scores['with']['r@1']:.3f}.*{scores['with']['r@5']:.3f}", done.output)
    longer = call("train", *common, "--out", "run", *SMALL, "--prefix-text", "w0 ", "--distance", "infonce", "--resume")
    assert longer.exit_code == 0 and "6 steps" in longer.output
    budget = ["--max-tokens", "9", "--layers", "1,2", "--cache-layers"]
    done = call("train", *common, "--out", "budget", *SMALL, *budget)
    assert done.exit_code == 0, done.output
    config = json.loads((files / "budget" / "run.json").read_text())["config"]
    assert (config["max_tokens"], config["cache_layers"]) == (9, True)
    assert len(list((files / "cache" / "training").iterdir())) == 3  # teacher's vectors, twice, and hidden states


def test_a_third_column(files):
    """A label where that is asked for, and nothing where it is to be ignored."""
    (files / "labelled.tsv").write_text("".join(f"w{n} w{n + 1}\tw{n + 20}\t{'ab'[n % 2]}\n" for n in range(6)))
    common = ["--backbone", "backbone", "--parallel", "labelled.tsv"]
    for third, labels in (("label", ["a", "b"]), ("ignore", [])):
        done = call("train", *common, "--third-column", third, "--out", third, *SMALL)
        assert done.exit_code == 0, done.output
        assert json.loads((files / third / "run.json").read_text())["labels"] == labels
    done = call("evaluate", *common, "--third-column", "label", "--adapter", "label", "--json", "scores.json")
    assert done.exit_code == 0 and "accuracy" in json.loads((files / "scores.json").read_text())["with"]


def test_catalogues_and_aligned_files(files):
    (files / "cy.po").write_text(
        'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\nmsgid "w1 w2"\nmsgstr "w21"\n'
    )
    (files / "en.txt").write_text("w1\nw2\n")
    (files / "cy.txt").write_text("w21\nw22\n")
    sources = {"po": ["cy.po"], "aligned": ["en.txt", "--parallel-target", "cy.txt"]}
    for name, source in sources.items():
        done = call("train", "--backbone", "backbone", "--parallel", *source, "--out", name, *SMALL)
        assert done.exit_code == 0, done.output


def bad_inputs(files) -> dict[str, tuple[list, str]]:
    (files / "no_tab.tsv").write_text("w1\tw2\nw3 w4\n")
    (files / "licence.tsv").write_text("w1 w2\tw21\tCC-BY\nw3\tw23\tCC-BY\n")
    (files / "score.tsv").write_text("1.05\tw1 w2\tw21\n1.04\tw3\tw23\n")
    t5 = transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=48)
    transformers.T5Model(t5).save_pretrained(files / "t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (files / "t5" / name).write_bytes((files / "backbone" / name).read_bytes())
    return {
        "row without a tab": (["--parallel", "no_tab.tsv"], r"no_tab\.tsv, line 2: no tab in 'w3 w4', expected"),
        "no such file": (["--parallel", "none.tsv"], r"none\.tsv"),
        "a licence": (
            ["--parallel", "licence.tsv"],
            r"licence\.tsv: a third column, such as 'CC-BY', and",
        ),
        "a score": (
            ["--parallel", "score.tsv", "--third-column", "label"],
            "English side is a number in every row",
        ),
        "unknown layer": (["--layers", "0,7"], "layers must be indices of the backbone's 3 layers, got 7"),
        "layers that are none": (["--layers", "first"], "layers must be numbers joined by commas.* got 'first'"),
        "prompt longer than the table": (["--num-virtual-tokens", "64"], "num_virtual_tokens must leave room"),
        "unsupported family": (["--backbone", "t5"], "backbone of family 't5' is not served: .* got T5Model"),
        "no such backbone": (["--backbone", "./nowhere"], r"backbone '\./nowhere' must be a model's folder"),
        "no such device": (["--device", "abacus"], "device must be a device of torch, got 'abacus'"),
    }


@pytest.mark.parametrize("case", range(10))
def test_one_clear_error(files, case):
    arguments, message = list(bad_inputs(files).values())[case]
    base = ["--backbone", "backbone", "--parallel", "pairs.tsv", "--out", "run", *SMALL]
    done = call("train", *base, *arguments)
    assert done.exit_code == 1
    assert re.match(f"fastprompt: error: .*{message}", done.stderr), done.stderr
    assert "Traceback" not in done.output and not (files / "run").exists()


def test_checkpoint_of_another_shape(files):
    common = ["--parallel", "pairs.tsv", "--backbone"]
    assert call("train", *common, "backbone", "--out", "run", *SMALL).exit_code == 0
    save_backbone("bert", files / "deeper", num_hidden_layers=4)
    done = call("evaluate", *common, "deeper", "--adapter", "run")
    assert done.exit_code == 1
    assert re.search(r"prompt_embeddings .* must be \(3, 384\) for this backbone, got \(3, 288\)", done.stderr)
    done = call("evaluate", *common, "backbone", "--adapter", "nowhere")
    assert done.exit_code == 1 and "adapter must be a folder, nowhere is none" in done.stderr
