"""The tables, and what is refused as a store."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from moescope.probe.errors import RecordingError, StoreError
from moescope.probe.storage import SCHEMA_VERSION, SHARD_TABLES, Store, check_store_target
from moescope.probe.storage.schema import check_schema, conform, create_schema, schema_sql

ARROW_OF_SQL = {
    "VARCHAR": pa.string(),
    "JSON": pa.string(),
    "BOOLEAN": pa.bool_(),
    "UTINYINT": pa.uint8(),
    "SMALLINT": pa.int16(),
    "USMALLINT": pa.uint16(),
    "INTEGER": pa.int32(),
    "FLOAT": pa.float32(),
    "USMALLINT[]": pa.list_(pa.uint16()),
    "INTEGER[]": pa.list_(pa.int32()),
    "FLOAT[]": pa.list_(pa.float32()),
}


@pytest.mark.parametrize("table", SHARD_TABLES)
def test_shard_tables_have_the_columns_of_the_schema(table: str) -> None:
    con = duckdb.connect()
    create_schema(con)
    described = con.execute(
        "SELECT column_name, data_type, is_nullable FROM duckdb_columns() "
        "WHERE table_name = ? ORDER BY column_index",
        [table],
    ).fetchall()
    con.close()
    expected = [
        pa.field(name, ARROW_OF_SQL[kind], nullable=nullable) for name, kind, nullable in described
    ]
    assert expected[0] == pa.field("run_id", pa.string(), nullable=False)
    added = [field for field in expected[1:] if field.name == "bf16_weights"]  # by the ingester
    assert [*SHARD_TABLES[table], *added] == expected[1:]
    assert bool(added) == (table == "routing_arrays")


def test_a_new_store_has_the_version_of_this_code() -> None:
    assert f"INSERT INTO moescope_schema VALUES ({SCHEMA_VERSION})" in schema_sql()
    con = duckdb.connect()
    create_schema(con)
    check_schema(con, Path("memory"))
    con.close()


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def make_text(path: Path) -> None:
    path.write_text("id,prompt\n1,hello\n" * 50)


def make_empty(path: Path) -> None:
    path.touch()


def make_folder(path: Path) -> None:
    path.mkdir()


def make_foreign(path: Path) -> None:
    with duckdb.connect(str(path)) as con:
        con.execute("CREATE TABLE runs (a INTEGER)").fetchall()


def make_version(version: int) -> object:
    def make(path: Path) -> None:
        with duckdb.connect(str(path)) as con:
            create_schema(con)
            con.execute("UPDATE moescope_schema SET version = ?", [version]).fetchall()

    return make


def make_without_version(path: Path) -> None:
    with duckdb.connect(str(path)) as con:
        create_schema(con)
        con.execute("DELETE FROM moescope_schema").fetchall()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_text, "is not a DuckDB file"),
        (make_empty, "is not a DuckDB file"),
        (make_folder, "is a folder"),
        (make_foreign, "not a moescope store"),
        (make_version(SCHEMA_VERSION + 1), "made by a newer moescope, update"),
        (make_version(0), "record or import its runs again"),
        (make_without_version, "no version at all"),
    ],
    ids=["text", "empty", "folder", "foreign", "newer", "older", "unversioned"],
)
def test_what_is_no_store_is_refused_and_left_alone(
    tmp_path: Path, make: object, words: str
) -> None:
    path = tmp_path / "some.duckdb"
    make(path)  # type: ignore[operator]
    before = entries(tmp_path)
    with pytest.raises(StoreError, match=words) as refusal:
        Store(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(StoreError, match=words):
        check_store_target(path)
    assert entries(tmp_path) == before


def test_a_missing_store_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "runs.duckdb"
    with pytest.raises(StoreError, match=r"moescope trace MODEL .* --store") as refusal:
        Store(path)
    assert str(path) in str(refusal.value)
    check_store_target(path)  # a place where one can be made
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_store_is_refused(store: Path) -> None:
    store.write_bytes(store.read_bytes()[:5000])
    with pytest.raises(StoreError, match=r"runs\.duckdb"):
        Store(store)


def test_conform_casts_without_loss_and_orders_columns() -> None:
    rows = pa.table(
        {
            "weights": [[0.5], None],
            "experts": [[65535], [0]],
            "is_ranked": [True, False],
            "kind": ["mlp", "mlp"],
            "layer": [0, 1],
            "position": [0, 1],
            "prompt_id": [0, 1],
        }
    )
    result = conform(rows, "routing_arrays", "here")
    assert result.schema == SHARD_TABLES["routing_arrays"]
    assert result.column("experts").to_pylist() == [[65535], [0]]
    assert result.column("weights").to_pylist() == [[0.5], None]


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("experts", pa.array([[65536]]), "routing_arrays.experts must be list<"),
        ("layer", pa.array([None], pa.int16()), "routing_arrays.layer is empty in 1 of 1 rows"),
        ("extra", pa.array([1]), "unknown: extra"),
    ],
    ids=["overflow", "null", "unknown"],
)
def test_conform_refuses_rows_that_do_not_fit(column: str, values: pa.Array, words: str) -> None:
    good = {
        "prompt_id": pa.array([0]),
        "position": pa.array([0]),
        "layer": pa.array([0]),
        "kind": pa.array(["mlp"]),
        "is_ranked": pa.array([True]),
        "experts": pa.array([[1]]),
        "weights": pa.array([[1.0]]),
    }
    with pytest.raises(RecordingError, match=words):
        conform(pa.table({**good, column: values}), "routing_arrays", "shard-00000")


def test_conform_names_missing_columns() -> None:
    with pytest.raises(RecordingError, match="missing: position, layer"):
        conform(pa.table({"prompt_id": [1]}), "routing_arrays", "shard-00000")
