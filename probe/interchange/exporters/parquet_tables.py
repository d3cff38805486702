"""A run as a folder of Parquet files that any reader of them opens.

The tables and columns are those of the store (`probe/storage/schema.sql`): `routing` has one row a
slot, `usage` one row an expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from moescope.probe.interchange.exporting import ExportOptions
from moescope.probe.interchange.registry import Exporter
from moescope.probe.interchange.run_tables import SHOWN_TABLES, stream
from moescope.probe.interchange.writers import write_parquet
from moescope.probe.storage.store import Store


def write(store: Store, run_id: str, out: Path, options: ExportOptions) -> None:
    """Write `NAME.parquet` for every table of `SHOWN_TABLES`; one without rows has its columns."""
    out.mkdir()
    with store.connection() as con:
        for table in SHOWN_TABLES:
            with stream(con, table, run_id, without_text=options.without_text) as rows:
                write_parquet(out / f"{table}.parquet", rows.schema, rows.batches)


EXPORTER: Final = Exporter(
    name="parquet",
    description="a folder with runs, layers, prompts, tokens, usage and routing as .parquet",
    versions=("store schema 3",),
    needs="nothing; routing is empty where only usage was recorded",
    write=write,
    members=(".parquet",),
    takes=("without_text",),
)
