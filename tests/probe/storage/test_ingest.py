"""From shards into the store: every shard counts once, and what goes wrong is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from moescope.probe.errors import MoescopeError, RecordingError, RunError, StoreError
from moescope.probe.storage import (
    IngesterProcess,
    Store,
    begin_run,
    finished_shards,
    run_folder,
    start_ingester,
    verify_run,
    write_shard,
    writing,
)
from moescope.probe.storage.ingest import main

Contents = Callable[[Path], dict[str, list[Any]]]
Fill = Callable[..., Path]


def test_a_run_goes_through_a_real_ingester(
    tmp_path: Path, synthetic: ModuleType, filled: Fill, contents: Contents
) -> None:
    store = tmp_path / "a.duckdb"
    assert len(synthetic.collect(store, "base", synthetic.describe(3))) == 3
    assert contents(store) == contents(filled(tmp_path / "b.duckdb"))
    assert verify_run(Store(store), "base") == []
    names = [f"{store}.duckdb{end}" for store in "ab" for end in ("", ".lock", ".logs")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert synthetic.collect(store, "base", synthetic.describe(3)) == []


def test_the_folder_of_a_run_that_another_collector_goes_on_with_is_left_to_it(
    tmp_path: Path, synthetic: ModuleType, contents: Contents
) -> None:
    """The ingester of a killed collector ends while the run is being gone on with."""
    store, description = tmp_path / "a.duckdb", synthetic.describe(2)
    folder = synthetic.written(store, 2)
    with begin_run(store, "base", description) as point:
        assert point.missing == () and not point.is_complete
        assert main([str(store), str(folder)]) == 0  # as an orphan does: it completes the run
        assert Store(store).run("base").status == "complete"
        with start_ingester(store, point.folder):
            point.folder.finish()
    assert not folder.exists()
    assert verify_run(Store(store), "base") == []


def test_shards_can_be_kept(tmp_path: Path, synthetic: ModuleType, contents: Contents) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(2)
    synthetic.collect(store, "base", description, keep_shards=True)
    before = contents(store)
    folder = run_folder(store, "base").path
    assert finished_shards(folder) == ["shard-00000", "shard-00001"]
    with begin_run(store, "base", description) as point:
        assert point.is_complete
    assert main([str(store), str(folder), "--keep-shards"]) == 0
    assert contents(store) == before
    assert main([str(store), str(folder)]) == 0
    assert contents(store) == before and not folder.exists()


def test_a_shard_that_comes_twice_counts_once(
    tmp_path: Path, synthetic: ModuleType, contents: Contents
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(2)
    with begin_run(store, "base", description) as point:
        for _ in range(2):
            synthetic.write_all(point.folder.path, description, ["shard-00000"])
            assert main([str(store), str(point.folder.path)]) == 0
            assert finished_shards(point.folder.path) == []
    rows = contents(store)
    assert len(rows["prompts"]) == 2 and len(rows["ingested_shards"]) == 1


def test_ingesters_of_one_run_and_of_another_do_not_disturb_each_other(
    tmp_path: Path, synthetic: ModuleType, filled: Fill, contents: Contents
) -> None:
    store = tmp_path / "a.duckdb"
    folders = []
    for name in ("base", "other"):
        description = synthetic.describe(4)
        with begin_run(store, name, description) as point:
            synthetic.write_all(point.folder.path, description, point.missing)
            point.folder.finish()
            folders.append(point.folder.path)
    processes = [
        subprocess.Popen(synthetic.by_hand(store, folder)) for folder in [*folders, folders[0]]
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    filled(tmp_path / "b.duckdb", run="base", num_shards=4)
    filled(tmp_path / "b.duckdb", run="other", num_shards=4)
    assert contents(store) == contents(tmp_path / "b.duckdb")


def test_an_abandoned_collection_leaves_a_run_to_go_on_with(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(4)
    with begin_run(store, "base", description) as point:
        with pytest.raises(KeyboardInterrupt), start_ingester(store, point.folder) as ingester:
            synthetic.write_all(point.folder.path, description, point.missing[:2])
            raise KeyboardInterrupt
        assert ingester.process.returncode == 0
        assert ingester.status() is not None
        assert ingester.status().num_ingested == 2
    assert Store(store).run("base").status == "running"
    with begin_run(store, "base", description) as point:
        assert point.missing == ("shard-00002", "shard-00003")


def test_the_collector_hears_that_its_ingester_was_killed(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(2)
    with begin_run(store, "base", description) as point:
        ingester = start_ingester(store, point.folder)
        ingester.check()
        ingester.process.kill()
        ingester.process.wait()
        with pytest.raises(MoescopeError, match="killed by signal 9; start the same command again"):
            ingester.check()


def test_a_damaged_shard_reaches_the_collector_and_is_recorded_anew(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(3)
    with begin_run(store, "base", description) as point:
        synthetic.write_all(point.folder.path, description, point.missing)
        damaged = point.folder.path / "shard-00001"
        file = damaged / "routing_arrays.parquet"
        file.write_bytes(file.read_bytes()[:-3] + b"xyz")
        point.folder.finish()
        with (
            pytest.raises(RecordingError, match=r"shard-00001 is damaged: routing_arrays\.parquet"),
            start_ingester(store, point.folder) as ingester,
        ):
            ingester.wait_until_done(timeout_s=30)
    assert Store(store).query("SELECT * FROM prompts WHERE prompt_id IN (2, 3)").empty
    assert Store(store).run("base").status == "running"
    shutil.rmtree(damaged)  # as the message says
    assert synthetic.collect(store, "base", description) == ["shard-00001"]
    assert Store(store).run("base").status == "complete"


def test_rows_that_contradict_each_other_fail_the_run(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(2)
    with begin_run(store, "base", description) as point:
        for shard_id, ids in description.planned_shards.items():
            tables = synthetic.tables(ids)
            if shard_id == "shard-00001":
                tables["routing_arrays"] = tables["routing_arrays"].slice(1)
            write_shard(point.folder.path, shard_id, tables, prompt_ids=ids)
        point.folder.finish()
        with (
            pytest.raises(
                RecordingError,
                match=r"in 3 places .*prompt 0, token 0, layer 0 \(mlp\): 0 slots .* top-k is 2",
            ),
            start_ingester(store, point.folder) as ingester,
        ):
            ingester.wait_until_done(timeout_s=30)
    assert Store(store).run("base").status == "failed"


def test_a_shard_that_is_lost_after_all_was_written_is_said(
    tmp_path: Path, synthetic: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "a.duckdb"
    folder = synthetic.written(store, 2)
    shutil.rmtree(folder / "shard-00001")
    assert main([str(store), str(folder)]) == 1
    assert "shard-00001 (1 in all) is neither in" in capsys.readouterr().err


def test_a_shard_with_other_prompts_than_planned_is_refused(
    tmp_path: Path, synthetic: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "a.duckdb"
    folder = synthetic.written(store, 2)
    shutil.rmtree(folder / "shard-00001")
    write_shard(folder, "shard-00001", synthetic.tables([0]), prompt_ids=[0])
    assert main([str(store), str(folder)]) == 1
    assert "shard-00001 in" in capsys.readouterr().err
    assert Store(store).query("SELECT * FROM prompts").empty


@pytest.mark.parametrize("place", ["folder", "store"])
def test_wrong_input_by_hand_is_one_sentence(
    tmp_path: Path, synthetic: ModuleType, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    folder = synthetic.written(tmp_path / "a.duckdb", 1)
    if place == "folder":
        assert main([str(tmp_path / "a.duckdb"), str(tmp_path)]) == 2
    else:
        (tmp_path / "a.duckdb").write_text("text")
        assert main([str(tmp_path / "a.duckdb"), str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_the_error_of_a_collectors_ingester_keeps_its_type(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(1)
    with begin_run(store, "base", description) as point:
        store.write_text("somebody else's file")
        with pytest.raises(StoreError, match="not a DuckDB file"):
            start_ingester(store, point.folder).wait_until_done(timeout_s=30)
    with pytest.raises(RunError, match="no folder of a run"):
        start_ingester(store, tmp_path)


def test_another_run_of_the_same_name_is_not_mixed_in(
    tmp_path: Path, synthetic: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "a.duckdb"
    folder = synthetic.written(store, 1)
    assert main([str(store), str(folder), "--keep-shards"]) == 0
    with writing(store) as con:
        other = json.dumps({"identity": {"model": "x"}})
        con.execute("UPDATE runs SET manifest = ?", [other]).fetchall()
    assert main([str(store), str(folder)]) == 2
    assert "has another run 'base' already" in capsys.readouterr().err


def test_tables_left_out_of_a_shard_stay_empty(
    tmp_path: Path, synthetic: ModuleType, filled: Fill
) -> None:
    store = filled(tmp_path / "a.duckdb", record_level="usage")
    assert Store(store).query("SELECT * FROM routing").empty
    slots = Store(store).arrow("SELECT sum(num_tokens) AS n FROM usage").to_pylist()
    assert slots == pa.table({"n": [6 * 6 * 2 * 2]}).to_pylist()


def test_a_slow_store_is_waited_for_and_the_collector_is_told(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(1)
    said: list[str] = []
    with begin_run(store, "base", description) as point:
        synthetic.write_all(point.folder.path, description, point.missing)
        point.folder.finish()
    with writing(store):
        ingester = start_ingester(store, point.folder)
        synthetic.wait_until(lambda: waited_for(ingester) is not None)
        with pytest.raises(MoescopeError, match=r"did not finish within 0.5 s \(waiting for"):
            ingester.wait_until_done(timeout_s=0.5, announce=said.append)
    ingester.wait_until_done(timeout_s=30)
    assert said == [f"waiting for {store}: process {os.getpid()} writes it"]
    assert Store(store).run("base").status == "complete"


def waited_for(ingester: IngesterProcess) -> str | None:
    status = ingester.status()
    return None if status is None else status.waiting_for
