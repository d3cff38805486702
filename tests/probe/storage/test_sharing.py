"""Readers and a collection on one store at once, without an error on either side."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import pytest

from moescope.probe.storage import Store, finished_shards, run_folder, verify_run

READ_FOR_A_WHILE = """
import sys, threading
from pathlib import Path
from moescope.probe.storage import Store
store, end = Store(sys.argv[1]), Path(sys.argv[2])
counts, failures = [], []
def read():
    seen = 0
    while not end.exists():
        try:
            rows = store.arrow(
                "SELECT (SELECT count(*) FROM prompts) AS p, (SELECT count(*) FROM routing) AS r,"
                " (SELECT count(*) FROM ingested_shards) AS s"
            ).to_pylist()[0]
            assert rows["r"] == 24 * rows["p"], rows   # whole shards only
            assert rows["p"] >= seen, rows
            seen = rows["p"]
            counts.append(rows["s"])
            store.runs()
        except Exception as error:
            failures.append(repr(error))
threads = [threading.Thread(target=read) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(counts), len(set(counts)), failures[:3])
"""


@contextmanager
def oldest_shard(folder: Path) -> Iterator[list[float]]:
    """How long shards lie whole before they are in the store: their ages in seconds."""
    ages: list[float] = []
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.2):
            for shard_id in finished_shards(folder):
                with suppress(FileNotFoundError):  # ingested meanwhile
                    ages.append(time.time() - (folder / shard_id).stat().st_mtime)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield ages
    finally:
        end.set()
        thread.join()


def read_while_collecting(
    store: Path, synthetic: ModuleType, seconds: float, processes: int = 2
) -> tuple[int, int]:
    """Processes of readers, with threads, beside a collection that takes so long.

    Returns:
        Reads in all, and how many different states of the store the readers of one process saw.
    """
    end = store.with_name("end")
    synthetic.collect(store, "first", synthetic.describe(1))
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READ_FOR_A_WHILE, str(store), str(end)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    num_shards = max(10, int(seconds / 0.1))
    description = synthetic.describe(num_shards)
    try:
        with oldest_shard(run_folder(store, "base").path) as ages:
            synthetic.collect(store, "base", description, pause_s=seconds / num_shards)
    finally:
        end.touch()
    assert max(ages, default=0.0) < 30, "a whole shard must be committed within 30 s"
    reads, states = 0, 0
    for reader in readers:
        output, _ = reader.communicate()
        done, seen, failures = output.split(maxsplit=2)
        assert failures.strip() == "[]"
        reads += int(done)
        states = max(states, int(seen))
    assert verify_run(Store(store), "base") == []
    return reads, states


def test_readers_and_a_collection_share_the_store(tmp_path: Path, synthetic: ModuleType) -> None:
    reads, states = read_while_collecting(tmp_path / "a.duckdb", synthetic, 2.0)
    assert reads > 10 and states > 2


@pytest.mark.soak
def test_readers_and_a_collection_share_the_store_for_long(
    tmp_path: Path, synthetic: ModuleType, soak_share: float
) -> None:
    seconds = 60.0 if soak_share >= 1 else 10.0
    reads, states = read_while_collecting(tmp_path / "a.duckdb", synthetic, seconds, processes=3)
    assert reads > 100 and states > 10
