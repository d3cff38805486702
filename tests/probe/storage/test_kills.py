"""Killed at any moment, started again: the store is the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moescope.probe.storage import Store, finished_shards, run_folder
from moescope.probe.storage.ingest import INGESTER_LOCK

Contents = Callable[[Path], dict[str, list[Any]]]
Fill = Callable[..., Path]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has ended already
        os.kill(pid, signal.SIGKILL)


def end_well(command: list[str]) -> None:
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr


def kill_ingesters(
    store: Path, synthetic: ModuleType, num_kills: int, delay: Callable[[], float]
) -> int:
    """Ingest a run of many shards, killed again and again after it began; how many kills hit."""
    folder = synthetic.written(store, 12)
    hits = 0
    for _ in range(num_kills):
        (folder / INGESTER_LOCK).unlink(missing_ok=True)
        process = start(synthetic.by_hand(store, folder))
        synthetic.wait_until((folder / INGESTER_LOCK).exists)
        time.sleep(delay())
        kill(process.pid)
        process.communicate()
        hits += process.returncode == -signal.SIGKILL
        if not (folder / "run.json").exists():  # it was complete before the kill
            return hits
    end_well(synthetic.by_hand(store, folder))
    return hits


def test_an_ingester_killed_at_any_moment_loses_and_doubles_nothing(
    tmp_path: Path, synthetic: ModuleType, filled: Fill, contents: Contents
) -> None:
    delays = iter([0.0, 0.1, 0.2, 0.3])
    kill_ingesters(tmp_path / "killed.duckdb", synthetic, 4, lambda: next(delays))
    expected = contents(filled(tmp_path / "whole.duckdb", num_shards=12))
    assert contents(tmp_path / "killed.duckdb") == expected


def ingester_of(process: subprocess.Popen[str]) -> int | None:
    """The ingester's id, which the synthetic collector prints first; None when it had no work."""
    assert process.stdout is not None
    words = process.stdout.readline().split()
    assert words[:1] in ([], ["ingester"])
    return int(words[1]) if words else None


def collector_kills(
    store: Path,
    collector: list[str],
    whom: Sequence[str],
    delays: Sequence[float],
    shards: int = 10,
) -> None:
    """Record a run whose collector or ingester is killed again and again, then let it end."""
    command = [*collector, str(store), "base", "--shards", str(shards), "--pause-s", "0.03"]
    for victim, delay in zip(whom, delays, strict=True):
        process = start(command)
        ingester = ingester_of(process)
        if ingester is not None:  # else the run is complete already
            time.sleep(delay)
            for pid in {"collector": [process.pid], "ingester": [ingester]}.get(
                victim, [process.pid, ingester]
            ):
                kill(pid)
        process.communicate()
    end_well(command)


def test_a_collection_killed_at_any_moment_gives_the_same_store(
    tmp_path: Path, filled: Fill, collector: list[str], contents: Contents
) -> None:
    store = tmp_path / "killed.duckdb"
    collector_kills(store, collector, ["collector", "ingester"], [0.3, 0.6], shards=6)
    assert contents(store) == contents(filled(tmp_path / "whole.duckdb", num_shards=6))
    assert not store.with_name("killed.duckdb.shards").exists()


def test_when_the_collector_dies_what_is_whole_is_ingested(
    tmp_path: Path, collector: list[str], synthetic: ModuleType
) -> None:
    store = tmp_path / "a.duckdb"
    command = [*collector, str(store), "base", "--shards", "40", "--pause-s", "0.1"]
    process = start(command)
    folder = run_folder(store, "base").path
    synthetic.wait_until(store.exists)
    synthetic.wait_until(lambda: len(Store(store).query("SELECT * FROM ingested_shards")) >= 2)
    process.kill()
    process.communicate()
    done = Store(store).query("SELECT shard_id FROM ingested_shards")["shard_id"]
    whole = {*finished_shards(folder), *done}
    synthetic.wait_until(lambda: finished_shards(folder) == [])
    reader = Store(store)
    assert reader.run("base").status == "running"
    assert set(reader.query("SELECT shard_id FROM ingested_shards")["shard_id"]) >= whole
    prompts = reader.query("SELECT prompt_id FROM prompts")["prompt_id"]
    assert prompts.is_unique and len(prompts) == 2 * len(
        reader.query("SELECT * FROM ingested_shards")
    )


@pytest.mark.soak
def test_ingesters_killed_hundreds_of_times_lose_and_double_nothing(
    tmp_path: Path, synthetic: ModuleType, filled: Fill, contents: Contents, soak_share: float
) -> None:
    draw = random.Random(20)
    expected = contents(filled(tmp_path / "whole.duckdb", num_shards=12))
    rounds, hits = max(1, round(80 * soak_share)), 0
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        store = folder / "killed.duckdb"
        hits += kill_ingesters(store, synthetic, 5, lambda: draw.uniform(0.0, 0.5))
        assert contents(store) == expected
        shutil.rmtree(folder)
    assert hits >= 2 * rounds


@pytest.mark.soak
def test_collections_killed_hundreds_of_times_give_the_same_store(
    tmp_path: Path, filled: Fill, collector: list[str], contents: Contents, soak_share: float
) -> None:
    draw = random.Random(21)
    expected = contents(filled(tmp_path / "whole.duckdb", num_shards=10))
    for number in range(max(1, round(40 * soak_share))):
        folder = tmp_path / str(number)
        folder.mkdir()
        whom = draw.choices(["collector", "ingester", "both"], k=4)
        delays = [draw.uniform(0.0, 1.5) for _ in whom]
        collector_kills(folder / "killed.duckdb", collector, whom, delays)
        assert contents(folder / "killed.duckdb") == expected
        shutil.rmtree(folder)
