"""The ingester: the one process that moves a run's shards into its store.

    python -m moescope.probe.storage.ingest STORE RUN_FOLDER

Each shard goes in with all its rows and its id in one transaction, so that it counts exactly once
whatever is killed when; only then is it deleted. The store is held for about a second at a time.
When the collector has said that all is written and all planned shards are in, the run is verified
and set complete. When the collector dies, what is whole is still ingested and the run stays
resumable. Run by hand it ingests what is there and ends.

Collectors start it with `start_ingester`.
"""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import duckdb
import pyarrow as pa

from moescope.probe.errors import (
    InputError,
    MoescopeError,
    RecordingError,
    RunError,
    StoreBusyError,
)
from moescope.probe.storage.faults import database_errors
from moescope.probe.storage.files import (
    REMOVED_PREFIX,
    disk_errors,
    remove_folder,
    remove_leftovers,
    resolve_store,
    write_json,
)
from moescope.probe.storage.in_shards import REGISTER, STAYING_TABLES
from moescope.probe.storage.ingester import STATUS_FILE, IngesterProcess, start_ingester
from moescope.probe.storage.locks import reading, writing
from moescope.probe.storage.rows import insert_rows, transaction
from moescope.probe.storage.run_folder import RunFolder
from moescope.probe.storage.run_log import run_log
from moescope.probe.storage.runs import is_claimed
from moescope.probe.storage.schema import SHARD_TABLES
from moescope.probe.storage.shards import (
    ShardManifest,
    finished_shards,
    read_shard,
    remove_shard,
)
from moescope.probe.storage.slots import as_stored
from moescope.probe.storage.verify import find_problems

INGESTER_LOCK: Final = "ingester.lock"

_ROWS_PER_TURN: Final = 2_000_000  # the store is held for about a second
_LOOK_EVERY_S: Final = 0.05
_SHORTEST_REST_S: Final = 0.1
_LONGEST_REST_S: Final = 0.3
_WAIT_S: Final = 600.0
_ASK_AGAIN_S: Final = 10.0

__all__ = ["Ingester", "IngesterProcess", "main", "start_ingester"]

Shard = tuple[ShardManifest, dict[str, pa.Table]]


