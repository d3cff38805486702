"""The tables of a store: creating them, recognizing them, and the Arrow form of a shard's rows.

`schema.sql` beside this module is the definition; `SHARD_TABLES` repeats the five tables that
collectors fill, without `run_id` and `bf16_weights`, which the ingester adds. A test holds the two
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa

from moescope.probe.errors import RecordingError, StoreError

SCHEMA_VERSION: Final = 3
"""The version this code reads and writes; stored in `moescope_schema`."""

MIGRATES_FROM: Final = (1, 2)
"""Older versions that `migrate_store` brings up to date."""


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


SHARD_TABLES: Final[Mapping[str, pa.Schema]] = {
    "prompts": pa.schema(
        [
            _required("prompt_id", pa.int32()),
            pa.field("key", pa.string()),
            _required("text", pa.string()),
            _required("rendered_text", pa.string()),
            _required("set_name", pa.string()),
            pa.field("label", pa.string()),
            pa.field("lang", pa.string()),
            pa.field("domain", pa.string()),
            pa.field("pair_id", pa.string()),
            pa.field("target", pa.string()),
            pa.field("span", pa.string()),
            pa.field("expected", pa.string()),
            _required("num_tokens", pa.int32()),
            _required("num_generated", pa.int32()),
            pa.field("response", pa.string()),
            pa.field("outcome", pa.string()),
            pa.field("detector", pa.string()),
            pa.field("meta", pa.string()),
        ]
    ),
    "tokens": pa.schema(
        [
            _required("prompt_id", pa.int32()),
            _required("position", pa.int32()),
            _required("token_id", pa.int32()),
            _required("token", pa.string()),
            _required("phase", pa.string()),
            _required("segment", pa.string()),
            _required("is_special", pa.bool_()),
            _required("in_span", pa.bool_()),
            _required("is_routed", pa.bool_()),
        ]
    ),
    "routing_arrays": pa.schema(
        [
            _required("prompt_id", pa.int32()),
            _required("position", pa.int32()),
            _required("layer", pa.int16()),
            _required("kind", pa.string()),
            _required("is_ranked", pa.bool_()),
            _required("experts", pa.list_(pa.uint16())),
            pa.field("weights", pa.list_(pa.float32())),
        ]
    ),
    "usage_arrays": pa.schema(
        [
            _required("prompt_id", pa.int32()),
            _required("phase", pa.string()),
            _required("segment", pa.string()),
            _required("is_special", pa.bool_()),
            _required("layer", pa.int16()),
            _required("kind", pa.string()),
            _required("routed_tokens", pa.int32()),
            _required("num_tokens", pa.list_(pa.int32())),
            pa.field("weight_sum", pa.list_(pa.float32())),
            pa.field("prob_sum", pa.list_(pa.float32())),
            pa.field("norm_sum", pa.list_(pa.float32())),
            pa.field("weighted_norm_sum", pa.list_(pa.float32())),
            pa.field("easyep_sum", pa.list_(pa.float32())),
            pa.field("max_abs", pa.list_(pa.float32())),
        ]
    ),
    "router_probs": pa.schema(
        [
            _required("prompt_id", pa.int32()),
            _required("position", pa.int32()),
            _required("layer", pa.int16()),
            _required("kind", pa.string()),
            _required("probs", pa.list_(pa.float32())),
        ]
    ),
}
"""Table name -> columns of its rows in a shard, in the order of `schema.sql`."""


def schema_sql() -> str:
    """The statements that make the tables of a new store."""
    return Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")


def schema_statement(start: str) -> str:
    """The statement of `schema.sql` that begins so."""
    begin = schema_sql().index(start)
    return schema_sql()[begin : schema_sql().index(";\n", begin)]


def create_schema(con: duckdb.DuckDBPyConnection) -> None:
    """Make all tables of a store in an empty database, in one transaction."""
    con.execute(f"BEGIN;\n{schema_sql()}\nCOMMIT;").fetchall()


def check_schema(
    con: duckdb.DuckDBPyConnection, path: Path, versions: Sequence[int] = (SCHEMA_VERSION,)
) -> int:
    """The version of a store; refuse a database that is not a store of one of these.

    Raises:
        StoreError: names the file, what it is, and what to do.
    """
    try:
        rows = con.execute("SELECT version FROM moescope_schema").fetchall()
    except duckdb.Error as error:
        raise StoreError(
            f"{path} is a DuckDB file but not a moescope store: it has no readable table "
            "moescope_schema; name another file with --store"
        ) from error
    found_versions = [row[0] for row in rows]
    if len(found_versions) == 1 and found_versions[0] in versions:
        return int(found_versions[0])
    found = ", ".join(str(version) for version in found_versions) or "no version at all"
    if len(found_versions) == 1 and found_versions[0] in MIGRATES_FROM:
        advice = f"`moescope store migrate --store {path}` brings it up to date, keeping its runs"
    elif (
        len(found_versions) == 1
        and isinstance(found_versions[0], int)
        and found_versions[0] > SCHEMA_VERSION
    ):
        advice = "it was made by a newer moescope, update this one to open it"
    else:
        advice = "record or import its runs again into a new store"
    raise StoreError(
        f"{path} has store schema version {found}, this moescope reads {SCHEMA_VERSION}: {advice}"
    )


def conform(table: pa.Table, name: str, where: str) -> pa.Table:
    """Bring rows into the exact columns and types of a shard table.

    Args:
        table: rows; the columns of `SHARD_TABLES[name]` in any order, types that cast without loss.
        name: a key of `SHARD_TABLES`.
        where: what the rows belong to, for the message.

    Returns:
        The same rows with exactly that schema, nullability included.

    Raises:
        RecordingError: a column is missing, unknown, of another type, or null where it must not be.
    """
    schema = SHARD_TABLES[name]
    missing = [column for column in schema.names if column not in table.column_names]
    unknown = [column for column in table.column_names if column not in schema.names]
    if missing or unknown or len(set(table.column_names)) != len(table.column_names):
        raise RecordingError(
            f"{where}: the rows for {name} must have the columns {', '.join(schema.names)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    columns = []
    for column in schema:
        try:
            values = table.column(column.name).cast(column.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RecordingError(
                f"{where}: {name}.{column.name} must be {column.type}, "
                f"got {table.column(column.name).type} that does not fit: {error}"
            ) from error
        if not column.nullable and values.null_count:
            raise RecordingError(
                f"{where}: {name}.{column.name} is empty in {values.null_count} of "
                f"{len(values)} rows, it must have a value in each"
            )
        columns.append(values)
    return pa.table(columns, schema=schema)
