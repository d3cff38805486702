"""Mending a store: what an interrupted or damaged collection left, and runs that contradict.

What is mended is said, one sentence each, and nothing is invented: rows that contradict each other
are removed with their whole prompts, and the run's manifest says how many and why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import duckdb

from moescope.probe.errors import MoescopeError, RunError
from moescope.probe.storage.copying import RUN_TABLES
from moescope.probe.storage.faults import database_errors
from moescope.probe.storage.files import (
    REMOVED_PREFIX,
    TEMPORARY_PREFIX,
    disk_errors,
    remove_folder,
    remove_leftovers,
    resolve_store,
)
from moescope.probe.storage.in_shards import is_in_shards
from moescope.probe.storage.ingest import main as ingest
from moescope.probe.storage.locks import Announce, reading, writing
from moescope.probe.storage.rows import transaction
from moescope.probe.storage.run_folder import (
    RunDescription,
    RunFolder,
    run_folder,
    shards_beside,
)
from moescope.probe.storage.runs import claim_run
from moescope.probe.storage.shards import finished_shards, read_shard, remove_shard
from moescope.probe.storage.verify import damaged_shards, find_problems

_PROMPT_TABLES: Final = tuple(
    name for name in RUN_TABLES if name not in ("runs", "layers", "ingested_shards")
)
_PATIENCE_S: Final = 600.0


def repair_store(
    path: str | os.PathLike[str], *, dry_run: bool = False, announce: Announce | None = None
) -> list[str]:
    """Mend what can be mended; runs that are being recorded right now are left alone.

    In this order: half-written files are removed; damaged shards are removed (the run's own command
    records them anew); whole shards that no ingester took are ingested; rows without a run are
    removed; of complete or failed runs, prompts whose rows contradict each other are removed, and
    the counts set right.

    Args:
        path: the store.
        dry_run: only say what would be done.
        announce: told what is waited for.

    Returns:
        One sentence for everything that was done, or would be.

    Raises:
        StoreError: the file is missing or no store.
        MoescopeError: the disk is full, or shards cannot be ingested.
    """
    store = resolve_store(path)
    with reading(store):
        pass
    done = [*_mend_folders(store, dry_run)]
    with database_errors(f"looking for rows of no run in {store}"):
        with reading(store, with_shards=False) as con:
            orphans = _orphans(con)
        with reading(store) as con:
            contradicting = _contradicting(con, store)
            in_shards = [
                run_id
                for run_id, (prompts, _) in contradicting.items()
                if prompts and is_in_shards(con, run_id)
            ]
    for table, rows in orphans.items():
        done.append(f"{table}: {rows:,} rows that belong to no run removed")
    for run_id in in_shards:
        prompts, reason = contradicting.pop(run_id)
        done.append(_mend_run_in_shards(store, run_id, prompts, reason, dry_run))
    for run_id, (prompts, reason) in contradicting.items():
        done.append(
            f"run {run_id!r}: {len(prompts)} prompts with contradicting rows removed ({reason})"
            if prompts
            else f"run {run_id!r}: its counts set right ({reason})"
        )
    if not dry_run and (orphans or contradicting):
        with (
            database_errors(f"repairing {store}"),
            writing(store, wait_s=_PATIENCE_S, announce=announce) as con,
            transaction(con),
        ):
            for table in orphans:
                con.execute(
                    f"DELETE FROM {table} WHERE run_id NOT IN (SELECT run_id FROM runs)"
                ).fetchall()
            for run_id, (prompts, reason) in contradicting.items():
                _drop_prompts(con, run_id, prompts, reason)
    return done


def _mend_folders(store: Path, dry_run: bool) -> Iterator[str]:
    """What collections left beside the store."""
    beside = shards_beside(store)
    if not beside.is_dir():
        return
    for path in sorted(entry for entry in beside.iterdir() if entry.is_dir()):
        if path.name.startswith((TEMPORARY_PREFIX, REMOVED_PREFIX)):
            yield f"{path} removed: it is half-written"
            if not dry_run:
                with disk_errors(f"removing {path}"):
                    remove_folder(path)
            continue
        yield from _mend_folder(store, RunFolder(path), dry_run)
    if not dry_run:
        with suppress(OSError):  # still in use
            beside.rmdir()


def _mend_folder(store: Path, folder: RunFolder, dry_run: bool) -> Iterator[str]:
    """Remove damaged shards of a run folder, then ingest the whole ones."""
    try:
        name, _, description = folder.read()
        with claim_run(folder, name):
            damaged = [
                shard for shard in finished_shards(folder.path) if _is_damaged(folder, shard)
            ]
            for shard_id in damaged:
                yield f"run {name!r}: damaged {shard_id} removed; its command records it anew"
            if damaged and not dry_run:
                if description.routing_in == "shards":
                    _forget_shards(store, name, description, damaged)
                with disk_errors(f"removing shards of {folder.path}"):
                    folder.reopen()
                    for shard_id in damaged:
                        remove_shard(folder.path, shard_id)
            whole = set(finished_shards(folder.path)) - set(damaged) - _ingested(store, name)
            if not dry_run:
                remove_leftovers(folder.path, TEMPORARY_PREFIX)
    except RunError as error:
        yield f"left alone: {error}"
        return
    if whole:
        yield f"run {name!r}: {len(whole)} whole shards ingested"
        if not dry_run and ingest([str(store), str(folder.path)]) != 0:
            raise MoescopeError(f"the shards in {folder.path} could not be ingested")


def _mend_run_in_shards(
    store: Path, run_id: str, prompts: list[int], reason: str, dry_run: bool
) -> str:
    """Remove the shards with these prompts: single prompts cannot be taken out of one."""
    folder = run_folder(store, run_id)
    description = folder.read()[2]
    shards = [
        shard
        for shard, ids in description.planned_shards.items()
        if not set(ids).isdisjoint(prompts)
    ]
    if not dry_run:
        with claim_run(folder, run_id), disk_errors(f"removing shards of {folder.path}"):
            _forget_shards(store, run_id, description, shards)
            folder.reopen()
            for shard_id in shards:
                remove_shard(folder.path, shard_id)
    return (
        f"run {run_id!r}: {len(shards)} shards with contradicting rows removed ({reason}); its "
        "command records them anew"
    )


def _forget_shards(
    store: Path, run_id: str, description: RunDescription, shard_ids: Sequence[str]
) -> None:
    """Take the prompts of shards out of the store; the run's own command records them anew."""
    prompts = [prompt for shard in shard_ids for prompt in description.planned_shards[shard]]
    with (
        database_errors(f"taking damaged shards of run {run_id!r} out of {store}"),
        writing(store, wait_s=_PATIENCE_S) as con,
        transaction(con),
    ):
        _delete_prompts(con, run_id, prompts)
        con.execute(
            "DELETE FROM ingested_shards WHERE run_id = ? AND list_contains(?, shard_id)",
            [run_id, list(shard_ids)],
        ).fetchall()
        con.execute("UPDATE runs SET status = 'running' WHERE run_id = ?", [run_id]).fetchall()


