"""The archive of a run: a .zip whose files say what they are.

    manifest.json     format, versions, the run's row, rows, bytes and SHA-256 of every other file
    README.txt        what each file is, for people
    TABLE.parquet     the rows of the run in each table of the store, in their stored form

Version 1. The files are stored or deflated; nothing else is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import duckdb
import pyarrow as pa

from moescope.probe.interchange.run_tables import TEXT_COLUMNS, in_utc
from moescope.probe.storage.copying import RUN_TABLES
from moescope.probe.storage.schema import SCHEMA_VERSION, create_schema

FORMAT: Final = "moescope-archive"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
README: Final = "README.txt"

_ABOUT: Final = {
    "runs": "the run: model, when, how much was recorded, and its manifest as JSON",
    "layers": "one row a router: decoder layer, experts, top-k, how it selects",
    "prompts": "one row a prompt, with its fields, its answer and what became of it",
    "tokens": "one row a token of prompt and answer",
    "routing_arrays": "one row a token and router: experts and weights in order of rank",
    "usage_arrays": "one row a prompt, group of tokens and router: sums, indexed by expert",
    "router_probs": "one row a token and router: what the router gave each expert",
    "ingested_shards": "in which pieces the run was recorded",
}


def member_of(table: str) -> str:
    """The file with a table's rows."""
    return f"{table}.parquet"


MEMBERS: Final = (README, *(member_of(table) for table in RUN_TABLES))
"""Every file but the manifest."""


def table_schemas() -> dict[str, pa.Schema]:
    """Columns of every table of runs, as the store defines them."""
    with duckdb.connect() as con:
        create_schema(con)
        return {
            table: in_utc(con.sql(f"SELECT * FROM {table}").to_arrow_table().schema)
            for table in RUN_TABLES
        }


def run_row(runs: pa.Table) -> dict[str, Any]:
    """The row of `runs` as it stands in the manifest: times in ISO 8601, JSON as data.

    Raises:
        ValueError: `manifest` is no JSON.
    """
    (row,) = runs.to_pylist()
    for name in ("created_at", "finished_at"):
        if row[name] is not None:
            row[name] = row[name].isoformat()
    return {**row, "manifest": json.loads(row["manifest"])}


def manifest_of(
    run: Mapping[str, Any], members: Mapping[str, Any], *, moescope: str, without_text: bool
) -> dict[str, Any]:
    """The content of `manifest.json`.

    Args:
        run: the run's row.
        members: `{"sha256", "bytes", "rows"}` of every file; a README has no rows.
        moescope: the version that wrote it.
        without_text: whether text was left out.
    """
    left_out = [f"{table}.{name}" for table, names in TEXT_COLUMNS.items() for name in names]
    return {
        "format": FORMAT,
        "version": VERSION,
        "moescope": moescope,
        "schema_version": SCHEMA_VERSION,
        "left_out": left_out if without_text else [],
        "run": dict(run),
        "members": dict(members),
    }


def readme(run_id: str, *, without_text: bool) -> str:
    """What `README.txt` says."""
    lines = [
        f"The run {run_id!r} of a Mixture-of-Experts model, recorded with moescope.",
        "",
        f"{MANIFEST}: what is here, with a SHA-256 of every other file",
        *(f"{member_of(table)}: {_ABOUT[table]}" for table in RUN_TABLES),
        "",
        "Any reader of Parquet opens the tables. In routing_arrays, weights are in `weights`, or,",
        "where all are exact in bfloat16, in `bf16_weights` as its sixteen bits.",
    ]
    if without_text:
        lines += [
            "",
            "Text was left out: prompts, answers, token strings and further fields are empty.",
            "Token ids are there, and a tokenizer turns them into text again.",
        ]
    return "\n".join(lines) + "\n"
