"""Progress of training, live on a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastprompt._extras import require


@contextmanager
def progress() -> Iterator:
    """A live bar with loss, rate and time left, fed by `on_step`; off a terminal, a line an epoch or evaluation."""
    rich = require("rich.progress", "train")
    columns = (
        rich.TextColumn("{task.fields[stage]}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("loss {task.fields[loss]}  {task.fields[rate]} steps/s"),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns) as bar:
        if bar.console.is_terminal:
            task = bar.add_task("train", total=None, stage="", loss="", rate="")
        mean, stage = None, ""

        def on_step(record: dict) -> None:
            nonlocal mean, stage
            mean = record["loss"] if mean is None else 0.95 * mean + 0.05 * record["loss"]
            before = stage
            if "validation" in record:
                stage = f"validation {record['validation']:.2f} at step {record['step']}"
            elif "epoch" in record:
                stage = f"epoch {record['epoch']}"
            if bar.console.is_terminal:
                shown = {"stage": stage, "loss": f"{mean:.4f}", "rate": f"{1 / record['seconds']:.1f}"}
                bar.update(task, completed=record["step"], total=record["steps"], **shown)
            elif stage != before:
                print(f"{stage}: step {record['step']} of {record['steps']}, loss {mean:.4f}", flush=True)

        yield on_step
