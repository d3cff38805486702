"""Reading a store: what comes back, and that nothing reaches out of it."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import duckdb
import pandas as pd
import pytest

from moescope.probe.errors import RunError, StoreError
from moescope.probe.storage import SHARD_TABLES, RunInfo, Store, reading
from moescope.probe.storage.locks import writing
from moescope.probe.storage.run_folder import shards_beside
from moescope.probe.storage.slots import arrays_of_slots


def test_every_row_comes_back_as_it_was_written(store: Path, synthetic: ModuleType) -> None:
    written = synthetic.tables(range(6))
    slots = Store(store).arrow("SELECT * EXCLUDE (run_id) FROM routing WHERE run_id = 'base'")
    rows = written.pop("routing_arrays")
    assert arrays_of_slots(slots).cast(rows.schema).equals(rows)
    for name, rows in written.items():
        order = "ALL"
        columns = ", ".join(SHARD_TABLES[name].names)
        back = Store(store).arrow(
            f"SELECT {columns} FROM {name} WHERE run_id = 'base' ORDER BY {order}"
        )
        key = [column for column in columns.split(", ") if column in _KEYS]
        assert sorted(back.to_pylist(), key=_by(key)) == sorted(rows.to_pylist(), key=_by(key))


_KEYS = ("prompt_id", "phase", "segment", "is_special", "position", "layer", "rank")


def _by(columns: list[str]) -> Callable[[dict[str, object]], tuple[object, ...]]:
    return lambda row: tuple(row[column] for column in columns)


def test_a_run_is_described(store: Path, synthetic: ModuleType) -> None:
    info = Store(store).run("base")
    description = synthetic.describe(3)
    assert (info.status, info.source, info.record_level) == ("complete", "recorded", "topk")
    assert (info.model, info.revision, info.family) == ("synthetic", None, "none")
    assert (info.num_prompts, info.num_tokens) == (6, 6 * 7)
    known = {"weights_kept_as": {"bf16": 6 * 6 * 2}}  # rows of arrays: prompts x tokens x layers
    assert info.manifest == {**description.manifest, **description.fingerprint(), **known}
    assert info.manifest["batch_plan"]["prompt_ranges"] == [[0, 5]]
    assert info.finished_at is not None
    age = datetime.now(UTC) - info.created_at
    assert timedelta(0) <= info.finished_at - info.created_at <= age < timedelta(minutes=5)


def test_run_info_has_the_columns_of_runs(store: Path) -> None:
    columns = Store(store).query("DESCRIBE runs")["column_name"]
    assert list(columns) == list(inspect.signature(RunInfo).parameters)
    assert list(Store(store).runs().columns) == list(columns)


def test_an_unknown_run_is_named_with_those_there_are(
    store: Path, filled: Callable[..., Path]
) -> None:
    filled(store, run="second", num_shards=1)
    reader = Store(store)
    for ask in (reader.run, reader.layers, reader.has_routing):
        with pytest.raises(RunError, match=r"no run 'thrid'; it has base, second"):
            ask("thrid")


def test_layers_come_in_model_order_with_their_rule(store: Path) -> None:
    layers = Store(store).layers("base")
    assert list(layers["layer"]) == [0, 1]
    assert list(layers["num_experts"]) == [6, 6]
    assert json.loads(layers["rule"][0]) == {"score": "softmax", "top_k": 2}


def test_routing_is_there_when_it_was_recorded(store: Path, filled: Callable[..., Path]) -> None:
    filled(store, run="counts", num_shards=1, record_level="usage")
    reader = Store(store)
    assert reader.has_routing("base") is True
    assert reader.has_routing("counts") is False


def test_queries_take_parameters_both_ways(store: Path) -> None:
    reader = Store(store)
    marks = reader.query("SELECT ? + 1 AS a, ? AS b", [1, "x"])
    assert marks.to_dict("records") == [{"a": 2, "b": "x"}]
    named = reader.query("SELECT $n + 1 AS a", {"n": 1})
    assert named["a"].tolist() == [2]
    assert reader.query("SELECT prompt_id FROM prompts WHERE prompt_id > ?", [9]).empty


def test_usage_is_a_view_over_the_arrays(store: Path, synthetic: ModuleType) -> None:
    usage = Store(store).query(
        "SELECT * FROM usage WHERE prompt_id = 3 AND layer = 1 AND phase = 'generated' "
        "ORDER BY expert"
    )
    arrays = [
        row
        for row in synthetic.tables([3])["usage_arrays"].to_pylist()
        if row["layer"] == 1 and row["phase"] == "generated"
    ]
    assert len(arrays) == 1
    assert usage["expert"].tolist() == list(range(6))
    for column in ("num_tokens", "weight_sum", "prob_sum"):
        assert usage[column].tolist() == pytest.approx(arrays[0][column])


def test_a_wrong_query_is_the_callers_error(store: Path) -> None:
    with pytest.raises(duckdb.CatalogException):
        Store(store).query("SELECT * FROM nothing")


def test_a_store_cannot_be_changed_through_a_reader(store: Path) -> None:
    with pytest.raises(StoreError, match="only read here, DELETE is refused"):
        Store(store).query("DELETE FROM runs")
    with reading(store) as con, pytest.raises(duckdb.InvalidInputException, match="read-only"):
        con.execute("DELETE FROM runs").fetchall()
    assert len(Store(store).runs()) == 1


def test_queries_at_once_open_the_store_once_and_leave_it_free(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Store(store)
    opened: list[str] = []
    plain = Store.connection

    def counting(self: Store) -> object:
        opened.append(threading.current_thread().name)
        return plain(self)

    monkeypatch.setattr(Store, "connection", counting)
    with reader.at_once():
        with reader.at_once():
            assert reader.run("base").run_id == "base"
        assert len(reader.layers("base"))
        other = threading.Thread(target=lambda: reader.runs(), name="other")
        other.start()
        other.join()
    assert opened == ["MainThread", "other"]
    with pytest.raises(RunError), reader.at_once():
        reader.run("none")
    with writing(store, wait_s=1.0) as con:
        con.execute("SELECT 1").fetchall()
    assert len(reader.runs())


def test_many_threads_share_one_reader(store: Path) -> None:
    reader, errors, frames = Store(store), [], []

    def work() -> None:
        try:
            for _ in range(10):
                frames.append(reader.query("SELECT count(*) AS n FROM routing"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert pd.concat(frames)["n"].tolist() == [6 * 6 * 2 * 2] * 60


def hostile_store(store: Path, statement: str) -> None:
    with duckdb.connect(str(store)) as con:  # as somebody else would, with everything allowed
        con.execute(statement).fetchall()


@pytest.mark.parametrize(
    "source",
    [
        "read_text('/etc/passwd')",
        "read_csv('/etc/passwd', delim=':', header=false)",
        "read_blob('/etc/*')",
        "glob('/etc/*')",
    ],
)
def test_a_view_in_a_store_cannot_read_files(store: Path, source: str) -> None:
    hostile_store(store, f"CREATE VIEW peek AS SELECT * FROM {source}")
    reader = Store(store)
    for read in (reader.query, reader.arrow):
        with pytest.raises(StoreError, match="reach outside the store"):
            read("SELECT * FROM peek")
    assert len(reader.runs()) == 1


def test_a_store_whose_version_table_reads_files_is_refused(store: Path) -> None:
    hostile_store(store, "DROP TABLE moescope_schema")
    hostile_store(
        store,
        "CREATE VIEW moescope_schema AS SELECT 1 AS version FROM read_text('/etc/passwd')",
    )
    with pytest.raises(StoreError, match="not a moescope store"):
        Store(store)


@pytest.mark.parametrize(
    "statement",
    [
        "ATTACH '/tmp/other.duckdb'",
        "COPY runs TO '/tmp/moescope-leak.csv'",
        "EXPORT DATABASE '/tmp/moescope-leak'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "RESET enable_external_access",
        "SET lock_configuration = false",
        "SET autoload_known_extensions = true",
        "SET allowed_directories = ['/etc']",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM secret_frame",
        "COPY (SELECT 1) TO '{shards}/leak.parquet' (FORMAT parquet)",
        "SELECT 1; COPY (SELECT 1) TO '{shards}/leak.parquet' (FORMAT parquet)",
        "SELECT * FROM read_text('{shards}/../secret.txt')",
        "ATTACH '{shards}/leak.duckdb'",
    ],
)
def test_no_statement_leaves_the_store(store: Path, statement: str) -> None:
    secret_frame = pd.DataFrame({"secret": [1]})
    assert len(secret_frame) == 1  # in scope here, and yet not readable by a query
    shards = shards_beside(store)
    shards.mkdir()
    store.with_name("secret.txt").write_text("secret")
    with pytest.raises((StoreError, duckdb.Error)):
        Store(store).query(statement.replace("{shards}", str(shards)))
    assert not list(shards.iterdir())
    assert not Path("/tmp/moescope-leak.csv").exists()


def test_a_big_sort_spills_beside_the_store_and_still_works(store: Path) -> None:
    config = {"enable_external_access": "false", "memory_limit": "20MB", "threads": "1"}
    with duckdb.connect(str(store), read_only=True, config=config) as con:
        rows = con.execute(
            "SELECT max(i) FROM (SELECT i, hash(i) AS h FROM range(3000000) r(i) ORDER BY h)"
        ).fetchall()
    assert rows == [(2_999_999,)]
