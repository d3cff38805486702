"""Copying the rows of a store into another one, in pieces that fit into memory.

Both are opened with external access off, so the rows go through Arrow and not through `ATTACH`:
what a stranger's store calls `routing` may be a view on this machine's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import duckdb
import pyarrow as pa

from moescope.probe.errors import StoreError
from moescope.probe.storage.in_shards import REGISTER, STAYING_TABLES, is_in_shards
from moescope.probe.storage.rows import insert_rows
from moescope.probe.storage.slots import as_stored

RUN_TABLES: Final = (
    "runs",
    "layers",
    "prompts",
    "tokens",
    "routing_arrays",
    "usage_arrays",
    "router_probs",
    "ingested_shards",
)
"""Tables whose rows belong to a run."""

SHARED_TABLES: Final = ("plans", "evaluations", "measurements")
"""Tables whose rows belong to the store."""

OWN_TABLES: Final = (REGISTER,)
"""Tables about the store's own files: they go with the file and are not merged into another."""

_ROWS_AT_ONCE: Final = 2_000_000


def copy_table(
    source: duckdb.DuckDBPyConnection,
    target: duckdb.DuckDBPyConnection,
    table: str,
    *,
    run_id: str | None = None,
    new_run_id: str | None = None,
    among: tuple[str, Sequence[str]] | None = None,
    conflict: str = "",
) -> int:
    """Copy a table's rows, or those of one run, in their order.

    Args:
        source: the store that is read.
        target: the store that is written; the caller begins and commits.
        table: one of `RUN_TABLES` or `SHARED_TABLES`.
        run_id: only rows of this run.
        new_run_id: what the run is called in the target.
        among: only rows in which this column has one of these values.
        conflict: what happens to rows whose key is there already; an error without it.

    Returns:
        Rows read.

    Raises:
        StoreError: what the source calls so is no table.
    """
    require_table(source, table)
    where, params = _condition(run_id, among)
    shown = table in STAYING_TABLES and run_id is not None and is_in_shards(source, run_id)
    named = run_id is not None and new_run_id not in (None, run_id)
    columns = "* EXCLUDE (run_id)" if named else "*"
    result = source.sql(f'SELECT {columns} FROM main."{table}" {where}', params=params)
    rows = 0
    for batch in result.to_arrow_reader(_ROWS_AT_ONCE):
        piece = pa.Table.from_batches([batch])
        if shown and table == "routing_arrays":
            piece = as_stored(piece.drop_columns(["bf16_weights"]))
        insert_rows(target, table, piece, run_id=new_run_id if named else None, conflict=conflict)
        rows += piece.num_rows
    return rows


def _condition(
    run_id: str | None, among: tuple[str, Sequence[str]] | None
) -> tuple[str, list[object]]:
    if run_id is not None:
        return "WHERE run_id = ?", [run_id]
    if among is not None:
        return f"WHERE list_contains(?, {among[0]})", [list(among[1])]
    return "", []


def require_table(con: duckdb.DuckDBPyConnection, name: str) -> None:
    """Refuse a store in which this name is anything but a table.

    Raises:
        StoreError: says so.
    """
    found = con.execute(
        "SELECT count(*) FROM duckdb_tables() WHERE schema_name = 'main' AND table_name = ?", [name]
    ).fetchall()
    if found != [(1,)]:
        raise StoreError(f"this is no sound store: {name} is not a table in it")
