"""Bringing a store of an older schema version up to date, in place and in one transaction."""

from __future__ import annotations

import os
from typing import Final

import duckdb

from moescope.probe.storage.faults import database_errors
from moescope.probe.storage.files import resolve_store
from moescope.probe.storage.locks import reading, writing
from moescope.probe.storage.rows import insert_rows, transaction
from moescope.probe.storage.schema import (
    MIGRATES_FROM,
    SCHEMA_VERSION,
    schema_statement,
)
from moescope.probe.storage.slots import arrays_of_slots, as_stored

_NEW_IN_2: Final = ("norm_sum", "weighted_norm_sum", "easyep_sum", "max_abs")
_PROMPTS_AT_ONCE: Final = 1_000


def migrate_store(path: str | os.PathLike[str]) -> int:
    """Give a store the tables and columns of this version; its runs are kept as they are.

    Version 1 to 2: `usage` gains the four columns of `--norms` (null for runs recorded before),
    and the table `router_probs` is made. Version 2 to 3: single slots become rows of arrays, and
    `routing` a view of them; `moescope store vacuum` gives the space of the old form back.

    Args:
        path: the store.

    Returns:
        The version that it had; `SCHEMA_VERSION` when there was nothing to do.

    Raises:
        StoreError: the file is missing, is no store, or has a version that cannot be migrated.
        StoreBusyError: others kept the store for too long.
    """
    store = resolve_store(path)
    versions = (*MIGRATES_FROM, SCHEMA_VERSION)
    with reading(store, versions=versions):  # a missing store is not to be made here
        pass
    with (
        database_errors(f"migrating {store}"),
        writing(store, versions=versions) as con,
    ):
        row = con.execute("SELECT version FROM moescope_schema").fetchone()
        assert row is not None
        before = int(row[0])
        if before == SCHEMA_VERSION:
            return before
        with transaction(con):
            if before < 2:
                _to_version_2(con)
            _to_version_3(con)
            con.execute("UPDATE moescope_schema SET version = ?", [SCHEMA_VERSION]).fetchall()
        return before


def _to_version_2(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("DROP VIEW usage").fetchall()
    for name in _NEW_IN_2:
        con.execute(f"ALTER TABLE usage_arrays ADD COLUMN {name} FLOAT[]").fetchall()
    for start in ("CREATE VIEW usage ", "CREATE TABLE router_probs "):
        con.execute(schema_statement(start)).fetchall()


def _to_version_3(con: duckdb.DuckDBPyConnection) -> None:
    for name in ("weight_sum", "prob_sum"):
        con.execute(f"ALTER TABLE usage_arrays ALTER {name} DROP NOT NULL").fetchall()
    con.execute("ALTER TABLE routing RENAME TO old_routing").fetchall()
    for start in ("CREATE TABLE routing_arrays ", "CREATE TABLE runs_in_shards "):
        con.execute(schema_statement(start)).fetchall()
    prompts = con.execute(
        "SELECT DISTINCT run_id, prompt_id // ? FROM old_routing ORDER BY ALL", [_PROMPTS_AT_ONCE]
    ).fetchall()
    for run_id, part in prompts:
        slots = con.sql(
            "SELECT * EXCLUDE (run_id) FROM old_routing WHERE run_id = ? AND prompt_id // ? = ?",
            params=[run_id, _PROMPTS_AT_ONCE, part],
        ).to_arrow_table()
        insert_rows(con, "routing_arrays", as_stored(arrays_of_slots(slots)), run_id=run_id)
    con.execute("DROP TABLE old_routing").fetchall()
    con.execute(schema_statement("CREATE VIEW routing ")).fetchall()
