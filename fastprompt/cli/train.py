"""fastprompt train: a prompt for a language, for a task, or for both."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Device, Option, Training, app, is_main, quiet, say, torch_device
from .data import read_data
from .options import HelpAll, with_options
from .progress import training_progress
from .settings import from_run, options, pairs_of, plan, read_config, with_places

_MODEL = "Model and output"
Config = Annotated[
    Path | None, Option(help="A YAML file of options, with _ for -; those given here win.", rich_help_panel=_MODEL)
]
Resume = Annotated[bool, Option("--resume", help="Go on with the run in --out; nothing else need be given.")]
Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        help="Any other field of transformers' TrainingArguments; may be given again.",
        metavar="NAME=VALUE",
        rich_help_panel="Training",
        hidden=True,
    ),
]


@app.command(cls=Training)
@with_options(options())
def train(
    config: Config = None,
    resume: Resume = False,
    device: Device = None,
    help_all: HelpAll = False,
    settings: dict[str, Any] | None = None,
    set_: Set = None,
) -> None:
    """Train a prompt for a task, for a language, or for both.

    For a task, give labelled examples: --task, --train. For a language, give
    translations, so that its sentences get the vectors of the English ones:
    --parallel. Short names will do: --epochs, --steps, --batch-size, --lr.
    """
    settings = with_places(settings | ({"set": pairs_of(set_)} if set_ else {}))
    if config is not None:
        settings = with_places(read_config(config)) | settings
    for name in ("out",) if resume else ("backbone", "out"):
        if name not in settings:
            raise ValueError(f"{name} must be given, with --{name} or in the file of --config")
    from fastprompt.training.run import RUN, SUMMARY

    out = Path(settings["out"])
    if resume:
        settings = from_run(out, settings)
    elif (out / RUN).exists():
        raise FileExistsError(f"out {out} holds a run already: go on with it by --resume, or take another folder")
    trainer = start(settings, device)
    with training_progress() as callback:
        trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=resume or None)
        except KeyboardInterrupt:
            _stopped(out)
    if trainer.stopped:
        _stopped(out)
    if is_main():
        say(done(trainer, json.loads((out / SUMMARY).read_text(encoding="utf-8")), out))


def start(settings: dict[str, Any], device: str | None):
    """The Trainer of a run by its settings, its data read and its backbone loaded; nothing is written yet."""
    import transformers

    from fastprompt import tasks
    from fastprompt.training.trainer import Trainer

    quiet()
    wanted = torch_device(device)
    more = {"disable_tqdm": True} | ({"use_cpu": True} if wanted.type == "cpu" else {})
    run = plan(settings | {"set": more | settings.get("set", {})})
    here = run.arguments.device
    if wanted.type != here.type or wanted.index not in (None, here.index):
        raise ValueError(f"device must be cpu or {here}, got {device!r}: CUDA_VISIBLE_DEVICES chooses another GPU")
    places = run.places
    task = None if places.task is None else tasks.get(places.task, **(places.task_settings or {}))
    data = read_data(places, task)
    trainer = Trainer(
        places.backbone,
        run.arguments,
        task=task,
        train_dataset=data.examples,
        eval_dataset=data.validation,
        pairs=data.pairs,
        eval_pairs=data.validation_pairs,
        alignment=run.alignment,
        adapter=run.adapter,
        inputs=run.inputs,
        language=places.language,
        num_examples=places.examples,
        dtype=places.dtype,
        quantization=places.quantization,
        data={name: value for name, value in settings.items() if name != "out"},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _stopped(out: Path) -> None:
    say(f"Stopped; what was learned up to the last checkpoint is kept. Go on: fastprompt train --resume --out {out}")
    raise typer.Exit(130)


def done(trainer, summary: dict[str, Any], out: Path) -> str:
    """What was trained, where it is, how good it is, and what to do next."""
    learner = trainer.learner
    adapter, task = learner.adapter, learner.task
    what = {
        "prefix": f"a prefix of {adapter.num_virtual_tokens}",
        "prompt": f"a prompt of {adapter.num_virtual_tokens}",
        "lora": f"LoRA of rank {adapter.lora_rank}",
        "full": "the whole backbone",
        "head": "a head",
    }[adapter.method]
    purpose = "an alignment with English" if task is None else f"the task {task.name}"
    purpose += ", with an alignment," if task is not None and learner.alignment is not None else ""
    count = sum(parameter.numel() for parameter in learner.trained().values())
    lines = [
        f"Trained {what} for {purpose} in {summary['steps']} steps: {count:,} numbers, loss {summary['loss']:.4f}, "
        f"{summary['seconds_per_step']:.3f} s a step, peak memory {summary['peak_memory_mb']:.0f} MiB."
    ]
    state = trainer.state
    if state.best_metric is not None:
        name = (trainer.args.metric_for_best_model or "score").removeprefix("eval_")
        lines.append(f"Best {name} on the validation data: {state.best_metric:.4g}, at step {state.best_global_step}.")
        if state.best_metric == 0:  # the first of equals is kept, which has hardly trained
            lines.append("None was higher, and the first such weights are kept: train for more steps, or")
            lines.append("keep the last with --no-load-best-model-at-end.")
    lines.append(f"The run is in {out}. Next:")
    if task is None or task.name == "retrieval":
        lines.append(f'  fastprompt search --adapter {out} --corpus english.txt --query "..."')
        lines.append(f"  fastprompt embed --adapter {out} --input sentences.txt --output vectors.npy")
    else:
        lines.append(f"  fastprompt predict --adapter {out} --input new.csv --output predictions.csv")
    return "\n".join(lines)
