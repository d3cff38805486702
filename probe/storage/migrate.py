"""Bringing a store of an older schema version up to date, in place and in one transaction."""

from __future__ import annotations

import os

from moescope.probe.storage.faults import database_errors
from moescope.probe.storage.locks import reading, resolve_store, writing
from moescope.probe.storage.rows import transaction
from moescope.probe.storage.schema import (
    MIGRATES_FROM,
    SCHEMA_VERSION,
    SHARD_TABLES,
    schema_sql,
)

_NEW_IN_2 = ("norm_sum", "weighted_norm_sum", "easyep_sum", "max_abs")


def migrate_store(path: str | os.PathLike[str]) -> int:
    """Give a store the tables and columns of this version; its runs are kept as they are.

    Version 1 to 2: `usage` gains the four columns of `--norms` (null for runs recorded before),
    and the table `router_probs` is made.

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
            con.execute("DROP VIEW usage").fetchall()
            for name in _NEW_IN_2:
                assert name in SHARD_TABLES["usage_arrays"].names
                con.execute(f"ALTER TABLE usage_arrays ADD COLUMN {name} FLOAT[]").fetchall()
            for start in ("CREATE VIEW usage ", "CREATE TABLE router_probs "):
                con.execute(_statement(start)).fetchall()
            con.execute("UPDATE moescope_schema SET version = ?", [SCHEMA_VERSION]).fetchall()
        return before


def _statement(start: str) -> str:
    """The statement of `schema.sql` that begins so."""
    begin = schema_sql().index(start)
    return schema_sql()[begin : schema_sql().index(";\n", begin)]