def _delete_prompts(con: duckdb.DuckDBPyConnection, run_id: str, prompts: list[int]) -> None:
    for table in _PROMPT_TABLES:
        con.execute(
            f"DELETE FROM {table} WHERE run_id = ? AND list_contains(?, prompt_id)",
            [run_id, prompts],
        ).fetchall()


def _ingested(store: Path, run_id: str) -> set[str]:
    with reading(store, with_shards=False) as con:
        rows = con.execute(
            "SELECT shard_id FROM ingested_shards WHERE run_id = ?", [run_id]
        ).fetchall()
    return {shard_id for (shard_id,) in rows}


def _is_damaged(folder: RunFolder, shard_id: str) -> bool:
    try:
        read_shard(folder.path, shard_id)
    except MoescopeError:
        return True
    return False


def _orphans(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Rows by table whose run is not in `runs`."""
    found = {}
    for table in RUN_TABLES:
        rows = con.execute(
            f"SELECT count(*) FROM {table} WHERE run_id NOT IN (SELECT run_id FROM runs)"
        ).fetchall()
        if rows[0][0]:
            found[table] = int(rows[0][0])
    return found


def _contradicting(con: duckdb.DuckDBPyConnection, store: Path) -> dict[str, tuple[list[int], str]]:
    """By run: the prompts to remove, and the first contradiction."""
    found: dict[str, tuple[list[int], str]] = {}
    runs = con.execute("SELECT run_id FROM runs WHERE status <> 'running'").fetchall()
    for (run_id,) in runs:
        if any(damaged_shards(con, store, run_id)):  # said already, and not to be read
            continue
        problems = find_problems(con, run_id, per_check=None)
        counted = con.execute(
            "SELECT num_tokens IS DISTINCT FROM (SELECT count(*) FROM tokens t WHERE "
            "t.run_id = r.run_id) FROM runs r WHERE run_id = ?",
            [run_id],
        ).fetchall()
        if problems:
            prompts = sorted({p.prompt_id for p in problems if p.prompt_id is not None})
            found[run_id] = (prompts, str(problems[0]))
        elif counted == [(True,)]:
            found[run_id] = ([], "its number of tokens was wrong")
    return found


def _drop_prompts(
    con: duckdb.DuckDBPyConnection, run_id: str, prompts: list[int], reason: str
) -> None:
    """Remove prompts wholly, set the counts right, and leave word of it in the manifest."""
    _delete_prompts(con, run_id, prompts)
    rows = con.execute("SELECT manifest FROM runs WHERE run_id = ?", [run_id]).fetchall()
    manifest = json.loads(rows[0][0])
    manifest.setdefault("repairs", []).append(
        {"at": datetime.now(UTC).isoformat(), "removed_prompts": prompts, "because": reason}
    )
    con.execute(
        "UPDATE runs SET status = 'complete', manifest = ?, num_tokens = (SELECT count(*) FROM "
        "tokens t WHERE t.run_id = runs.run_id), num_prompts = (SELECT count(*) FROM prompts p "
        "WHERE p.run_id = runs.run_id) WHERE run_id = ?",
        [json.dumps(manifest, ensure_ascii=False), run_id],
    ).fetchall()
