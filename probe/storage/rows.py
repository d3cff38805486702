"""Putting rows into a store on a connection that is open already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import duckdb
import pyarrow as pa


@contextmanager
def transaction(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """All that the block does, or, when it fails, nothing of it."""
    con.execute("BEGIN").fetchall()
    try:
        yield
    except BaseException:
        with suppress(duckdb.Error):  # a failed commit has rolled back already
            con.execute("ROLLBACK").fetchall()
        raise
    con.execute("COMMIT").fetchall()


def insert_rows(
    con: duckdb.DuckDBPyConnection,
    table_name: str,
    rows: pa.Table,
    *,
    run_id: str | None = None,
    conflict: str = "",
) -> None:
    """Insert Arrow rows by column name, with `run_id` as a constant where it is given."""
    names = ", ".join(f'"{name}"' for name in rows.column_names)
    columns, values, params = (
        (names, names, []) if run_id is None else (f"run_id, {names}", f"?, {names}", [run_id])
    )
    con.register("moescope_rows", rows)
    try:
        con.execute(
            f'INSERT INTO "{table_name}" ({columns}) SELECT {values} FROM moescope_rows {conflict}',
            params,
        ).fetchall()
    finally:
        con.unregister("moescope_rows")
