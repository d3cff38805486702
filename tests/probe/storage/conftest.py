"""What the tests of the store share: synthetic runs, and stores made of them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import pytest

from moescope.probe.storage import reading, write_shard, writing
from moescope.probe.storage.ingest import Ingester
from moescope.probe.storage.run_folder import RunFolder
from moescope.probe.storage.runs import begin_run

HERE = Path(__file__).parent

#: Everything a run stores, timestamps left out.
EVERYTHING = {
    "runs": "SELECT * EXCLUDE (created_at, finished_at) FROM runs",
    "layers": "SELECT * FROM layers",
    "prompts": "SELECT * FROM prompts",
    "tokens": "SELECT * FROM tokens",
    "routing": "SELECT * FROM routing",
    "routing_arrays": "SELECT * FROM routing_arrays",
    "runs_in_shards": "SELECT * FROM runs_in_shards",
    "usage_arrays": "SELECT * FROM usage_arrays",
    "ingested_shards": "SELECT * FROM ingested_shards",
}


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The module `synthetic.py` beside this file."""
    spec = importlib.util.spec_from_file_location("storage_synthetic", HERE / "synthetic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def collector(synthetic: ModuleType) -> list[str]:
    """The command that starts a synthetic collector; arguments are store and run."""
    return [sys.executable, str(HERE / "synthetic.py")]


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, list[Any]]]:
    """Every row of a store without timestamps, in a fixed order."""

    def read(store: Path) -> dict[str, list[Any]]:
        with reading(store) as con:
            return {
                name: con.execute(f"SELECT * FROM ({sql}) ORDER BY ALL").fetchall()
                for name, sql in EVERYTHING.items()
            }

    return read


@pytest.fixture(scope="session")
def filled(synthetic: ModuleType) -> Callable[..., Path]:
    """Make a complete store at once, the ingester's work done in this process."""

    def fill(store: Path, run: str = "base", num_shards: int = 3, **changes: Any) -> Path:
        description = synthetic.describe(num_shards, **changes)
        with begin_run(store, run, description) as point:
            for shard_id in point.missing:
                ids = description.planned_shards[shard_id]
                rows = synthetic.tables(ids)
                if description.record_level == "usage":
                    del rows["routing_arrays"]
                write_shard(point.folder.path, shard_id, rows, prompt_ids=ids)
            point.folder.finish()
            Ingester(store, RunFolder(point.folder.path)).run(lambda: True)
        return store

    return fill


@pytest.fixture(scope="session")
def filled_once(tmp_path_factory: pytest.TempPathFactory, filled: Callable[..., Path]) -> Path:
    """A store with one complete run, to copy."""
    return filled(tmp_path_factory.mktemp("filled") / "runs.duckdb")


@pytest.fixture
def store(tmp_path: Path, filled_once: Path) -> Path:
    """A store with one complete run, `base`, of 6 prompts."""
    return Path(shutil.copy(filled_once, tmp_path / "runs.duckdb"))


@pytest.fixture(scope="session")
def damage() -> Callable[[duckdb.DuckDBPyConnection, str], None]:
    """Change rows on a connection; `routing`, which is a view, as if it were a table."""

    def execute(con: duckdb.DuckDBPyConnection, sql: str) -> None:
        if not re.match(r"(UPDATE|DELETE FROM|INSERT INTO) routing\b", sql):
            con.execute(sql).fetchall()
            return
        con.execute("CREATE TEMP TABLE slots AS SELECT * FROM routing").fetchall()
        con.execute(re.sub(r"\brouting\b", "slots", sql)).fetchall()
        con.execute("DELETE FROM routing_arrays").fetchall()
        con.execute(
            "INSERT INTO routing_arrays SELECT run_id, prompt_id, position, layer, kind, "
            "bool_and(rank IS NOT NULL), list(expert ORDER BY rank, weight DESC, expert), "
            "list(weight ORDER BY rank, weight DESC, expert), NULL FROM slots GROUP BY ALL"
        ).fetchall()
        con.execute("DROP TABLE slots").fetchall()

    return execute


@pytest.fixture
def change(
    damage: Callable[[duckdb.DuckDBPyConnection, str], None],
) -> Callable[[Path, str], None]:
    """Change a store's rows behind everybody's back."""

    def execute(path: Path, sql: str) -> None:
        with writing(path) as con:
            damage(con, sql)

    return execute


@pytest.fixture(scope="session")
def soak_share() -> float:
    """Which share of the long tests' repetitions to run."""
    return float(os.environ.get("MOESCOPE_SOAK", "1"))
