"""fastprompt study: a grid of runs, and its report."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, Option, app, quiet, torch_device


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="scarcity, stability or pseudo.")],
    config: Annotated[Path, Option(help="YAML file: see fastprompt.experiments.config.StudyConfig.")],
    out: Annotated[Path, Option(help="Folder of results and report; what is done there is not done again.")],
    device: Device = None,
) -> None:
    """Run methods side by side over numbers of examples, languages and seeds, and write report.html and report.md.

    A study that was stopped goes on where it was. The report is written anew after each run.
    """
    from fastprompt.experiments.config import read_study
    from fastprompt.experiments.report import write_report
    from fastprompt.experiments.study import run_study

    quiet()
    settings = read_study(config, study=name)

    def on_run(number: int, total: int, run, record: dict | None) -> None:
        what = " ".join(str(part) for part in (run.method, run.variant, f"{run.examples} examples") if part)
        if record is None:
            typer.echo(f"{number}/{total} {what}, seed {run.seed}", nl=False)
            return
        metrics = list(next(iter(record["scores"].values())))
        means = {m: sum(s[m] for s in record["scores"].values()) / len(record["scores"]) for m in metrics}
        shown = ", ".join(f"{metric} {value:.2f}" for metric, value in means.items())
        typer.echo(f": {shown} ({record['seconds']:.0f} s)")
        write_report(out)

    run_study(settings, out, device=torch_device(device), on_run=on_run)
    page, markdown = write_report(out)
    typer.echo(f"{page}\n{markdown}")
