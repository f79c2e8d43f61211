"""fastprompt bench: our operators and training steps beside what a user would take otherwise."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .app import Option, app, one_clear_error, torch_device

ENCODER = "multilingual-e5-small"  # the backbone of end-to-end, in the folder of --models


@app.command()
def bench(
    groups: Annotated[
        list[str] | None,
        typer.Argument(
            help="attention, alignment, packing, pooling, step, launches, end-to-end, or how names of cases begin "
            '("attention/B8-"); all, or none: all of them.'
        ),
    ] = None,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, Option("--quick", help="A few cases of each, timed briefly, without memory.")] = False,
    out: Annotated[Path, Option(help="Folder of bench.json, bench.md and plots.")] = Path("bench"),
    budget: Annotated[
        float | None, Option(help="Seconds of timing for each case. Default 3, with --quick 0.5.")
    ] = None,
    models: Annotated[Path | None, Option(help="Folder with folders of real models, named as in the cases.")] = None,
    pairs: Annotated[Path | None, Option(help="Sentence pairs for step, as PAWS-X has them.")] = None,
    parallel: Annotated[
        Path | None, Option(help="Parallel sentences for end-to-end: English, tab, translation.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, Option(help="Measure nothing: tell what changed from OLD to NEW beyond noise.")
    ] = None,
) -> None:
    """Measure cases side by side, each way checked first; write JSON, Markdown and plots.

    With --compare OLD.json NEW.json the exit status is 2 if something has become slower, larger or wrong.
    """
    with one_clear_error():
        if compare:
            from fastprompt.bench import compare as comparison
            from fastprompt.bench.records import read

            old, new = map(read, compare)
            changes = comparison.compare(old, new)
            typer.echo("\n".join([*comparison.notes(old, new), comparison.table(changes)]))
            raise typer.Exit(2 if any(change.kind == comparison.REGRESSION for change in changes) else 0)
        if models:
            os.environ["FASTPROMPT_MODELS"] = str(models)
        if pairs:
            os.environ["FASTPROMPT_PAIRS"] = str(pairs)
        _measure(groups or ["all"], str(torch_device(device)), quick, out, budget, models, parallel)


def _measure(
    groups: list[str],
    device: str,
    quick: bool,
    out: Path,
    budget: float | None,
    models: Path | None,
    parallel: Path | None,
) -> None:
    from fastprompt._files import write_text
    from fastprompt.bench import end_to_end, launches, machine, records, registry
    from fastprompt.bench.plots import write_plots
    from fastprompt.bench.report import markdown
    from fastprompt.bench.run import measure
    from fastprompt.bench.table import live_table

    names = [*registry.GROUPS, registry.LAUNCHES, records.END_TO_END]
    chosen = names if "all" in groups else groups
    if registry.LAUNCHES in chosen:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "launches.md"
        write_text(file, launches.table(launches.rows(5 if quick else 30)) + "\n")
        typer.echo(file.read_text("utf-8") + str(file))
        if not (chosen := [name for name in chosen if name != registry.LAUNCHES]):
            return
    jobs = records.END_TO_END in chosen
    if jobs and not (models and parallel):
        if "all" not in groups:
            raise ValueError(f"models and parallel must be given for {records.END_TO_END}")
        typer.echo(f"{records.END_TO_END} is left out: it needs --models, with {ENCODER}, and --parallel")
        jobs = False
    machine.keep_freed_memory()
    cases = registry.cases([name for name in chosen if name != records.END_TO_END], quick=quick)
    budget = budget if budget is not None else 0.5 if quick else 3.0
    result = {
        "format": records.FORMAT,
        "machine": machine.describe(device),
        "state": {"before": machine.state(device)},
        "settings": {"groups": chosen, "quick": quick, "budget": budget},
        "cases": [],
    }
    out.mkdir(parents=True, exist_ok=True)

    def keep(record: dict) -> None:
        result["cases"].append(record)
        result["state"]["after"] = machine.state(device)
        records.write(out / "bench.json", result)
        show(record)

    rate = result["machine"]["memory_gbytes"] * 1e9
    with live_table(chosen) as show:
        for case in cases:
            keep(measure(case, device, budget=budget, memory=not quick, memory_rate=rate))
        if jobs:
            steps = 12 if quick else 100
            for record in end_to_end.measure_jobs(str(models / ENCODER), str(parallel), steps=steps):
                keep(record)
    (out / "bench.md").write_text(markdown(result), encoding="utf-8")
    for path in (out / "bench.json", out / "bench.md", *write_plots(result, out)):
        typer.echo(path)
    wrong = [record["name"] for record in result["cases"] if record["wrong"]]
    if wrong:
        raise ValueError(f"numbers are wrong in {', '.join(wrong)}")
