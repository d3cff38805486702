"""A run whose routing stays in Parquet shards is read, cared for and resumed like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from moescope.probe.errors import StoreError
from moescope.probe.storage import (
    Store,
    begin_run,
    reading,
    run_folder,
    verify_run,
    write_shard,
    writing,
)
from moescope.probe.storage.care import delete_run, merge_stores, vacuum_store
from moescope.probe.storage.ingest import Ingester
from moescope.probe.storage.repair import repair_store
from moescope.probe.storage.run_folder import shards_beside

Fill = Callable[..., Path]
SLOTS = "SELECT * EXCLUDE (run_id) FROM routing WHERE run_id = ? ORDER BY ALL"


@pytest.fixture
def both(store: Path, filled: Fill) -> Path:
    """A store with the same run twice: `base` in the store, `kept` in its shards."""
    return filled(store, "kept", routing_in="shards")


def slots(store: Path, run: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Store(store).arrow(SLOTS, [run]).to_pylist()
    return rows


def test_it_has_the_same_rows_as_a_run_in_the_store(both: Path) -> None:
    opened = Store(both)
    assert slots(both, "kept") == slots(both, "base") != []
    for table in ("usage", "tokens", "prompts"):
        sql = f"SELECT * EXCLUDE (run_id) FROM {table} WHERE run_id = ? ORDER BY ALL"
        assert opened.arrow(sql, ["kept"]).equals(opened.arrow(sql, ["base"]))
    with writing(both) as con:  # a writer sees the file alone
        inside = con.execute("SELECT DISTINCT run_id FROM routing_arrays").fetchall()
    assert inside == [("base",)]
    assert opened.has_routing("kept")
    assert verify_run(opened, "kept") == verify_run(opened, "base") == []


def test_probabilities_stay_too(tmp_path: Path, synthetic: ModuleType) -> None:
    store = tmp_path / "p.duckdb"
    described = synthetic.describe(2, record_level="probs", routing_in="shards")
    with begin_run(store, "kept", described) as point:
        for shard_id, ids in described.planned_shards.items():
            tables = synthetic.tables(ids)
            tokens = tables["routing_arrays"].select(["prompt_id", "position", "layer", "kind"])
            probs = pa.array([[1 / 6] * 6] * tokens.num_rows, pa.list_(pa.float32()))
            tables["router_probs"] = tokens.append_column("probs", probs)
            write_shard(point.folder.path, shard_id, tables, prompt_ids=ids)
        point.folder.finish()
        Ingester(store, point.folder).run(lambda: False)
    assert verify_run(Store(store), "kept") == []
    counted = Store(store).query("SELECT count(*) AS n, sum(probs[1]) AS p FROM router_probs")
    assert counted.to_numpy().tolist() == [[4 * 6 * 2, pytest.approx(8)]]
    with writing(store) as con:
        assert con.execute("SELECT count(*) FROM router_probs").fetchall() == [(0,)]


def test_a_complete_run_is_not_recorded_again(both: Path, synthetic: ModuleType) -> None:
    with begin_run(both, "kept", synthetic.describe(3, routing_in="shards")) as point:
        assert point.is_complete
    assert len(list(run_folder(both, "kept").path.glob("shard-*"))) == 3


def test_when_its_folder_is_gone_only_this_run_says_so(both: Path, tmp_path: Path) -> None:
    folder = run_folder(both, "kept").path
    expected = slots(both, "kept")
    folder.rename(tmp_path / "elsewhere")
    assert slots(both, "base") == expected
    with pytest.raises(StoreError, match=r"routing of run 'kept' stays in .* put the folder back"):
        slots(both, "kept")
    (tmp_path / "elsewhere").rename(folder)
    assert slots(both, "kept") == expected


def test_the_shards_may_lie_on_another_disk(tmp_path: Path, filled: Fill) -> None:
    store, other = tmp_path / "here" / "a.duckdb", tmp_path / "other"
    other.mkdir()
    store.parent.mkdir()
    shards_beside(store).symlink_to(other)
    filled(store, "kept", routing_in="shards")
    filled(store, "base")
    assert list(other.rglob("routing_arrays.parquet"))
    assert slots(store, "kept") == slots(store, "base") != []


def test_a_damaged_shard_is_found_and_recorded_anew(both: Path, synthetic: ModuleType) -> None:
    file = run_folder(both, "kept").path / "shard-00001" / "routing_arrays.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (problem,) = verify_run(Store(both), "kept")
    assert "shard-00001 is damaged: routing_arrays.parquet has other bytes" in str(problem)
    assert repair_store(both, dry_run=True)[0] == (
        "run 'kept': damaged shard-00001 removed; its command records it anew"
    )
    repair_store(both)
    assert Store(both).run("kept").status == "running"
    described = synthetic.describe(3, routing_in="shards")
    assert synthetic.collect(both, "kept", described) == ["shard-00001"]
    assert slots(both, "kept") == slots(both, "base")
    assert verify_run(Store(both), "kept") == []


def test_shards_with_contradicting_prompts_are_recorded_anew(
    both: Path, synthetic: ModuleType, change: Callable[[Path, str], None]
) -> None:
    change(both, "DELETE FROM tokens WHERE run_id = 'kept' AND prompt_id = 2 AND position = 0")
    (sentence,) = repair_store(both)
    assert sentence.startswith("run 'kept': 1 shards with contradicting rows removed")
    synthetic.collect(both, "kept", synthetic.describe(3, routing_in="shards"))
    assert slots(both, "kept") == slots(both, "base")
    assert repair_store(both) == []


def test_it_is_vacuumed_merged_and_deleted(both: Path, tmp_path: Path) -> None:
    expected = slots(both, "base")
    vacuum_store(both)
    assert slots(both, "kept") == expected
    merge_stores(tmp_path / "all.duckdb", [both])
    with reading(tmp_path / "all.duckdb") as con:  # in another store it has no shards of its own
        assert con.execute("SELECT count(*) FROM runs_in_shards").fetchall() == [(0,)]
        halves = con.execute(
            "SELECT count(bf16_weights) FROM routing_arrays WHERE run_id = 'kept'"
        ).fetchall()
    assert halves[0][0] > 0
    assert slots(tmp_path / "all.duckdb", "kept") == expected
    delete_run(both, "kept")
    assert not shards_beside(both).exists()
    assert Store(both).query("SELECT * FROM runs_in_shards").empty
    assert slots(both, "base") == expected


def test_names_are_never_sql(tmp_path: Path, filled: Fill) -> None:
    name = "it's; DROP TABLE runs; --"
    store = filled(tmp_path / "o'clock.duckdb", name, routing_in="shards")
    filled(store, "base")
    assert slots(store, name) == slots(store, "base") != []
