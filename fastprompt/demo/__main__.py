"""The demo: adapt a real multilingual encoder to a scarce language, and compare with stock PEFT on this machine.

    python -m fastprompt.demo --language cy

Fetches the model and the sentences, trains and evaluates with the `fastprompt` command line, trains the same with stock
parts (fastprompt/demo/stock.py), each in a process of its own and on the CPU, and ends with a table of both and with a
search: which English sentences are nearest to some of the other language.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastprompt._extras import require
from fastprompt.data.examples import Pair
from fastprompt.demo.models import multilingual_e5_small
from fastprompt.demo.sentences import demo_sentences, django_wheel
from fastprompt.inference import load

EPOCHS = 10
BATCH_SIZE = 16
LEARNING_RATE = 2e-2  # over the run it is half of that: it rises, and falls to 0
QUERIES, TOP_K = 3, 3  # of the search
TEXT_PREFIX = "query: "  # multilingual-e5 was trained with it


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    path.write_text("".join(f"{pair.source}\t{pair.target}\n" for pair in pairs), encoding="utf-8")


def run(module: str, *arguments: object, log: Path | None = None) -> None:
    """Run `python -m module arguments`, its output on this terminal or in the file `log`.

    Raises:
        RuntimeError: it failed; with the end of `log`.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    if log is None:
        done = subprocess.run(command)
    else:
        with log.open("w") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        said = "" if log is None else f"; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{module} {arguments[0]} failed with exit status {done.returncode}{said}")


def comparison(ours: dict, stock: dict):
    """A rich table of both results; each as `fastprompt.demo.stock` writes it."""
    table = require("rich.table", "demo").Table(title="The same job, both run here one after the other")
    for heading in ("", "fastprompt", "stock PEFT", "stock / fastprompt"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, which in (("before", "without"), ("after", "with")):
        table.add_row(f"R@1 {name}", *(f"{result['scores'][which]['r@1']:.3f}" for result in (ours, stock)))
    for name, key, digits in (("seconds per step", "seconds_per_step", 3), ("peak memory, MiB", "peak_memory_mb", 0)):
        ratio = f"{stock[key] / ours[key]:.2f} x"
        table.add_row(name, *(f"{result[key]:.{digits}f}" for result in (ours, stock)), ratio)
    table.add_row("steps", str(ours["steps"]), str(stock["steps"]))
    return table


def answers(adapter: Path, pairs: Sequence[Pair]) -> Iterator[str]:
    """Lines of a search with some of the translations among all the English sentences; their own is marked."""
    require("transformers", "demo").utils.logging.disable_progress_bar()
    found = load(adapter, device="cpu")
    queries, english = [pair.target for pair in pairs[:QUERIES]], [pair.source for pair in pairs]
    for own, (query, hits) in enumerate(zip(queries, found.search(queries, english, top_k=TOP_K), strict=True)):
        yield query
        for hit in hits:
            yield f"  {hit.score:.3f}  {hit.text}" + ("  <- its translation" if hit.index == own else "")


def demo(language: str, out: Path, epochs: int) -> None:
    """Run the whole demo, leaving pairs, adapter, logs and result.json in a new folder below `out`."""
    console = require("rich.console", "demo").Console()
    begin = time.perf_counter()
    with console.status("Sentences: Django's translation catalogues"):
        test, train = demo_sentences(django_wheel(), language)
    console.print(f"Sentences: {len(train)} pairs English-{language} for training, {len(test)} others for testing")
    with console.status("Model: multilingual-e5-small (about 95 MB to fetch, once)"):
        backbone = multilingual_e5_small()
    console.print(f"Model: multilingual-e5-small in {backbone}")

    folder = out / f"{language}-{time.strftime('%Y%m%d-%H%M%S')}"  # a new one: what was trained before stays
    folder.mkdir(parents=True)
    adapter = folder / "adapter"
    for name, pairs in (("train", train), ("test", test)):
        write_pairs(folder / f"{name}.tsv", pairs)

    common = ["--backbone", backbone, "--epochs", epochs, "--batch-size", BATCH_SIZE, "--seed", 0]
    common += ["--prefix-text", TEXT_PREFIX, "--learning-rate", LEARNING_RATE]
    method = ["--method", "prefix", "--num-virtual-tokens", 16]
    method += ["--distance", "infonce+cosine", "--temperature", 0.05]
    where = ["--parallel", folder / "train.tsv", "--out", adapter, "--device", "cpu"]
    run("fastprompt", "train", *common, *method, *where)
    scored = ["--adapter", adapter, "--parallel", folder / "test.tsv", "--device", "cpu"]
    run("fastprompt", "evaluate", *scored, "--json", folder / "scores.json")
    with console.status("The same with stock PEFT"):
        files = ["--train", folder / "train.tsv", "--test", folder / "test.tsv", "--json", folder / "stock.json"]
        run("fastprompt.demo.stock", *common, *files, log=folder / "stock.log")

    ours = json.loads((adapter / "summary.json").read_text())
    ours["scores"] = json.loads((folder / "scores.json").read_text())
    stock = json.loads((folder / "stock.json").read_text())
    (folder / "result.json").write_text(json.dumps({"fastprompt": ours, "stock": stock}, indent=2) + "\n")
    console.print(comparison(ours, stock))
    console.print(f"A search: {language}, and the nearest of {len(test)} English sentences, with their cosines")
    for line in answers(adapter, test):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{time.perf_counter() - begin:.0f} s in all; everything is in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastprompt.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--language", default="cy", help="as Django names its catalogue (default: cy, Welsh)")
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder for results (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of both jobs (default: %(default)s)")
    given = parser.parse_args()
    if given.epochs < 1:
        parser.error(f"argument --epochs must be at least 1, got {given.epochs}")
    try:
        demo(given.language, given.out, given.epochs)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")


if __name__ == "__main__":
    main()
