"""Runs whose routing stays in its Parquet shards beside the store, read in place.

For runs larger than the disk of the store: `STORE.shards` may be a link to another one. Prompts,
tokens and usage go into the store as ever; of `routing_arrays` and `router_probs` the store knows
only which shards are in. A reader's connection shows both as one table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import duckdb

from moescope.probe.storage.run_folder import run_folder, shards_beside
from moescope.probe.storage.schema import SHARD_TABLES, schema_statement
from moescope.probe.storage.shards import check_shard_id

STAYING_TABLES: Final = ("routing_arrays", "router_probs")
"""The tables whose rows stay in the shards of such a run."""

REGISTER: Final = "runs_in_shards"
"""The table of such runs."""


def show_runs_in_shards(con: duckdb.DuckDBPyConnection, store: Path) -> None:
    """Make a reader's connection see the shards of such runs as rows of the store's tables."""
    runs = con.execute(
        f"SELECT s.run_id, r.record_level, list(i.shard_id ORDER BY i.shard_id) "
        f"FROM main.{REGISTER} s JOIN main.runs r USING (run_id) "
        "JOIN main.ingested_shards i USING (run_id) GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    if not runs:
        return
    (catalog,) = (name for (name,) in con.execute("SELECT current_database()").fetchall())
    quoted = '"' + catalog.replace('"', '""') + '"'
    for table in STAYING_TABLES:
        # With its catalog: `main` alone is also the schema of temporary views.
        parts = [f"SELECT * FROM {quoted}.main.{table}"]
        for run_id, level, shard_ids in runs:
            if level == "probs" or (table == "routing_arrays" and level == "topk"):
                parts.append(_rows_of(store, run_id, table, shard_ids))
        con.execute(f"CREATE TEMP VIEW {table} AS {' UNION ALL BY NAME '.join(parts)}").fetchall()
    view = schema_statement("CREATE VIEW routing ")
    con.execute(view.replace("CREATE VIEW", "CREATE TEMP VIEW", 1)).fetchall()


def is_in_shards(con: duckdb.DuckDBPyConnection, run_id: str) -> bool:
    """Whether this run's routing stays in shards."""
    found = con.execute(f"SELECT count(*) FROM main.{REGISTER} WHERE run_id = ?", [run_id])
    return found.fetchall() == [(1,)]


def staying_files(store: Path, run_id: str, shard_ids: list[str], table: str) -> Iterator[Path]:
    """Where a table's rows of these shards lie."""
    folder = run_folder(store, run_id).path
    for shard_id in shard_ids:
        check_shard_id(shard_id)
        yield folder / shard_id / f"{table}.parquet"


def _rows_of(store: Path, run_id: str, table: str, shard_ids: list[str]) -> str:
    """A query for the rows of a run's shards; it fails with a sentence when the first is gone."""
    files = list(staying_files(store, run_id, shard_ids, table))
    if files[0].is_file():
        listed = ", ".join(_quoted(str(file)) for file in files)
        return f"SELECT {_quoted(run_id)} AS run_id, * FROM read_parquet([{listed}])"
    sentence = (
        f"the routing of run {run_id!r} stays in {shards_beside(store)}, "
        f"and {files[0].parent.name} is not there; put the folder back beside the store"
    )
    missing = [
        f"CASE WHEN random() < 2 THEN error({_quoted(sentence)}) END::{_SQL_TYPES[str(field.type)]}"
        f" AS {field.name}"
        for field in SHARD_TABLES[table]
    ]
    return f"SELECT {_quoted(run_id)} AS run_id, {', '.join(missing)}"


_SQL_TYPES: Final = {
    "int32": "INTEGER",
    "int16": "SMALLINT",
    "string": "TEXT",
    "bool": "BOOLEAN",
    "list<element: uint16>": "USMALLINT[]",
    "list<item: uint16>": "USMALLINT[]",
    "list<element: float>": "FLOAT[]",
    "list<item: float>": "FLOAT[]",
}


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
