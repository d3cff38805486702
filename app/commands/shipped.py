"""The models that come with moescope: listed, and saved as plain transformers directories."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from moescope.app import console


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    models = typer.Typer(help="The shipped demo models.", no_args_is_help=True)
    models.command("list")(list_models)
    models.command("save")(save)
    app.add_typer(models, name="models")


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the shipped models: what they are, and how many experts were tuned to refuse.

    Example: moescope models list
    """
    from moescope.probe.demo.models import model_notes, shipped_models, tuned_experts

    rows = [
        (name, sum(map(len, tuned_experts(name).values())), model_notes(name))
        for name in shipped_models()
    ]
    if as_json:
        keys = ("name", "tuned_experts", "notes")
        console.print_json([dict(zip(keys, row, strict=True)) for row in rows])
        return
    console.print_rows(("name", "tuned experts", "notes"), rows)


def save(
    name: Annotated[str, typer.Argument(help="A shipped model.")],
    folder: Annotated[Path, typer.Argument(help="The directory; new or empty.")],
) -> None:
    """Save a shipped model as a directory that plain transformers loads.

    Example: moescope models save demo-random ./demo-random
    """
    from moescope.probe.demo.models import materialize, shipped_models
    from moescope.probe.errors import InputError

    if name not in shipped_models():
        raise InputError(
            f"there is no shipped model named {name!r}; there are {', '.join(shipped_models())}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and not an empty directory; name a new one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as temporary:
            materialize(name, Path(temporary) / name).replace(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    console.say(f"{name} is in {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r})")