class Ingester:
    """Moves the shards of one run folder into one store.

    Args:
        store: the store; made when missing.
        folder: the run folder, with `run.json` in it.
        keep_shards: leave shards and folder on disk after they were ingested.
        wait_s: how long to wait for others at the store once nothing more is being collected.
    """

    def __init__(
        self, store: Path, folder: RunFolder, *, keep_shards: bool = False, wait_s: float = _WAIT_S
    ) -> None:
        self._store = store
        self._folder = folder
        self._wait_s = wait_s
        self.run_id, self._created_at, self._description = folder.read()
        self._stays_in_shards = self._description.routing_in == "shards"
        self._keep_shards = keep_shards or self._stays_in_shards
        self._log = run_log(store, self.run_id)
        self._ingested: set[str] = set()
        self._is_complete = False
        self._waiting_for: str | None = None

    def run(self, collector_lives: Callable[[], bool]) -> None:
        """Ingest until the run is complete, or the collector is gone and nothing whole is left.

        Raises:
            MoescopeError: a damaged shard, a full disk, contradicting rows, a store of others.
        """
        self._take_turn([], collector_lives)
        while True:
            lives = collector_lives()  # before looking, so that nothing written before is missed
            finished = self._folder.is_finished
            moved = self._ingest_finished(collector_lives)
            if finished and not moved:
                if not self._is_complete:
                    self._complete()
                # Another collector may have begun to go on with the run of one that was killed: the
                # folder is then for its own ingester to remove. Whoever begins later finds the run
                # complete.
                if not self._keep_shards and (lives or not is_claimed(self._folder)):
                    self._remove_folder()
                return
            if not moved and not lives:
                return
            if not moved:
                time.sleep(_LOOK_EVERY_S)

    def _ingest_finished(self, collector_lives: Callable[[], bool]) -> bool:
        """Move shards that are whole, as many as one turn takes; False when there were none."""
        batch: list[Shard] = []
        rows = 0
        for shard_id in finished_shards(self._folder.path):
            if shard_id in self._ingested:
                if not self._keep_shards:  # written again although it is in already
                    remove_shard(self._folder.path, shard_id)
                continue
            manifest, tables = read_shard(self._folder.path, shard_id)
            self._check_planned(manifest)
            batch.append((manifest, tables))
            rows += sum(table.num_rows for table in tables.values())
            if rows >= _ROWS_PER_TURN:
                break
        if not batch:
            return False
        began = time.monotonic()
        self._take_turn(batch, collector_lives)
        held = time.monotonic() - began
        self._log.write(
            "ingested", shards=[manifest.shard_id for manifest, _ in batch], rows=rows,
            seconds=round(held, 3), in_store=len(self._ingested) + len(batch),
            planned=len(self._description.planned_shards),
        )  # fmt: skip
        for manifest, _ in batch:
            self._ingested.add(manifest.shard_id)
            if not self._keep_shards:
                remove_shard(self._folder.path, manifest.shard_id)
        self._report()
        time.sleep(min(max(held, _SHORTEST_REST_S), _LONGEST_REST_S))  # readers get in now
        return True

    def _take_turn(self, batch: list[Shard], collector_lives: Callable[[], bool]) -> None:
        """Register the run if need be and ingest the batch.

        While the run is being collected it waits for its turn without end; once all is written,
        as long as `wait_s`; and when the collector is gone it gives up soon, for the shards are
        safe where they are.
        """
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                with (
                    database_errors(f"writing {self._store}"),
                    writing(self._store, wait_s=_ASK_AGAIN_S, announce=self._announce) as con,
                ):
                    self._register(con)
                    self._ingest(con, [shard for shard in batch if self._is_new(shard)])
                break
            except StoreBusyError:
                is_late = self._folder.is_finished and time.monotonic() > deadline
                if is_late or not collector_lives():
                    raise
        self._waiting_for = None
        self._report()

    def _register(self, con: duckdb.DuckDBPyConnection) -> None:
        """Make the rows in `runs` and `layers`, once; know what is in already."""
        description = self._description
        manifest = {**description.to_json()["manifest"], **description.fingerprint()}
        with transaction(con):
            row = con.execute(
                "SELECT manifest, status FROM runs WHERE run_id = ?", [self.run_id]
            ).fetchone()
            self._is_complete = row is not None and row[1] == "complete"
            if row is None:
                con.execute(
                    "INSERT INTO runs (run_id, model, revision, family, created_at, status, source,"
                    " record_level, plan_id, num_prompts, manifest)"
                    " VALUES (?, ?, ?, ?, ?, 'running', ?, ?, ?, ?, ?)",
                    [
                        self.run_id,
                        description.model,
                        description.revision,
                        description.family,
                        self._created_at,
                        description.source,
                        description.record_level,
                        description.plan_id,
                        len(description.prompt_ids),
                        json.dumps(manifest, ensure_ascii=False),
                    ],
                ).fetchall()
                for layer in description.layers:
                    _insert_layer(con, self.run_id, layer)
                if self._stays_in_shards:
                    con.execute(f"INSERT INTO {REGISTER} VALUES (?)", [self.run_id]).fetchall()
            elif json.loads(row[0]).get("identity") != manifest["identity"]:
                raise RunError(
                    f"{self._store} has another run {self.run_id!r} already, "
                    f"the shards in {self._folder.path} do not belong to it"
                )
            known = con.execute(
                "SELECT shard_id FROM ingested_shards WHERE run_id = ?", [self.run_id]
            ).fetchall()
        self._ingested = {row[0] for row in known}

    def _is_new(self, shard: Shard) -> bool:
        return shard[0].shard_id not in self._ingested

    def _ingest(self, con: duckdb.DuckDBPyConnection, shards: list[Shard]) -> None:
        """All rows of these shards and their ids, or nothing.

        One statement a table: every statement leaves a group of rows that is not full, which DuckDB
        writes anew later.
        """
        if not shards:
            return
        ids = [(self.run_id, manifest.shard_id, manifest.checksum) for manifest, _ in shards]
        with transaction(con):
            con.executemany(
                "INSERT INTO ingested_shards (run_id, shard_id, checksum) VALUES (?, ?, ?)", ids
            ).fetchall()
            for name in SHARD_TABLES:
                if self._stays_in_shards and name in STAYING_TABLES:
                    continue
                parts = [tables[name] for _, tables in shards if tables[name].num_rows]
                if name == "routing_arrays":
                    parts = [as_stored(part) for part in parts]
                if parts:
                    # In one piece: in pieces DuckDB stores them twice as slowly, half of it twice.
                    whole = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
                    insert_rows(con, name, whole, run_id=self.run_id)

    def _check_planned(self, manifest: ShardManifest) -> None:
        planned = self._description.planned_shards.get(manifest.shard_id)
        if planned is None or sorted(planned) != list(manifest.prompt_ids):
            raise RecordingError(
                f"{manifest.shard_id} in {self._folder.path} holds other prompts than were planned "
                "for it; delete it and start the same command again"
            )

    def _complete(self) -> None:
        """Verify the run and set it complete.

        Raises:
            RecordingError: a planned shard is missing or the rows contradict each other.
        """
        missing = sorted(set(self._description.planned_shards) - self._ingested)
        if missing:
            raise RecordingError(
                f"run {self.run_id!r} was declared complete, but {missing[0]} "
                f"({len(missing)} in all) is neither in {self._store} nor in {self._folder.path}; "
                "start the same command again, it records what is missing"
            )
        with (
            database_errors(f"verifying run {self.run_id!r} in {self._store}"),
            reading(self._store, wait_s=self._wait_s) as con,
        ):
            problems = find_problems(con, self.run_id)
            weights = _weights_kept_as(con, self.run_id)
        status = "failed" if problems else "complete"
        with (
            database_errors(f"completing run {self.run_id!r} in {self._store}"),
            writing(self._store, wait_s=self._wait_s, announce=self._announce) as con,
        ):
            facts = json.dumps({**self._folder.facts(), **weights}, ensure_ascii=False)
            con.execute(
                "UPDATE runs SET status = ?, finished_at = ?, num_tokens ="
                " (SELECT count(*) FROM tokens WHERE run_id = ?),"
                " manifest = json_merge_patch(manifest, ?::JSON) WHERE run_id = ?",
                [status, datetime.now(UTC), self.run_id, facts, self.run_id],
            ).fetchall()
        self._log.write("finished", status=status, problems=len(problems))
        if problems:
            raise RecordingError(
                f"run {self.run_id!r} contradicts itself in {len(problems)} places and is marked "
                f"failed, record it again under another name; the first: {problems[0]}"
            )

    def _remove_folder(self) -> None:
        remove_folder(self._folder.path)
        with suppress(OSError):  # other runs still have shards there
            remove_leftovers(self._folder.path.parent, REMOVED_PREFIX)
            self._folder.path.parent.rmdir()

    def _announce(self, sentence: str) -> None:
        if sentence != self._waiting_for:
            sys.stderr.write(f"{sentence}\n")
            self._log.write("waiting", what=sentence)
            self._waiting_for = sentence
            self._report()

    def _report(self) -> None:
        """Leave word of the progress; a full disk must not stop the ingester here."""
        with suppress(OSError):
            write_json(
                self._folder.path / STATUS_FILE,
                {
                    "num_ingested": len(self._ingested),
                    "num_planned": len(self._description.planned_shards),
                    "waiting_for": self._waiting_for,
                },
                durable=False,
            )


