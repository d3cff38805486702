"""Where the results of analyses lie: files beside the store, which may be deleted at any time.

They are not in the store because a reader never writes to it: `STORE.results/RUN-HASH/`, one
Parquet file a result.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from moescope.probe.storage.store import Store


def results_folder(store: Path, run_id: str | None = None) -> Path:
    """The folder of all results of a store, or of those about one run."""
    folder = store.with_name(store.name + ".results")
    if run_id is None:
        return folder
    return folder / hashlib.sha256(run_id.encode()).hexdigest()[:16]


def forget_results(store: Path, run_id: str | None = None) -> None:
    """Delete the results about a run, or all of a store."""
    shutil.rmtree(results_folder(store, run_id), ignore_errors=True)


def run_stamp(store: Store, run_id: str) -> dict[str, Any]:
    """What changes whenever anything of a run does: its row, its prompts, its shards.

    Raises:
        RunError: there is no such run.
    """
    run = store.run(run_id)
    contents = store.arrow(
        "SELECT (SELECT count(*) FROM prompts WHERE run_id = $run) AS prompts, "
        "(SELECT bit_xor(hash(prompts)) FROM prompts WHERE run_id = $run)::TEXT AS prompt_hash, "
        "(SELECT bit_xor(hash(shard_id, checksum)) FROM ingested_shards WHERE run_id = $run)::TEXT "
        "AS shard_hash",
        {"run": run_id},
    ).to_pylist()[0]
    return {
        "run_id": run_id,
        "created_at": str(run.created_at),
        "finished_at": str(run.finished_at),
        "status": run.status,
        **contents,
    }
