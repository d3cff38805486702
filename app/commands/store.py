"""Caring for a store: `moescope store …`, and asking it in SQL: `moescope sql`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moescope.app import console
from moescope.probe.errors import InputError

StoreOption = Annotated[Path, typer.Option(help="The DuckDB file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    store = typer.Typer(help="Care for a store.", no_args_is_help=True)
    for command in (verify, repair, merge, delete, vacuum, migrate, log):
        store.command()(command)
    app.add_typer(store, name="store")
    app.command()(sql)


def verify(
    store: StoreOption,
    run: Annotated[str | None, typer.Option(help="Only this run; all without it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a run adds up: usage, routing rows, routed tokens, ranks and ids.

    Example: moescope store verify --store demo.duckdb
    """
    from moescope.probe.storage.store import Store
    from moescope.probe.storage.verify import verify_run

    opened = Store(store)
    names = [run] if run is not None else opened.runs()["run_id"].tolist()
    problems = {name: [str(problem) for problem in verify_run(opened, name)] for name in names}
    if as_json:
        console.print_json(problems)
    else:
        for name, found in problems.items():
            console.emit(f"run {name!r}: {'adds up' if not found else f'{len(found)} problems'}")
            for problem in found:
                console.emit(f"  {problem}")
    if any(problems.values()):
        raise typer.Exit(1)


def migrate(store: StoreOption) -> None:
    """Bring a store that an older moescope made up to date; its runs are kept.

    Example: moescope store migrate --store demo.duckdb
    """
    from moescope.probe.storage.migrate import migrate_store
    from moescope.probe.storage.schema import SCHEMA_VERSION

    before = migrate_store(store)
    if before == SCHEMA_VERSION:
        console.emit(f"{store} is of version {SCHEMA_VERSION} already")
    else:
        console.emit(f"{store} was of version {before} and is of version {SCHEMA_VERSION} now")


def repair(
    store: StoreOption,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Mend what interrupted or damaged collections left, and runs that contradict themselves.

    Whole shards that nobody ingested are ingested, damaged ones removed; prompts whose rows
    contradict each other are removed wholly, which the run's manifest then says.

    Example: moescope store repair --store demo.duckdb --dry-run
    """
    from moescope.probe.storage.repair import repair_store

    done = repair_store(store, dry_run=dry_run, announce=console.say)
    if as_json:
        console.print_json({"dry_run": dry_run, "done": done})
        return
    for sentence in done or ["nothing to mend"]:
        console.emit(f"would be done: {sentence}" if dry_run and done else sentence)


def merge(
    sources: Annotated[list[Path], typer.Argument(help="The stores whose runs are copied.")],
    into: Annotated[Path, typer.Option(help="The store they go into; made if it is missing.")],
    rename: Annotated[
        list[str] | None, typer.Option(help="OLD=NEW: another name for a run; may be repeated.")
    ] = None,
) -> None:
    """Copy the runs, plans and evaluations of stores into one; the sources stay as they are.

    Example: moescope store merge node-1.duckdb node-2.duckdb --into all.duckdb
    """
    from moescope.probe.storage.care import merge_stores

    names = {}
    for text in rename or []:
        old, equals, new = text.partition("=")
        if not (equals and old and new):
            raise InputError(f"--rename {text!r} must be OLD=NEW")
        names[old] = new
    for run in merge_stores(into, sources, rename=names, announce=console.say):
        named = f" as {run.name!r}" if run.name != run.run_id else ""
        what = "there already" if run.there_already else f"{run.rows:,} rows copied"
        console.emit(f"run {run.run_id!r} of {run.source}{named}: {what}")


def delete(
    store: StoreOption,
    run: Annotated[str, typer.Option(help="The run to delete.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a run with all its rows. The file gets smaller when it is vacuumed.

    Example: moescope store delete --store demo.duckdb --run base --yes
    """
    from moescope.probe.storage.care import delete_run

    if not yes:
        typer.confirm(f"delete run {run!r} of {store} with all its rows?", abort=True)
    rows = delete_run(store, run, announce=console.say)
    console.emit(
        f"run {run!r} deleted, {rows:,} rows; moescope store vacuum --store {store} gives the "
        "space back"
    )


def vacuum(store: StoreOption) -> None:
    """Write the store anew, without the space of what was deleted.

    Example: moescope store vacuum --store demo.duckdb
    """
    from moescope.probe.storage.care import vacuum_store

    done = vacuum_store(store, announce=console.say)
    console.emit(f"{store}: {done.before / 1e6:,.1f} MB before, {done.after / 1e6:,.1f} MB now")


def log(
    store: StoreOption,
    run: Annotated[str, typer.Option(help="The run.")],
    as_json: JsonOption = False,
) -> None:
    """Show what happened while a run was recorded, event by event.

    Example: moescope store log --store demo.duckdb --run base
    """
    from moescope.probe.storage.run_log import read_log

    events = read_log(store, run)
    if as_json:
        console.print_json(events)
        return
    for event in events:
        details = {name: value for name, value in event.items() if name not in ("at", "event")}
        words = ", ".join(f"{name} {value}" for name, value in details.items())
        console.emit(f"{event['at']}  {event['event']:10}  {words}".rstrip())


def sql(
    query: Annotated[str, typer.Argument(help="A query on the tables of the store.")],
    store: StoreOption,
    out: Annotated[
        Path | None, typer.Option(help="Write the result to FILE.csv, .parquet or .json.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to print.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Ask a store in SQL. It is read only, and nothing outside of the file can be reached.

    Example: moescope sql "SELECT run_id, count(*) FROM tokens GROUP BY ALL" --store demo.duckdb
    """
    import duckdb

    from moescope.probe.analysis.export import write_frame
    from moescope.probe.storage.store import Store

    try:
        frame = Store(store).query(query)
    except duckdb.Error as error:
        raise InputError(f"the query is wrong: {_first_lines(str(error).splitlines())}") from error
    if out is not None:
        write_frame(frame, out)
        console.say(f"{len(frame):,} rows written to {out}")
        return
    console.print_frame(frame, as_json=as_json, limit=None if as_json else rows)


def _first_lines(lines: Sequence[str]) -> str:
    """What DuckDB says without the picture of the query."""
    return " ".join(line.strip() for line in lines[:1])
