"""Counts and nothing else: no prompt, no text, no token, so that they can be published.

One row for each layer, kind, phase and expert: `num_tokens` that selected it, of `routed_tokens`
that passed the router.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from moescope.probe.interchange.exporting import ExportOptions
from moescope.probe.interchange.registry import Exporter
from moescope.probe.interchange.writers import write_csv, write_parquet
from moescope.probe.storage.store import Store

_QUERY: Final = """
    WITH counted AS (
        SELECT layer, kind, phase, expert, sum(num_tokens)::BIGINT AS num_tokens
        FROM usage WHERE run_id = $run GROUP BY layer, kind, phase, expert
    ), passed AS (
        SELECT layer, kind, phase, sum(routed_tokens)::BIGINT AS routed_tokens
        FROM usage_arrays WHERE run_id = $run GROUP BY layer, kind, phase
    )
    SELECT layer, kind, phase, expert, num_tokens, routed_tokens
    FROM counted JOIN passed USING (layer, kind, phase)
    ORDER BY kind, layer, phase DESC, expert
"""


def write(store: Store, run_id: str, out: Path, options: ExportOptions) -> None:
    """Write the counts as `.csv`, `.parquet`, or `.json` (a list of objects)."""
    table = store.arrow(_QUERY, {"run": run_id})
    if out.suffix.lower() == ".parquet":
        write_parquet(out, table.schema, table.to_batches())
    elif out.suffix.lower() == ".csv":
        write_csv(out, table.schema, table.to_batches())
    else:
        rows = ",\n".join(json.dumps(row) for row in table.to_pylist())
        out.write_text(f"[{rows}]\n", encoding="utf-8")


EXPORTER: Final = Exporter(
    name="counts",
    description="tokens by layer, kind, phase and expert; no prompts and no text",
    versions=("1",),
    needs="usage",
    write=write,
    suffixes=(".csv", ".parquet", ".json"),
)
