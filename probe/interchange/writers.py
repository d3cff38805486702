"""Writing streams of rows as CSV and Parquet, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

_FORMULA_STARTS: Final = pa.array(["=", "+", "-", "@", "\t", "\r"])


def write_parquet(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write rows to a Parquet file; returns how many."""
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def write_csv(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write rows to a CSV file (UTF-8, LF, empty for null); returns how many.

    A spreadsheet computes what begins with `=`, `+`, `-` or `@`, so text that does, or that begins
    with a tab or a carriage return, gets an apostrophe before it. Numbers stay as they are.
    """
    rows = 0
    plain = pa.schema([(field.name, _csv_type(field.type)) for field in schema])
    with pa_csv.CSVWriter(path, plain) as writer:
        for batch in batches:
            table = pa.Table.from_batches([batch]).cast(plain)
            writer.write_table(without_formulas(table))
            rows += batch.num_rows
    return rows


def without_formulas(table: pa.Table) -> pa.Table:
    """The table with an apostrophe before every text that a spreadsheet would compute."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            column = table.column(place)
            first = pc.utf8_slice_codeunits(column, 0, 1)
            risky = pc.is_in(first, value_set=_FORMULA_STARTS)
            escaped = pc.binary_join_element_wise("'", column, "")
            table = table.set_column(place, field, pc.if_else(risky, escaped, column))
    return table


def _csv_type(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_timestamp(kind) else kind
