"""fastprompt train and evaluate: a prompt for a language, or for a task."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from fastprompt._extras import require

from .app import Device, Option, app, one_clear_error, torch_device
from .progress import progress

Parallel = Annotated[
    Path | None,
    Option(help="English, tab, target language, a pair a line; or a .po file; or English alone, line by line."),
]
ParallelTarget = Annotated[Path | None, Option(help="The target language, where --parallel is English alone.")]
ThirdColumn = Annotated[
    str | None,
    Option(help="What that of --parallel is: label (trains a head, too), or ignore. None: there is none."),
]
Data = Annotated[str | None, Option(help="A task's data: its folder, or its name on the hub.")]

# What a run reads and writes; the other options, and names in a YAML file, are settings that decide its result.
_PLACES = ("backbone", "out", "parallel", "parallel_target", "third_column", "data", "language", "train_split")
_PLACES += ("validation_split",)


@app.command()
def train(
    context: typer.Context,
    config: Annotated[
        Path | None, Option(help="A YAML file of these options, with _ for -; what is given here is taken instead.")
    ] = None,
    backbone: Annotated[str | None, Option(help="Folder of a model, or its name on the hub.")] = None,
    out: Annotated[Path | None, Option(help="Folder of the run.")] = None,
    parallel: Parallel = None,
    parallel_target: ParallelTarget = None,
    third_column: ThirdColumn = None,
    task: Annotated[str | None, Option(help="pawsx, xquad or mlqa; without one the alignment alone trains.")] = None,
    data: Data = None,
    language: Annotated[str | None, Option(help="Of a task's labelled examples: en.")] = None,
    train_split: Annotated[
        str | None, Option(help='"train", or a file in SQuAD\'s form; "dev\\[:1400]" for a slice of its rows.')
    ] = None,
    validation_split: Annotated[str | None, Option(help="As --train-split; none: the last step counts.")] = None,
    method: Annotated[str | None, Option(help="With a task: prefix, prompt, lora, full or head.")] = None,
    examples: Annotated[int | None, Option(help="With a task: labelled examples to train on; all.")] = None,
    kind: Annotated[str | None, Option(help="Without a task: prefix (keys and values) or prompt (rows).")] = None,
    num_virtual_tokens: Annotated[int | None, Option(help="Length of the prompt: 16.")] = None,
    init_text: Annotated[str | None, Option(help="What the prompt begins as: with few examples, much better.")] = None,
    position_offset: Annotated[str | None, Option(help="Of the tokens' positions: peft (the prompt's length).")] = None,
    layers: Annotated[str | None, Option(help="Layers that get a prefix, such as 0,1,-1: all.")] = None,
    num_layers: Annotated[int | None, Option(help="With a task: use the first layers of the backbone only.")] = None,
    adapter_size: Annotated[int | None, Option(help="With a task: bottleneck adapters beside the prompt.")] = None,
    lora_rank: Annotated[int | None, Option(help="With --method lora: 8.")] = None,
    norms: Annotated[bool | None, Option("--norms", help="With a task: train the norms, too.")] = None,
    top_layers: Annotated[int | None, Option(help="With a task: train that many last layers, too.")] = None,
    train_head: Annotated[bool | None, Option("--train-head/--no-train-head", help="With a task: the head.")] = None,
    alignment: Annotated[float | None, Option(help="With a task: weight of the alignment of --parallel.")] = None,
    alignment_form: Annotated[str | None, Option(help="Of its inputs: sentence, or as the task's: task.")] = None,
    alignment_layer: Annotated[int | None, Option(help="Align what comes out of so many layers: the last.")] = None,
    alignment_schedule: Annotated[str | None, Option(help="Of that weight: constant, or linear to 0.")] = None,
    alignment_first: Annotated[int | None, Option(help="Steps of alignment alone, before those of the task.")] = None,
    alignment_batch_size: Annotated[int | None, Option(help="Pairs of a step, with a task.")] = None,
    distance: Annotated[
        str | None, Option(help="cosine, mse, smooth_l1, infonce, or several joined by +: infonce+cosine.")
    ] = None,
    temperature: Annotated[float | None, Option(help="Of infonce: 0.05.")] = None,
    pooling: Annotated[str | None, Option(help="A sentence's vector: mean, first or last row.")] = None,
    prefix_text: Annotated[str | None, Option(help='Put before each sentence, such as "query: " for E5.')] = None,
    max_length: Annotated[int | None, Option(help="Tokens of an input: 256, with a task 384.")] = None,
    stride: Annotated[int | None, Option(help="Tokens that windows of a long context share: 128.")] = None,
    epochs: Annotated[int | None, Option(help="Without a task: 5.")] = None,
    steps: Annotated[int | None, Option(help="With a task: 200.")] = None,
    batch_size: Annotated[int | None, Option(help="Pairs, or examples, of a step: 16.")] = None,
    max_tokens: Annotated[
        int | None, Option(help="Instead of --batch-size: tokens of a step, with prompt rows at the input.")
    ] = None,
    cache_layers: Annotated[
        bool | None,
        Option("--cache-layers", help="Compute the layers below the first prefix once, and keep that on disk."),
    ] = None,
    evaluate_every: Annotated[int | None, Option(help="With a task: steps between evaluations: 50.")] = None,
    patience: Annotated[int | None, Option(help="With a task: evaluations without a better one to stop after.")] = None,
    lr: Annotated[float | None, Option(help="Learning rate of the prompt: 0.01.")] = None,
    weights_lr: Annotated[float | None, Option(help="Of weights that train in the backbone: 0.001.")] = None,
    head_lr: Annotated[float | None, Option(help="Of a task's head: 0.001.")] = None,
    projection_lr: Annotated[float | None, Option(help="Of the alignment's projection: 0.0001.")] = None,
    seed: Annotated[int | None, Option(help="0.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = None,
) -> None:
    """Train a prompt: for a language, so that its sentences get the vectors of their English translations; or for a
    task (--task), with the alignment beside it.
    """
    with one_clear_error():
        given = {name: value for name, value in context.params.items() if value is not None}
        for name in ("config", "resume", "device"):
            given.pop(name, None)
        if config is not None:
            given = _read_config(config, task="task" in given) | given
        if isinstance(given.get("layers"), str):
            given["layers"] = _layers(given["layers"])
        places = {name: given.pop(name) for name in _PLACES if name in given}
        for name in ("backbone", "out"):
            if name not in places:
                raise ValueError(f"{name} must be given, with --{name} or in the file of --config")
        folder = Path(places.pop("out"))
        train_on = _train_task if "task" in given else _train_alignment
        with progress() as on_step:
            train_on(given, places, folder, device, resume, on_step)
        summary_file = folder / "summary.json"
        if not summary_file.is_file():
            typer.echo(f"Stopped before the first step. Go on with --resume and the same settings; --out {folder}")
            raise typer.Exit(130)
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    typer.echo(
        f"{summary['steps']} steps, loss {summary['loss']:.4f}, {summary['seconds_per_step']:.3f} s a step, "
        f"peak memory {summary['peak_memory_mb']:.0f} MiB; adapter and curves are in {folder}"
    )
    if summary["stopped"]:
        typer.echo("Stopped early; what was learned is kept. Go on with --resume and the same settings.")
        raise typer.Exit(130)


def _train_alignment(settings: dict, places: dict, out: Path, device: str | None, resume: bool, on_step) -> None:
    from fastprompt.training import TrainingConfig
    from fastprompt.training import train as run

    of_task = [name for name in ("data", "language", "train_split", "validation_split") if name in places]
    if of_task:
        raise ValueError(f"{', '.join(of_task)} must not be given without a task")
    if "parallel" not in places:
        raise ValueError("parallel must be given, with --parallel or in the file of --config")
    config = _config(TrainingConfig, settings)
    pairs = _pairs(places)
    model, tokenizer = _backbone(places["backbone"], device)
    run(model, tokenizer, pairs, out, config, resume=resume, on_step=on_step)


def _train_task(settings: dict, places: dict, out: Path, device: str | None, resume: bool, on_step) -> None:
    from fastprompt.tasks.data import read_examples
    from fastprompt.training.task_config import TaskConfig
    from fastprompt.training.task_loop import train_task

    config = _config(TaskConfig, settings)
    language = places.get("language", "en")
    read = [config.task, places.get("data", "."), language]
    examples = read_examples(*read, places.get("train_split", "train"))
    validation = read_examples(*read, places["validation_split"]) if "validation_split" in places else []
    pairs = _pairs(places) if "parallel" in places else ()
    model, tokenizer = _backbone(places["backbone"], device, task=True)
    train_task(
        *(model, tokenizer, examples, validation, config, out),
        language=language,
        pairs=pairs,
        resume=resume,
        on_step=on_step,
    )


def _config(kind: type, settings: dict):
    known = [field.name for field in dataclasses.fields(kind)]
    wrong = sorted(settings.keys() - set(known))
    if wrong:
        what = "with" if "task" in known else "without"
        raise ValueError(f"{', '.join(wrong)} is no setting of training {what} a task; there are {', '.join(known)}")
    return kind(**settings)


def _read_config(path: Path, task: bool) -> dict:
    """What a file says, each value of its setting's type; `task`: one is given already."""
    from fastprompt._settings import check_fields, read_yaml
    from fastprompt.training.config import TrainingConfig
    from fastprompt.training.task_config import TaskConfig

    about = read_yaml(path)
    wrong = sorted(about.keys() & {"config", "resume", "device"})
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} must be given on the command line")
    for name in _PLACES:
        if not isinstance(about.get(name, ""), str):
            raise ValueError(f"{path}: {name} must be a string, got {about[name]!r}")
    if isinstance(about.get("layers"), str):
        about["layers"] = _layers(about["layers"])
    return check_fields(TaskConfig if task or "task" in about else TrainingConfig, about, f"{path}: ")


