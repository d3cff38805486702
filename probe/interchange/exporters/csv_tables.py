"""A run as a folder of CSV files; text that a spreadsheet would compute is made harmless."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from moescope.probe.interchange.exporting import ExportOptions
from moescope.probe.interchange.registry import Exporter
from moescope.probe.interchange.run_tables import SHOWN_TABLES, stream
from moescope.probe.interchange.writers import write_csv
from moescope.probe.storage.store import Store


def write(store: Store, run_id: str, out: Path, options: ExportOptions) -> None:
    """Write `NAME.csv` for every table of `SHOWN_TABLES`; one without rows has its header."""
    out.mkdir()
    with store.connection() as con:
        for table in SHOWN_TABLES:
            with stream(con, table, run_id, without_text=options.without_text) as rows:
                write_csv(out / f"{table}.csv", rows.schema, rows.batches)


EXPORTER: Final = Exporter(
    name="csv",
    description="a folder with runs, layers, prompts, tokens, usage and routing as .csv",
    versions=("store schema 3",),
    needs="nothing; routing is empty where only usage was recorded",
    write=write,
    members=(".csv",),
    takes=("without_text",),
)
