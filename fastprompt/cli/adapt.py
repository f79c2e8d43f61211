"""fastprompt train and evaluate: a prompt for a language."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fastprompt._extras import require

from .app import Backbone, Device, Option, app, one_clear_error

Parallel = Annotated[
    Path, Option(help="English, tab, target language, a pair a line; or a .po file; or English alone, line by line.")
]
ParallelTarget = Annotated[Path | None, Option(help="The target language, where --parallel is English alone.")]


@app.command()
def train(
    backbone: Backbone,
    parallel: Parallel,
    out: Annotated[Path, Option(help="Folder of the run.")],
    parallel_target: ParallelTarget = None,
    kind: Annotated[
        str, Option(help="prefix (keys and values in every layer) or prompt (rows at the input).")
    ] = "prefix",
    num_virtual_tokens: Annotated[int, Option(help="Length of the prompt.")] = 16,
    layers: Annotated[str | None, Option(help="Layers that get a prefix, such as 0,1,-1.  [default: all]")] = None,
    distance: Annotated[
        str, Option(help="cosine, mse, smooth_l1, infonce, or several joined by +.")
    ] = "infonce+cosine",
    temperature: Annotated[float, Option(help="Of infonce.")] = 0.05,
    pooling: Annotated[str, Option(help="A sentence's vector: mean, first or last row.")] = "mean",
    prefix_text: Annotated[str, Option(help='Put before each sentence, such as "query: " for E5.')] = "",
    max_length: Annotated[int, Option(help="Tokens of a sentence; what is longer is cut.")] = 256,
    epochs: int = 5,
    batch_size: int = 16,
    max_tokens: Annotated[
        int | None, Option(help="Instead of --batch-size: tokens of a step, with prompt rows at the input.")
    ] = None,
    cache_layers: Annotated[
        bool, Option("--cache-layers", help="Compute the layers below the first prefix once, and keep that on disk.")
    ] = False,
    lr: Annotated[float, Option(help="Learning rate of the prompt.")] = 1e-2,
    projection_lr: Annotated[float, Option(help="Learning rate of the projection.")] = 1e-4,
    seed: int = 0,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = None,
) -> None:
    """Train a prompt so that target sentences get the vectors of their English translations."""
    with one_clear_error():
        from fastprompt.training import TrainingConfig
        from fastprompt.training import train as run

        config = TrainingConfig(
            kind=kind,
            num_virtual_tokens=num_virtual_tokens,
            layers=_layers(layers),
            distance=distance,
            temperature=temperature,
            pooling=pooling,
            prefix_text=prefix_text,
            max_length=max_length,
            epochs=epochs,
            batch_size=batch_size,
            max_tokens=max_tokens,
            cache_layers=cache_layers,
            lr=lr,
            projection_lr=projection_lr,
            seed=seed,
        )
        model, tokenizer, pairs = _read(backbone, parallel, parallel_target, device)
        with _progress() as on_step:
            run(model, tokenizer, pairs, out, config, resume=resume, on_step=on_step)
        summary_file = out / "summary.json"
        if not summary_file.is_file():
            typer.echo(f"Stopped before the first step. Go on with --resume and the same settings; --out {out}")
            raise typer.Exit(130)
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    typer.echo(
        f"{summary['steps']} steps, loss {summary['loss']:.4f}, {summary['seconds_per_step']:.3f} s a step, "
        f"peak memory {summary['peak_memory_mb']:.0f} MiB; adapter and curves are in {out}"
    )
    if summary["steps"] < summary["planned_steps"]:
        typer.echo("Stopped early; what was learned is kept. Go on with --resume and the same settings.")
        raise typer.Exit(130)


@app.command()
def evaluate(
    backbone: Backbone,
    adapter: Annotated[Path, Option(help="Folder of a run, or of an adapter that PEFT wrote.")],
    parallel: Parallel,
    parallel_target: ParallelTarget = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the scores here, too.")] = None,
    prefix_text: Annotated[str | None, Option(help="Put before each sentence.  [default: as in training]")] = None,
    pooling: Annotated[str | None, Option(help="mean, first or last row.  [default: as in training]")] = None,
    device: Device = None,
) -> None:
    """Score the retrieval of English sentences by their translations, without and with the adapter."""
    with one_clear_error():
        from fastprompt._files import write_text
        from fastprompt.training import evaluate as score

        if not adapter.is_dir():
            raise FileNotFoundError(f"adapter must be a folder, {adapter} is none")
        model, tokenizer, pairs = _read(backbone, parallel, parallel_target, device)
        scores = score(model, tokenizer, pairs, adapter, prefix_text=prefix_text, pooling=pooling)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            write_text(json_file, json.dumps(scores, indent=2) + "\n")
    table = require("rich.table", "train").Table(title=f"Retrieval of the English sentence among {len(pairs)}")
    columns = list(scores["with"])
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("without", "with"):
        table.add_row(f"{name} adapter", *(f"{scores[name][c]:.3f}" if c in scores[name] else "" for c in columns))
    require("rich.console", "train").Console().print(table)


def _layers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"layers must be numbers joined by commas, such as 0,1,-1, got {text!r}") from None


def _read(backbone: str, parallel: Path, parallel_target: Path | None, device: str | None):
    """Model, tokenizer and pairs; the pairs first, since they are quick to be wrong."""
    import torch

    from fastprompt.tasks.parallel import read_pairs
    from fastprompt.training.encoding import load_backbone

    pairs = read_pairs(parallel, parallel_target)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a device of torch, got {device!r}: {error}") from error
    require("transformers", "train").utils.logging.disable_progress_bar()
    return *load_backbone(backbone, device), pairs


@contextmanager
def _progress() -> Iterator:
    """A live bar with loss, rate and time left, fed by `train`'s on_step; off a terminal, a line an epoch."""
    progress = require("rich.progress", "train")
    columns = (
        progress.TextColumn("epoch {task.fields[epoch]}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]}  {task.fields[rate]} steps/s"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as bar:
        if bar.console.is_terminal:
            task = bar.add_task("train", total=None, epoch=1, loss="", rate="")
        mean, epoch, seconds = None, 0, 0.0

        def on_step(record: dict) -> None:
            nonlocal mean, epoch, seconds
            mean = record["loss"] if mean is None else 0.95 * mean + 0.05 * record["loss"]
            seconds += record["seconds"]
            shown = {"epoch": record["epoch"], "loss": f"{mean:.4f}", "rate": f"{1 / record['seconds']:.1f}"}
            if bar.console.is_terminal:
                bar.update(task, completed=record["step"], total=record["steps"], **shown)
            elif record["epoch"] != epoch:
                epoch = record["epoch"]
                print(f"epoch {epoch}: step {record['step']} of {record['steps']}, loss {mean:.4f}", flush=True)

        yield on_step