def _weights_kept_as(con: duckdb.DuckDBPyConnection, run_id: str) -> dict[str, Any]:
    """How many rows of arrays keep their weights in which form, for the manifest."""
    rows = con.execute(
        "SELECT count(weights), count(bf16_weights) FROM routing_arrays WHERE run_id = ?", [run_id]
    ).fetchall()
    kept = dict(zip(("float32", "bf16"), rows[0], strict=True))
    return {"weights_kept_as": {form: number for form, number in kept.items() if number}}


def _insert_layer(con: duckdb.DuckDBPyConnection, run_id: str, layer: Any) -> None:
    rule = None if layer["rule"] is None else json.dumps(layer["rule"])
    values = {**layer, "run_id": run_id, "rule": rule}
    marks = ", ".join("?" for _ in values)
    con.execute(
        f"INSERT INTO layers ({', '.join(values)}) VALUES ({marks})", list(values.values())
    ).fetchall()


@contextmanager
def _only_ingester(folder: Path) -> Iterator[bool]:
    """Wait until no other process ingests this folder; False if it is done and gone by then."""
    descriptor = os.open(folder / INGESTER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.is_dir():
            remove_leftovers(folder, REMOVED_PREFIX)
        yield folder.is_dir()
    finally:
        os.close(descriptor)


def _collector_watch(collector_pid: int | None) -> Callable[[], bool]:
    """Whether more shards can come: until SIGTERM, while the collector is this one's parent.

    A parent that died hands its children to another process, so the parent's id tells its death
    even when its own id is in use again.
    """
    told_to_end = False

    def end(_signal: int, _frame: FrameType | None) -> None:
        nonlocal told_to_end
        told_to_end = True

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # `start_ingester` held it back
    return lambda: collector_pid is not None and os.getppid() == collector_pid and not told_to_end


def main(arguments: list[str] | None = None) -> int:
    """Run the ingester; returns the exit code (0 done, 2 wrong input, 1 anything else).

    A failure is one sentence on stderr and, for a collector, with its type as JSON on stdout.
    """
    parser = argparse.ArgumentParser(prog="python -m moescope.probe.storage.ingest")
    parser.add_argument("store", type=resolve_store, help="the store; made when missing")
    parser.add_argument("run_folder", type=Path, help="the folder with the run's shards")
    parser.add_argument("--keep-shards", action="store_true", help="leave ingested shards on disk")
    parser.add_argument("--collector-pid", type=int, help="wait for more while this process lives")
    options = parser.parse_args(arguments)
    collector_lives = _collector_watch(options.collector_pid)
    try:
        folder = RunFolder(options.run_folder)
        folder.read()
        with disk_errors(f"ingesting {folder.path}"), _only_ingester(folder.path) as is_there:
            if is_there:
                ingester = Ingester(options.store, folder, keep_shards=options.keep_shards)
                ingester.run(collector_lives)
    except MoescopeError as error:
        _log_stop(options.store, options.run_folder, error)
        _tell(error, to_collector=options.collector_pid is not None)
        return 2 if isinstance(error, InputError) else 1
    except Exception as error:
        traceback.print_exc()
        reason = MoescopeError(f"the ingester stopped with {type(error).__name__}: {error}")
        _tell(reason, to_collector=options.collector_pid is not None)
        return 1
    return 0


def _log_stop(store: Path, folder: Path, error: MoescopeError) -> None:
    with suppress(MoescopeError):  # no folder of a run, so there is no log of one
        run_log(store, RunFolder(folder).read()[0]).write("stopped", why=str(error), by="ingester")


def _tell(error: MoescopeError, *, to_collector: bool) -> None:
    with suppress(OSError):
        if to_collector:
            told = {"type": type(error).__name__, "message": str(error)}
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
        sys.stderr.write(f"{error}\n")


def _run_as_process() -> NoReturn:
    """`main` as a process: a crash leaves its place in the log, and there is no slow goodbye.

    DuckDB 2.0.0 can crash while the interpreter shuts down (mended in 2.0.1). By then all is
    committed, synced and closed, so nothing is left to do that such a crash could spoil.
    """
    faulthandler.enable()
    code = main()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _run_as_process()
