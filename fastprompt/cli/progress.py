"""Progress: a bar on a terminal, on stderr; elsewhere a line now and then, or nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastprompt._extras import require

from .app import is_main, say


@contextmanager
def training_progress() -> Iterator:
    """A callback for the Trainer: a live bar with loss, score and time left; off a terminal, a line an evaluation."""
    rich, console, transformers = require("rich.progress", "train"), _stderr(), require("transformers", "train")
    columns = (
        rich.TextColumn("{task.fields[stage]}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[loss]}"),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )
    live = console.is_terminal and is_main()
    with rich.Progress(*columns, console=console, disable=not live) as bar:
        task = bar.add_task("train", total=None, stage="training", loss="")

        class Shown(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs) -> None:
                bar.update(task, completed=state.global_step, total=state.max_steps)

            def on_log(self, args, state, control, logs=None, **kwargs) -> None:
                if "loss" in (logs or {}):
                    bar.update(task, loss=f"loss {float(logs['loss']):.4f}")

            def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
                text = shown_scores({name.removeprefix("eval_"): each for name, each in (metrics or {}).items()})
                bar.update(task, stage=text)
                if not live:
                    say(f"step {state.global_step} of {state.max_steps}: {text}")

        yield Shown()


# What the Trainer measures beside the scores.
_NO_SCORES = ("runtime", "samples_per_second", "steps_per_second", "epoch")


def shown_scores(scores: dict[str, float]) -> str:
    """ "accuracy 87.50, loss 0.3120", the Trainer's own measures left out."""
    return ", ".join(
        f"{name} {value:.4f}" if name in ("loss", "cosine") or name.startswith("r@") else f"{name} {value:.2f}"
        for name, value in scores.items()
        if isinstance(value, int | float) and name not in _NO_SCORES
    )


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done; they are counted on a terminal."""
    rich, console = require("rich.progress", "train"), _stderr()
    columns = (rich.SpinnerColumn(), rich.TextColumn("{task.completed} " + what), rich.TimeElapsedColumn())
    with rich.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda count: bar.advance(task, count)


def _stderr():
    return require("rich.console", "train").Console(file=sys.stderr)
