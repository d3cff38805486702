"""Caring for a store: deleting runs, merging stores, giving space back.

All of these change a store in whole steps: whatever is killed when, every run is in it wholly or
not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb

from moescope.probe.errors import RunError, StoreError
from moescope.probe.storage.copying import OWN_TABLES, RUN_TABLES, SHARED_TABLES, copy_table
from moescope.probe.storage.faults import database_errors
from moescope.probe.storage.files import disk_errors, remove_folder, resolve_store
from moescope.probe.storage.locks import Announce, reading, rewriting, writing
from moescope.probe.storage.results import forget_results
from moescope.probe.storage.rows import transaction
from moescope.probe.storage.run_folder import check_run_name, run_folder
from moescope.probe.storage.run_log import run_log
from moescope.probe.storage.runs import claim_run

_PATIENCE_S: Final = 600.0


def delete_run(
    path: str | os.PathLike[str], run_id: str, *, announce: Announce | None = None
) -> int:
    """Delete a run and what is left of its shards. The file keeps its size until it is vacuumed.

    Args:
        path: the store.
        run_id: the run.
        announce: told what is waited for.

    Returns:
        Rows deleted.

    Raises:
        RunError: there is no such run, or it is being recorded right now.
    """
    store = resolve_store(path)
    with reading(store) as con:
        known = _run_ids(con)
    folder = run_folder(store, run_id)
    if run_id not in known and not folder.has_run():
        there = f"it has {', '.join(known)}" if known else "it has no runs"
        raise RunError(f"{store} has no run {run_id!r}; {there}")
    with claim_run(folder, run_id):
        rows = 0
        with (
            database_errors(f"deleting run {run_id!r} from {store}"),
            writing(store, wait_s=_PATIENCE_S, announce=announce) as con,
            transaction(con),
        ):
            for table in (*OWN_TABLES, *reversed(RUN_TABLES)):
                gone = con.execute(f"DELETE FROM {table} WHERE run_id = ?", [run_id]).fetchall()
                rows += int(gone[0][0])
        with disk_errors(f"removing {folder.path}"):
            remove_folder(folder.path)
            run_log(store, run_id).path.unlink(missing_ok=True)
            forget_results(store, run_id)
            if not any(folder.path.parent.iterdir()):
                folder.path.parent.rmdir()
    return rows


@dataclass(frozen=True)
class Vacuumed:
    """What a vacuum did: sizes of the file in bytes."""

    before: int
    after: int


def vacuum_store(path: str | os.PathLike[str], *, announce: Announce | None = None) -> Vacuumed:
    """Write the store anew, without the space of what was deleted; it takes the old one's place.

    Stored results of analyses go too. Readers and writers wait meanwhile. Needs as much free space
    as the new file takes.

    Raises:
        StoreError: the file is missing or no store.
        StoreBusyError: others kept the store for too long.
        MoescopeError: the disk is full; the store is as it was.
    """
    store = resolve_store(path)
    with (
        database_errors(f"vacuuming {store}"),
        rewriting(store, wait_s=_PATIENCE_S, announce=announce) as (old, new),
    ):
        before = store.stat().st_size
        for table in (*RUN_TABLES, *SHARED_TABLES, *OWN_TABLES):
            with transaction(new):
                copy_table(old, new, table)
    forget_results(store)
    return Vacuumed(before=before, after=store.stat().st_size)


@dataclass(frozen=True)
class Merged:
    """What became of one run in a merge: `copied` with its rows, or `there already`."""

    source: Path
    run_id: str
    name: str
    rows: int
    there_already: bool


def merge_stores(
    into: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    *,
    rename: Mapping[str, str] | None = None,
    announce: Announce | None = None,
) -> list[Merged]:
    """Copy the runs of stores into one, each in one transaction, with plans and evaluations.

    A run that is in the target already (same identity, plan of batches and time of beginning) is
    left out, so a merge that was killed goes on when it is started again.

    Args:
        into: the target; made when missing.
        sources: the stores whose runs are copied; they stay as they are.
        rename: new names of runs, by their old ones.
        announce: told what is waited for.

    Raises:
        RunError: two different runs have one name, a run is still being recorded, or a name to
            change does not occur; nothing is copied then.
        StoreError: a file is missing or no store, or source and target are the same.
    """
    target = resolve_store(into)
    renamed = dict(rename or {})
    planned = _plan_merge(target, [resolve_store(source) for source in sources], renamed)
    merged = []
    for source, run_id, name, there_already in planned:
        rows = 0
        if not there_already:
            with (
                database_errors(f"copying run {run_id!r} from {source} into {target}"),
                reading(source) as old,
                writing(target, wait_s=_PATIENCE_S, announce=announce) as new,
                transaction(new),
            ):
                for table in RUN_TABLES:
                    rows += copy_table(old, new, table, run_id=run_id, new_run_id=name)
        merged.append(Merged(source, run_id, name, rows, there_already))
    for source in dict.fromkeys(source for source, *_ in planned):
        _merge_shared(source, target, announce)
    return merged


def _plan_merge(
    target: Path, sources: Sequence[Path], rename: Mapping[str, str]
) -> list[tuple[Path, str, str, bool]]:
    """Source, run, new name and whether it is there already, for every run of every source."""
    taken = _runs(target) if target.exists() else {}
    unknown = set(rename)
    planned = []
    for source in sources:
        if source == target:
            raise StoreError(f"{source} cannot be merged into itself")
        for run_id, run in _runs(source).items():
            unknown.discard(run_id)
            name = rename.get(run_id, run_id)
            check_run_name(name)
            if run["status"] == "running":
                raise RunError(
                    f"run {run_id!r} of {source} is not complete; finish it there, then merge"
                )
            same = name in taken and taken[name]["fingerprint"] == run["fingerprint"]
            if name in taken and not same:
                raise RunError(
                    f"{target} and {source} have different runs {name!r}; give the one of "
                    f"{source.name} another name with --rename {run_id}=NAME"
                )
            planned.append((source, run_id, name, same))
            taken[name] = run
    if unknown:
        raise RunError(f"no store to merge has a run {sorted(unknown)[0]!r} to rename")
    return planned


def _runs(store: Path) -> dict[str, dict[str, Any]]:
    """Status of every run, and what tells it from others of its name."""
    with reading(store) as con:
        rows = con.execute(
            "SELECT run_id, status, epoch_us(created_at), source, manifest FROM main.runs "
            "ORDER BY created_at, run_id"
        ).fetchall()
    runs = {}
    for run_id, status, created, source, text in rows:
        manifest = json.loads(text)
        same = {key: manifest.get(key) for key in ("identity", "batch_plan")}
        runs[run_id] = {"status": status, "fingerprint": (created, source, same)}
    return runs


def _merge_shared(source: Path, target: Path, announce: Announce | None) -> None:
    """Plans, evaluations and measurements that the target does not have yet."""
    with (
        database_errors(f"copying plans and evaluations from {source} into {target}"),
        reading(source) as old,
        writing(target, wait_s=_PATIENCE_S, announce=announce) as new,
        transaction(new),
    ):
        copy_table(old, new, "plans", conflict="ON CONFLICT DO NOTHING")
        for table in ("evaluations", "measurements"):
            key = f"{table[:-1]}_id"
            known = {row[0] for row in new.execute(f"SELECT {key} FROM {table}").fetchall()}
            ids = [
                row[0]
                for row in old.execute(f'SELECT DISTINCT {key} FROM main."{table}"').fetchall()
                if row[0] not in known
            ]
            copy_table(old, new, table, among=(key, ids))


def _run_ids(con: duckdb.DuckDBPyConnection) -> list[str]:
    rows = con.execute("SELECT run_id FROM runs ORDER BY created_at, run_id").fetchall()
    return [row[0] for row in rows]