@app.command()
def evaluate(
    backbone: Annotated[str, Option(help="Folder of a model, or its name on the hub.")],
    adapter: Annotated[Path, Option(help="Folder of a run, or of an adapter that PEFT wrote.")],
    parallel: Parallel = None,
    parallel_target: ParallelTarget = None,
    third_column: ThirdColumn = None,
    data: Data = None,
    languages: Annotated[str | None, Option(help="Of a task's run: languages to score, such as en,de.")] = None,
    split: Annotated[str, Option(help="Of a task's run: as --train-split of train.")] = "test",
    predictions: Annotated[Path | None, Option(help="Of a task's run: a folder for predictions to be scored.")] = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the scores here, too.")] = None,
    prefix_text: Annotated[str | None, Option(help="Put before each sentence: as in training.")] = None,
    pooling: Annotated[str | None, Option(help="mean, first or last row: as in training.")] = None,
    device: Device = None,
) -> None:
    """Score a run: of a language, the retrieval of English sentences by their translations, without and with the
    adapter (--parallel); of a task, its official scores in each language (--data, --languages).
    """
    with one_clear_error():
        from fastprompt._files import write_text
        from fastprompt.training import evaluate as score
        from fastprompt.training.task_evaluation import evaluate_task, write_predictions

        if not adapter.is_dir():
            raise FileNotFoundError(f"adapter must be a folder, {adapter} is none")
        if (parallel is None) == (data is None):
            raise ValueError("exactly one of --parallel (a language's run) and --data (a task's run) must be given")
        if parallel is not None:
            pairs = _pairs({"parallel": parallel, "parallel_target": parallel_target, "third_column": third_column})
            model, tokenizer = _backbone(backbone, device)
            scores = score(model, tokenizer, pairs, adapter, prefix_text=prefix_text, pooling=pooling)
            scores = {f"{name} adapter": each for name, each in scores.items()}
            title = f"Retrieval of the English sentence among {len(pairs)}"
        else:
            if not languages:
                raise ValueError("languages must be given with --data, such as --languages en,de")
            model, tokenizer = _backbone(backbone, device, task=True)
            scores, predicted = evaluate_task(model, tokenizer, adapter, data, languages.split(","), split)
            title = f"Scores of {adapter}"
            if predictions is not None:
                write_predictions(predictions, predicted)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            plain = {name.removesuffix(" adapter"): each for name, each in scores.items()}
            write_text(json_file, json.dumps(plain, indent=2) + "\n")
    table = require("rich.table", "train").Table(title=title)
    columns = list(dict.fromkeys(column for each in scores.values() for column in each))
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    for name, each in scores.items():
        table.add_row(name, *(f"{each[column]:.3f}" if column in each else "" for column in columns))
    require("rich.console", "train").Console().print(table)


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"layers must be numbers joined by commas, such as 0,1,-1, got {text!r}") from None


def _pairs(places: dict):
    from fastprompt.tasks.parallel import read_pairs

    return read_pairs(places["parallel"], places.get("parallel_target"), third_column=places.get("third_column"))


def _backbone(name: str, device: str | None, task: bool = False):
    """Model and tokenizer; for a task, a causal model comes with its head."""
    from fastprompt.training.encoding import load_backbone

    require("transformers", "train").utils.logging.disable_progress_bar()
    return load_backbone(name, torch_device(device), causal_head=task)
