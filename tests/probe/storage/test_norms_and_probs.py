"""What version 2 of the store adds: sums of norms, probabilities by token, and the way there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest

from moescope.probe.errors import StoreError
from moescope.probe.storage import SCHEMA_VERSION, Store, migrate_store, verify_run
from moescope.probe.storage.verify import find_problems

NORMS = """
    UPDATE usage_arrays SET
        norm_sum = list_transform(num_tokens, lambda n: 3.0 * n),
        weighted_norm_sum = list_transform(weight_sum, lambda w: 3.0 * w),
        easyep_sum = list_transform(weight_sum, lambda w: 1.5 * w),
        max_abs = list_transform(num_tokens, lambda n: if(n > 0, 2.0, 0.0))
"""
PROBS = """
    INSERT INTO router_probs
    SELECT t.run_id, t.prompt_id, t.position, l.layer, l.kind,
           list_transform(range(l.num_experts), lambda e: 1.0 / 6)
    FROM tokens t JOIN layers l USING (run_id) WHERE t.is_routed
"""


@pytest.fixture(scope="module")
def opened(filled_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    copy = shutil.copy(filled_once, tmp_path_factory.mktemp("norms") / "runs.duckdb")
    with duckdb.connect(str(copy)) as con:
        con.execute(NORMS).fetchall()
        con.execute(PROBS).fetchall()
        con.execute("UPDATE runs SET record_level = 'probs'").fetchall()
        con.execute(
            "UPDATE runs SET manifest = "
            """json_merge_patch(manifest, '{"arguments": {"norms": true}}')"""
        ).fetchall()
        yield con


@pytest.fixture
def con(opened: duckdb.DuckDBPyConnection) -> Iterator[duckdb.DuckDBPyConnection]:
    """One run with norms and probabilities, to damage."""
    opened.execute("BEGIN").fetchall()
    yield opened
    opened.execute("ROLLBACK").fetchall()


def checks(con: duckdb.DuckDBPyConnection) -> set[str]:
    return {problem.check for problem in find_problems(con, "base")}


def test_the_view_has_the_columns_of_the_contract(con: duckdb.DuckDBPyConnection) -> None:
    rows = con.execute(
        "SELECT num_tokens, norm_sum, weighted_norm_sum, easyep_sum, max_abs FROM usage "
        "WHERE num_tokens > 0 LIMIT 1"
    ).fetchall()
    assert rows[0][1] == 3 * rows[0][0] and rows[0][4] == 2
    assert checks(con) == set()


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        ("norm_sum = list_transform(norm_sum, lambda x: -x)", "norms"),
        ("norm_sum = list_transform(norm_sum, lambda x: x + 1)", "norms"),
        ("norm_sum = list_transform(norm_sum, lambda x: x / 10)", "norms"),
        ("weighted_norm_sum = NULL", "norms"),
        ("easyep_sum = list_transform(easyep_sum, lambda x: x * 9)", "norms"),
        ("max_abs = list_transform(max_abs, lambda x: 'nan'::FLOAT)", "norms"),
        ("max_abs = max_abs[:5]", "usage"),
        (
            "norm_sum = NULL, weighted_norm_sum = NULL, easyep_sum = NULL, max_abs = NULL",
            "norms missing",
        ),
    ],
)
def test_norms_that_contradict_are_found(
    con: duckdb.DuckDBPyConnection, damage: str, check: str
) -> None:
    con.execute(f"UPDATE usage_arrays SET {damage} WHERE prompt_id = 1 AND layer = 0").fetchall()
    found = find_problems(con, "base")
    assert check in {problem.check for problem in found}
    assert all("prompt 1, layer 0" in problem.sentence for problem in found)


def test_a_layer_without_easyep_is_no_contradiction(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("UPDATE usage_arrays SET easyep_sum = NULL WHERE layer = 0").fetchall()
    assert checks(con) == set()


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        ("DELETE FROM router_probs WHERE {one}", "probabilities of tokens"),
        ("INSERT INTO router_probs SELECT * FROM router_probs WHERE {one}",
         "probabilities of tokens"),
        ("UPDATE router_probs SET position = 99 WHERE {one}", "probabilities of tokens"),
        ("UPDATE router_probs SET probs = probs[:5] WHERE {one}", "probabilities of tokens"),
        ("UPDATE router_probs SET probs = list_transform(probs, lambda p: 'nan'::FLOAT) "
         "WHERE {one}", "probabilities of tokens"),
        ("UPDATE router_probs SET probs = list_transform(probs, lambda p: p * 2) WHERE {one}",
         "probabilities"),
    ],
)  # fmt: skip
def test_probabilities_that_contradict_are_found(
    con: duckdb.DuckDBPyConnection, damage: str, check: str
) -> None:
    con.execute(damage.format(one="prompt_id = 1 AND layer = 0 AND position = 2")).fetchall()
    assert check in checks(con)


def make_version_2(store: Path) -> None:
    """Take away what version 3 added: single slots are a table again."""
    with duckdb.connect(str(store)) as con:
        con.execute("CREATE TABLE slots AS SELECT * FROM routing").fetchall()
        con.execute("DROP VIEW routing").fetchall()
        con.execute("DROP TABLE routing_arrays").fetchall()
        con.execute("DROP TABLE runs_in_shards").fetchall()
        con.execute("ALTER TABLE slots RENAME TO routing").fetchall()
        for name in ("weight_sum", "prob_sum"):
            con.execute(f"ALTER TABLE usage_arrays ALTER {name} SET NOT NULL").fetchall()
        con.execute("UPDATE moescope_schema SET version = 2").fetchall()


def make_version_1(store: Path) -> None:
    """Take away what version 2 added, too."""
    make_version_2(store)
    with duckdb.connect(str(store)) as con:
        view = con.execute("SELECT sql FROM duckdb_views() WHERE view_name = 'usage'").fetchone()
        assert view is not None
        con.execute("DROP VIEW usage").fetchall()
        con.execute("DROP TABLE router_probs").fetchall()
        for column in ("norm_sum", "weighted_norm_sum", "easyep_sum", "max_abs"):
            con.execute(f"ALTER TABLE usage_arrays DROP COLUMN {column}").fetchall()
        con.execute(
            "CREATE VIEW usage AS SELECT run_id, prompt_id, phase, segment, is_special, layer, "
            "kind, unnest(range(len(num_tokens)))::USMALLINT AS expert, "
            "unnest(num_tokens) AS num_tokens, unnest(weight_sum) AS weight_sum, "
            "unnest(prob_sum) AS prob_sum FROM usage_arrays"
        ).fetchall()
        con.execute("UPDATE moescope_schema SET version = 1").fetchall()


@pytest.mark.parametrize(("version", "make"), [(1, make_version_1), (2, make_version_2)])
def test_an_older_store_is_migrated_and_keeps_its_runs(
    store: Path, version: int, make: Callable[[Path], None]
) -> None:
    before = {
        name: Store(store).arrow(f"SELECT * FROM {name} ORDER BY ALL")
        for name in ("usage", "routing", "routing_arrays")
    }
    columns = schema_of(store)
    make(store)
    with pytest.raises(StoreError, match=r"moescope store migrate --store .*runs\.duckdb"):
        Store(store)
    assert migrate_store(store) == version
    assert schema_of(store) == columns
    for name, rows in before.items():
        assert Store(store).arrow(f"SELECT * FROM {name} ORDER BY ALL").equals(rows)
    assert verify_run(Store(store), "base") == []
    assert migrate_store(store) == SCHEMA_VERSION


def schema_of(store: Path) -> list[tuple[object, ...]]:
    with duckdb.connect(str(store), read_only=True) as con:
        return con.execute(
            "SELECT table_name, column_name, data_type, is_nullable FROM duckdb_columns() "
            "ORDER BY table_name, column_index"
        ).fetchall()


def test_migration_makes_no_store_and_touches_no_other_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        migrate_store(tmp_path / "nowhere.duckdb")
    other = tmp_path / "other.txt"
    other.write_text("mine")
    with pytest.raises(StoreError, match="not a DuckDB file"):
        migrate_store(other)
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]
