"""Deleting, merging and vacuuming: whole runs or nothing, also when killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import pytest

from moescope.probe.errors import RunError, StoreError
from moescope.probe.storage import (
    Store,
    begin_run,
    reading,
    run_folder,
    verify_run,
    write_shard,
)
from moescope.probe.storage.care import delete_run, merge_stores, vacuum_store
from moescope.probe.storage.ingest import Ingester
from moescope.probe.storage.locks import lock_path

Contents = Callable[[Path], dict[str, list[Any]]]
Fill = Callable[..., Path]


def runs_of(store: Path) -> list[str]:
    return list(Store(store).runs()["run_id"])


def without(contents: dict[str, list[Any]], run: str) -> dict[str, list[Any]]:
    return {name: [row for row in rows if row[0] != run] for name, rows in contents.items()}


def test_a_deleted_run_is_gone_and_the_others_are_untouched(
    store: Path, filled: Fill, contents: Contents
) -> None:
    before = contents(store)
    filled(store, "second", 2)
    rows = delete_run(store, "second")
    assert contents(store) == before
    assert rows > 4
    assert runs_of(store) == ["base"]
    assert not store.with_name(store.name + ".shards").exists()
    filled(store, "second", 2)  # the name is free again
    assert runs_of(store) == ["base", "second"]


def test_a_run_that_is_not_there_or_being_recorded_is_not_deleted(
    store: Path, synthetic: ModuleType
) -> None:
    with pytest.raises(RunError, match="has no run 'none'; it has base"):
        delete_run(store, "none")
    with begin_run(store, "live", synthetic.describe(2)):
        with pytest.raises(RunError, match="is being recorded by another process"):
            delete_run(store, "live")
        assert run_folder(store, "live").has_run()
    delete_run(store, "live")  # begun, never ingested: its folder goes
    assert not run_folder(store, "live").path.exists()


def test_vacuum_gives_space_back_and_changes_no_row(
    store: Path, filled: Fill, contents: Contents
) -> None:
    filled(store, "large", 60)
    delete_run(store, "large")
    before = contents(store)
    done = vacuum_store(store)
    assert done.after == store.stat().st_size < done.before
    assert contents(store) == before
    assert verify_run(Store(store), "base") == []
    leftovers = sorted(path.name for path in store.parent.iterdir())
    assert leftovers == sorted({store.name, lock_path(store).name} | logs(store))
    filled(store, "after", 1)


def logs(store: Path) -> set[str]:
    name = f"{store.name}.logs"
    return {name} if store.with_name(name).exists() else set()


VACUUM = """
import sys
from moescope.probe.storage.care import vacuum_store
print("go", flush=True)
vacuum_store(sys.argv[1])
"""


def test_a_killed_vacuum_leaves_the_store_as_it_was(
    store: Path, filled: Fill, contents: Contents
) -> None:
    filled(store, "large", 60)
    before = contents(store)
    for wait_s in (0.02, 0.1, 0.25):
        process = subprocess.Popen(
            [sys.executable, "-c", VACUUM, str(store)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert contents(store) == before
    vacuum_store(store)
    assert contents(store) == before
    assert not [p for p in store.parent.iterdir() if p.name.startswith(".unfinished-")]


def test_merged_runs_are_the_same_rows(
    store: Path, tmp_path: Path, filled: Fill, contents: Contents
) -> None:
    other = filled(tmp_path / "other.duckdb", "second", 2)
    into = tmp_path / "all.duckdb"
    merged = merge_stores(into, [store, other], rename={"second": "renamed"})
    assert [(run.run_id, run.name, run.there_already) for run in merged] == [
        ("base", "base", False), ("second", "renamed", False),
    ]  # fmt: skip
    everything = contents(into)
    assert without(everything, "renamed") == contents(store)
    renamed = {
        name: [("renamed", *row[1:]) for row in rows] for name, rows in contents(other).items()
    }
    assert without(everything, "base") == renamed
    assert verify_run(Store(into), "renamed") == []
    again = merge_stores(into, [store, other], rename={"second": "renamed"})
    assert all(run.there_already for run in again)
    assert contents(into) == everything


def test_what_cannot_be_merged_is_said_before_anything_is_copied(
    store: Path, tmp_path: Path, filled: Fill, contents: Contents, synthetic: ModuleType
) -> None:
    before = contents(store)
    other = filled(tmp_path / "other.duckdb", "base", 2)
    with pytest.raises(RunError, match=r"different runs 'base'; give the one of other\.duckdb"):
        merge_stores(store, [other])
    with pytest.raises(StoreError, match="cannot be merged into itself"):
        merge_stores(store, [store])
    with pytest.raises(RunError, match="no store to merge has a run 'nothing' to rename"):
        merge_stores(store, [other], rename={"nothing": "x", "base": "y"})
    with pytest.raises(StoreError, match="there is no store at"):
        merge_stores(store, [tmp_path / "missing.duckdb"])
    begin_one_shard(other, synthetic, "open")
    with pytest.raises(RunError, match=r"run .open. of .* is not complete"):
        merge_stores(store, [other], rename={"base": "y"})
    assert contents(store) == before


def begin_one_shard(store: Path, synthetic: ModuleType, run: str) -> None:
    """A run of three shards, of which one was collected and ingested."""
    description = synthetic.describe(3)
    with begin_run(store, run, description) as point:
        shard_id = point.missing[0]
        ids = description.planned_shards[shard_id]
        write_shard(point.folder.path, shard_id, synthetic.tables(ids), prompt_ids=ids)
        Ingester(store, point.folder).run(lambda: False)


def test_plans_and_evaluations_come_along_once(store: Path, tmp_path: Path, change: Any) -> None:
    change(store, "INSERT INTO plans VALUES ('p1', 'plan', now(), '{}')")
    change(
        store,
        "INSERT INTO evaluations SELECT 'e1', 'p1', now(), 'steered', 's', m, 0.5, 0, 1, 9, '{}' "
        "FROM (VALUES ('refused'), ('correct')) t(m)",
    )
    into = tmp_path / "all.duckdb"
    for _ in range(2):
        merge_stores(into, [store])
        counted = Store(into).query(
            "SELECT (SELECT count(*) FROM plans) AS p, (SELECT count(*) FROM evaluations) AS e"
        )
        assert counted.to_numpy().tolist() == [[1, 2]]


@pytest.mark.parametrize("table", ["routing_arrays", "plans"])
def test_a_strangers_view_on_this_machines_files_is_not_copied(
    store: Path, tmp_path: Path, table: str
) -> None:
    with duckdb.connect(str(store)) as con:
        con.execute(f"DROP TABLE {table}").fetchall()
        con.execute(
            f"CREATE VIEW {table} AS SELECT content AS run_id FROM read_text('/etc/passwd')"
        ).fetchall()
    into = tmp_path / "all.duckdb"
    for attempt in (lambda: merge_stores(into, [store]), lambda: vacuum_store(store)):
        with pytest.raises(StoreError, match=f"no sound store: {table} is not a table"):
            attempt()
    if into.exists() and table == "routing_arrays":
        assert runs_of(into) == []


def test_a_full_disk_leaves_the_store_as_it_was(store: Path, contents: Contents) -> None:
    """The new file may not grow: a limit on file sizes stands for a disk that is full."""
    before = contents(store)
    script = (
        "import resource, signal, sys\n"
        "from moescope.probe.storage.care import vacuum_store\n"
        "from moescope.probe.errors import MoescopeError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try:\n    vacuum_store(sys.argv[1])\n"
        "except MoescopeError as error:\n    print(error); sys.exit(7)\n"
    )
    copy = Path(shutil.copy(store, store.with_name("full.duckdb")))
    done = subprocess.run(
        [sys.executable, "-c", script, str(copy)], capture_output=True, text=True,
        env={**os.environ}, check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert contents(copy) == before
    with reading(copy):
        pass
