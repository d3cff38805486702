"""A run's tables as streams of Arrow rows: what exporters write is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import pyarrow as pa

from moescope.probe.errors import InputError, MoescopeError
from moescope.probe.storage.copying import require_table
from moescope.probe.storage.in_shards import is_in_shards
from moescope.probe.storage.slots import as_stored

SHOWN_TABLES: Final = ("runs", "layers", "prompts", "tokens", "usage", "routing")
"""What people read: long form, one row a slot, one row an expert."""

TEXT_COLUMNS: Final = {
    "prompts": ("text", "rendered_text", "target", "span", "expected", "response", "meta"),
    "tokens": ("token",),
}
"""Columns that hold or quote text; `meta` holds whatever fields a prompt file has beside."""

_REQUIRED_TEXT: Final = ("text", "rendered_text", "token")
_ROWS_AT_ONCE: Final = {"usage_arrays": 8_192, "router_probs": 32_768}
_MOST_ROWS: Final = 262_144
_UTC: Final = pa.timestamp("us", tz="UTC")
_ORDER: Final = {
    "layers": "ORDER BY kind, layer",
    "prompts": "ORDER BY prompt_id",
    "ingested_shards": "ORDER BY shard_id",
}


@dataclass(frozen=True)
class RowStream:
    """Rows of a table.

    Attributes:
        schema: their columns.
        batches: the rows, in pieces; to be read once, within the block.
    """

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]


@contextmanager
def stream(
    con: duckdb.DuckDBPyConnection, table: str, run_id: str, *, without_text: bool = False
) -> Iterator[RowStream]:
    """A run's rows of a table or view of the store, `run_id` included.

    Short tables are in the order of their keys; long ones in that in which they are stored, for
    sorting them would take as much memory as they do. The connection can do nothing else within the
    block, and keeps nothing open after it, also after a failure.

    Args:
        con: a reader's connection.
        table: one of `SHOWN_TABLES`, or of the store's tables of runs.
        run_id: the run.
        without_text: make `TEXT_COLUMNS` empty.

    Raises:
        StoreError: what the store calls so is something else.
    """
    if table not in ("usage", "routing"):
        require_table(con, table)
    stored = table == "routing_arrays" and is_in_shards(con, run_id)
    columns = _columns(table) if without_text else "*"
    result = con.sql(
        f'SELECT {columns} FROM main."{table}" WHERE run_id = ? {_ORDER.get(table, "")}',
        params=[run_id],
    )
    reader = result.to_arrow_reader(_ROWS_AT_ONCE.get(table, _MOST_ROWS))
    try:
        schema = in_utc(reader.schema)
        yield RowStream(schema, _batches(reader, table, schema, stored=stored, bare=without_text))
    finally:
        reader.close()  # an open result would keep the store's file from writers


def in_utc(schema: pa.Schema) -> pa.Schema:
    """The same with times in UTC; DuckDB shows them in the time zone of this machine."""
    return pa.schema(
        [
            (field.name, _UTC if pa.types.is_timestamp(field.type) else field.type)
            for field in schema
        ]
    )


def _batches(
    reader: Any, table: str, schema: pa.Schema, *, stored: bool, bare: bool
) -> Iterator[pa.RecordBatch]:
    try:
        for batch in reader:
            whole = pa.Table.from_batches([batch])
            if stored:  # a shard's rows have their weights in one form only
                whole = as_stored(whole.drop_columns(["bf16_weights"]))
            if bare and table == "runs":
                whole = _without_prompt_text(whole)
            yield from whole.cast(schema).to_batches()
    except (pa.ArrowException, OSError) as error:  # DuckDB's, through Arrow's interface
        raise MoescopeError(f"reading {table} failed: {str(error).splitlines()[0]}") from error


def _columns(table: str) -> str:
    """What to select so that no text is in it."""
    empty = [
        f"'' AS {name}"
        if name in _REQUIRED_TEXT
        else f"CASE WHEN {name} IS NOT NULL THEN '' END AS {name}"
        if name == "response"
        else f"NULL::TEXT AS {name}"
        for name in TEXT_COLUMNS.get(table, ())
    ]
    return f"* REPLACE ({', '.join(empty)})" if empty else "*"


def _without_prompt_text(runs: pa.Table) -> pa.Table:
    """Rows of `runs` whose manifest says that the text is lacking, and has no system message."""
    manifests = []
    for text in runs["manifest"].to_pylist():
        manifest = json.loads(text)
        manifest["lacks"] = sorted({*manifest.get("lacks", []), "text"})
        for holder in (manifest, manifest.get("identity")):
            arguments = holder.get("arguments") if isinstance(holder, dict) else None
            if isinstance(arguments, dict) and arguments.get("system") is not None:
                arguments["system"] = ""
        manifests.append(json.dumps(manifest, ensure_ascii=False))
    place = runs.schema.get_field_index("manifest")
    return runs.set_column(place, runs.schema.field(place), pa.array(manifests, pa.string()))


def run_layers(con: duckdb.DuckDBPyConnection, run_id: str) -> dict[int, tuple[int, int]]:
    """Experts and top-k of every router of a run's decoder layers (kind mlp), by layer, ascending.

    Raises:
        InputError: it has none.
    """
    rows = con.execute(
        "SELECT layer, num_experts, top_k FROM layers WHERE run_id = ? AND kind = 'mlp' "
        "ORDER BY layer",
        [run_id],
    ).fetchall()
    if not rows:
        raise InputError(f"run {run_id!r} has no routed decoder layer of kind mlp")
    return {layer: (num_experts, top_k) for layer, num_experts, top_k in rows}
