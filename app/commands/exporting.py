"""`moescope export`: a stored run for other systems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.app import console
from moescope.probe.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("export")(export)


def export(
    format_name: Annotated[
        str | None, typer.Argument(metavar="FORMAT", help="See --list.", show_default=False)
    ] = None,
    store: Annotated[Path | None, typer.Option(help="The DuckDB file.")] = None,
    run: Annotated[str | None, typer.Option(help="The run.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file or folder to write.")] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Experts of each layer in a keep-list; else all.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder layers; else up to the last routed one.")
    ] = None,
    without_text: Annotated[
        bool,
        typer.Option("--without-text", help="Leave out prompts, answers and token strings."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="All formats.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list: as JSON.")] = False,
) -> None:
    """Write a run in the format of another system, or as an archive.

    Example: moescope export archive --store demo.duckdb --run base --out base.zip
    """
    if listed:
        _list_exporters(as_json=as_json)
        return
    if format_name is None or store is None or run is None or out is None:
        raise InputError("name FORMAT, --store, --run and --out; --list shows the formats")
    from moescope.probe.interchange.exporting import ExportOptions, export_run
    from moescope.probe.interchange.registry import exporter
    from moescope.probe.storage.store import Store

    options = ExportOptions(keep=keep, num_layers=num_layers, without_text=without_text)
    export_run(exporter(format_name), Store(store), run, out, options, force=force)
    console.say(f"run {run!r} written to {out}")


def _list_exporters(*, as_json: bool) -> None:
    from moescope.probe.interchange.registry import exporters

    rows = [
        {"format": one.name, "writes": one.description, "to": " or ".join(one.suffixes) or "folder",
         "versions": list(one.versions), "needs": one.needs}
        for one in exporters().values()
    ]  # fmt: skip
    if as_json:
        console.print_json(rows)
        return
    for row in rows:
        console.emit(f"{row['format']}: {row['writes']} ({row['to']})")
        console.emit(f"    versions: {', '.join(row['versions'])}")
        console.emit(f"    needs: {row['needs']}")
