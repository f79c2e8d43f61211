"""fastprompt export: a run in the forms that other software opens."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Backbone, Device, Option, app, quiet


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    directory: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[
        str,
        Option(
            help="sentence-transformers; peft; tokens (a soft prompt as new tokens); or merged (changed weights).",
            show_default=False,
        ),
    ],
    copy_backbone: Annotated[
        bool, Option("--copy-backbone", help="Write the frozen backbone, too, and not only its name.")
    ] = False,
    push_to_hub: Annotated[
        str | None, Option(help="Upload the folder to this repository of the Hugging Face Hub, such as me/model.")
    ] = None,
    private: Annotated[bool | None, Option("--private/--public", help="Whether a new repository is.")] = None,
    backbone: Backbone = None,
    device: Device = None,
) -> None:
    """Write a run as a folder that sentence-transformers, PEFT or transformers open, with a model card."""
    from fastprompt import export as forms
    from fastprompt.inference import load

    quiet()
    adapter = load(run, backbone=backbone, device=device)
    typer.echo(adapter.export(to, directory, copy_backbone=copy_backbone))
    if push_to_hub is not None:
        typer.echo(forms.push_to_hub(directory, push_to_hub, private=private))
