"""`moescope import` and `moescope export`: the formats of other systems."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moescope.app import console
from moescope.probe.errors import ImportFileError, InputError

if TYPE_CHECKING:
    from moescope.probe.interchange.report import ImportReport

_ARCHIVE: Final = "archive"


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""

    @app.command("import")
    def import_(
        format_name: Annotated[
            str | None, typer.Argument(metavar="FORMAT", help="See --list.", show_default=False)
        ] = None,
        paths: Annotated[
            list[Path] | None, typer.Argument(metavar="PATH…", help="Files or folders of it.")
        ] = None,
        store: Annotated[Path | None, typer.Option(help="The DuckDB file.")] = None,
        run: Annotated[str | None, typer.Option(help="The run's name.")] = None,
        model: Annotated[str | None, typer.Option(help="The model's name.")] = None,
        num_experts: Annotated[
            int | None, typer.Option(min=1, help="Experts of a layer, where the source is silent.")
        ] = None,
        top_k: Annotated[
            int | None, typer.Option(min=1, help="Experts a token, where the source is silent.")
        ] = None,
        layers: Annotated[
            str | None, typer.Option(help="Decoder layers of the source's layers, as 1-26.")
        ] = None,
        rule: Annotated[
            str | None,
            typer.Option(
                help="Logits only: softmax, softmax-renormalized, softmax-of-chosen, sigmoid, or "
                "what `moescope doctor MODEL --json` printed, in a file."
            ),
        ] = None,
        listed: Annotated[bool, typer.Option("--list", help="All formats.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    ) -> None:
        """Store what another system recorded as a run.

        Example: moescope import esft law summary --store esft.duckdb --run tasks
        """
        if listed:
            _list_importers(as_json=as_json)
            return
        if format_name is None or not paths or store is None or run is None:
            raise InputError("name FORMAT and PATH, --store and --run; --list shows the formats")
        from moescope.probe.analysis.filters import parse_layers
        from moescope.probe.interchange.imported import ImportOptions

        options = ImportOptions(
            model=model, num_experts=num_experts, top_k=top_k,
            layers=None if layers is None else parse_layers(layers), rule=rule,
        )  # fmt: skip
        _import(format_name, paths, store, run, options, as_json=as_json)


def _import_archive(paths: list[Path], store: Path, run: str, *, as_json: bool) -> None:
    """A run that `moescope export archive` wrote comes back as it was, tables and all."""
    from moescope.probe.interchange.archive import read_archive
    from moescope.probe.interchange.files import one_file

    report = read_archive(one_file(paths, _ARCHIVE), store, run, announce=console.say)
    _tell(report, store, run, as_json=as_json)


def _tell(report: ImportReport, store: Path, run: str, *, as_json: bool) -> None:
    if as_json:
        console.print_json({**report.to_json(), "lacks": report.lacks})
        return
    for line in report.lines():
        console.say(line)
    console.say(f"run {run!r} is in {store}")


def _import(
    format_name: str, paths: list[Path], store: Path, run: str, options: object, *, as_json: bool
) -> None:
    from moescope.probe.interchange.assemble import assemble
    from moescope.probe.interchange.files import digest
    from moescope.probe.interchange.into_store import store_import
    from moescope.probe.interchange.registry import importer
    from moescope.probe.storage.runs import check_run_name, check_store_target

    if format_name == _ARCHIVE:
        _import_archive(paths, store, run, as_json=as_json)
        return
    reader = importer(format_name)
    check_run_name(run)
    check_store_target(store)
    for path in paths:
        if not path.exists():
            raise ImportFileError(f"{path} does not exist")
    try:
        imported = reader.read(paths, options)  # type: ignore[arg-type]
        assembled = assemble(imported, options, digest(paths))  # type: ignore[arg-type]
    except ImportFileError as error:
        named = ", ".join(str(path) for path in paths)
        told = str(error)
        raise ImportFileError(told if str(paths[0]) in told else f"{named}: {told}") from error
    with console.progress(f"importing {run}", "prompts") as update:
        store_import(assembled, store, run, announce=console.say, progress=update)
    _tell(imported.report, store, run, as_json=as_json)


def _list_importers(*, as_json: bool) -> None:
    from moescope.probe.interchange.registry import importers

    rows = [
        {"format": one.name, "files": one.description, "versions": list(one.versions),
         "holds": one.holds}
        for one in importers().values()
    ]  # fmt: skip
    rows.append(
        {"format": _ARCHIVE, "files": "a run that `moescope export archive` wrote (.zip)",
         "versions": ["moescope-archive 1"], "holds": "everything that the run held"}
    )  # fmt: skip
    if as_json:
        console.print_json(rows)
        return
    for row in rows:
        console.emit(f"{row['format']}: {row['files']}")
        console.emit(f"    versions: {', '.join(row['versions'])}")
        console.emit(f"    holds: {row['holds']}")
