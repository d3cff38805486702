"""Putting an assembled import into a store: through shards and the ingester, like any run."""

from __future__ import annotations

import os
from collections.abc import Callable

from moescope.probe.errors import RunError
from moescope.probe.interchange.assemble import AssembledRun
from moescope.probe.storage.ingester import start_ingester
from moescope.probe.storage.runs import begin_run
from moescope.probe.storage.shards import write_shard

Progress = Callable[[int, int, str], None]


def store_import(
    run: AssembledRun,
    store: str | os.PathLike[str],
    name: str,
    *,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Store an import as a run; killed in between, the same command goes on with it.

    Args:
        run: the import.
        store: the DuckDB file; made when missing.
        name: the run's name.
        announce: told in a sentence what is waited for.
        progress: told prompts done, prompts in all, and a few words.

    Raises:
        RunError: the store has a run of this name.
        MoescopeError: the disk is full, or the store stayed busy.
    """
    with begin_run(store, name, run.description) as point:
        if point.is_complete:
            raise RunError(f"run {name!r} is complete already; choose another name with --run")
        total, done = len(run.description.prompt_ids), 0
        with start_ingester(store, point.folder) as ingester:
            for shard_id, tables, prompt_ids in run.shards:
                ingester.check()
                if shard_id in point.missing:
                    write_shard(point.folder.path, shard_id, tables, prompt_ids=prompt_ids)
                done += len(prompt_ids)
                if progress is not None:
                    progress(done, total, "")
            point.folder.finish()
            ingester.wait_until_done(announce=announce)
