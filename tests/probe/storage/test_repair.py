"""Repairing a store: what a broken collection left, and rows that contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moescope.probe.storage import Store, begin_run, run_folder, verify_run, write_shard
from moescope.probe.storage.repair import repair_store
from moescope.probe.storage.run_log import read_log

Contents = Callable[[Path], dict[str, list[Any]]]


def begin_and_write(
    store: Path, synthetic: ModuleType, run: str, num_shards: int, written: int
) -> Path:
    """A collection that was killed after so many shards, its ingester before."""
    description = synthetic.describe(num_shards)
    with begin_run(store, run, description) as point:
        for shard_id in point.missing[:written]:
            ids = description.planned_shards[shard_id]
            write_shard(point.folder.path, shard_id, synthetic.tables(ids), prompt_ids=ids)
    return point.folder.path


def test_a_sound_store_needs_nothing(store: Path, contents: Contents) -> None:
    before = contents(store)
    assert repair_store(store) == []
    assert contents(store) == before


def test_shards_that_nobody_ingested_are_ingested(store: Path, synthetic: ModuleType) -> None:
    begin_and_write(store, synthetic, "open", 4, 3)
    would = repair_store(store, dry_run=True)
    assert would == ["run 'open': 3 whole shards ingested"]
    assert list(Store(store).runs()["run_id"]) == ["base"]
    assert repair_store(store) == would
    runs = Store(store).runs().set_index("run_id")
    assert runs.at["open", "status"] == "running"
    with begin_run(store, "open", synthetic.describe(4)) as point:
        assert point.missing == ("shard-00003",)
    events = [event["event"] for event in read_log(store, "open")]
    assert events == ["ingested"]


def test_damaged_shards_are_removed_and_recorded_anew(store: Path, synthetic: ModuleType) -> None:
    folder = begin_and_write(store, synthetic, "open", 3, 2)
    file = folder / "shard-00001" / "routing_arrays.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = repair_store(store)
    assert done == [
        "run 'open': damaged shard-00001 removed; its command records it anew",
        "run 'open': 1 whole shards ingested",
    ]
    with begin_run(store, "open", synthetic.describe(3)) as point:
        assert point.missing == ("shard-00001", "shard-00002")


def test_a_run_that_is_being_recorded_is_left_alone(store: Path, synthetic: ModuleType) -> None:
    with begin_run(store, "live", synthetic.describe(2)):
        (sentence,) = repair_store(store)
    assert sentence.startswith("left alone: run 'live' is being recorded")
    assert run_folder(store, "live").has_run()


def test_half_written_folders_are_removed(store: Path, synthetic: ModuleType) -> None:
    folder = begin_and_write(store, synthetic, "open", 2, 0)
    doomed = folder.with_name(".removed-x-1-2")
    doomed.mkdir()
    (doomed / "file").touch()
    assert repair_store(store) == [f"{doomed} removed: it is half-written"]
    assert not doomed.exists()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE routing SET expert = 0 WHERE prompt_id = 2 AND layer = 1",
        "DELETE FROM routing WHERE prompt_id = 2 AND position = 1",
        "DELETE FROM tokens WHERE prompt_id = 2 AND position = 0",
        "DELETE FROM prompts WHERE prompt_id = 2",
    ],
)
def test_prompts_with_contradicting_rows_go_wholly_and_the_manifest_says_so(
    store: Path, change: Any, sql: str
) -> None:
    change(store, sql)
    assert verify_run(Store(store), "base") != []
    would = repair_store(store, dry_run=True)
    assert verify_run(Store(store), "base") != []
    assert repair_store(store) == would
    assert would[0].startswith("run 'base': 1 prompts with contradicting rows removed (")
    assert verify_run(Store(store), "base") == []
    run = Store(store).run("base")
    assert (run.num_prompts, run.status) == (5, "complete")
    (repair,) = run.manifest["repairs"]
    assert repair["removed_prompts"] == [2]
    for table in ("prompts", "tokens", "routing", "usage"):
        left = Store(store).query(f"SELECT DISTINCT prompt_id FROM {table} ORDER BY 1")
        assert left["prompt_id"].tolist() == [0, 1, 3, 4, 5]
    assert repair_store(store) == []


def test_more_contradictions_than_are_reported_are_all_mended(
    tmp_path: Path, filled: Callable[..., Path], change: Any
) -> None:
    store = filled(tmp_path / "large.duckdb", "base", 30)
    change(store, "UPDATE routing SET expert = 0 WHERE prompt_id % 2 = 0")
    repair_store(store)
    assert verify_run(Store(store), "base") == []
    assert Store(store).run("base").num_prompts == 30


def test_rows_of_no_run_and_wrong_counts_are_mended(
    store: Path, change: Any, contents: Contents
) -> None:
    before = contents(store)
    change(store, "INSERT INTO tokens SELECT * REPLACE ('ghost' AS run_id) FROM tokens")
    change(store, "UPDATE runs SET num_tokens = 7")
    done = repair_store(store)
    assert done == [
        "tokens: 42 rows that belong to no run removed",
        "run 'base': its counts set right (its number of tokens was wrong)",
    ]
    after = contents(store)
    assert after.pop("runs") != before.pop("runs")  # the manifest tells of it
    assert after == before
    assert Store(store).run("base").num_tokens == 42
