"""Readers and a collection on one store at once, without an error on either side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moescope.probe.storage import Store, verify_run

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


def read_while_collecting(store: Path, synthetic: ModuleType, seconds: float) -> tuple[int, int]:
    """Two processes of readers, with threads, beside a collection that takes so long.

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
        for _ in range(2)
    ]
    num_shards = max(10, int(seconds / 0.1))
    description = synthetic.describe(num_shards)
    try:
        synthetic.collect(store, "base", description, pause_s=seconds / num_shards)
    finally:
        end.touch()
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
    tmp_path: Path, synthetic: ModuleType
) -> None:
    reads, states = read_while_collecting(tmp_path / "a.duckdb", synthetic, 30.0)
    assert reads > 100 and states > 10
