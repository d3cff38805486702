"""Reading a store.

    store = Store("runs.duckdb")
    store.runs()
    store.query("SELECT lang, count(*) FROM prompts WHERE run_id = ? GROUP BY lang", ["base"])

Every call opens the file read-only, fetches its result to the end and closes the file again, so a
collection goes on beside any number of readers, and objects of this class may be shared by threads.
Nothing of a store can reach outside of it: external access is off and the configuration locked.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from moescope.probe.errors import RunError, StoreError
from moescope.probe.storage.faults import database_errors
from moescope.probe.storage.files import resolve_store
from moescope.probe.storage.locks import reading

if TYPE_CHECKING:
    import pandas as pd

Parameters = Sequence[Any] | Mapping[str, Any]
"""Values for the `?` or `$name` marks of a query."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One row of `runs`; `manifest` is parsed."""

    run_id: str
    model: str
    revision: str | None
    family: str | None
    created_at: datetime
    finished_at: datetime | None
    status: str
    source: str
    record_level: str
    plan_id: str | None
    num_prompts: int | None
    num_tokens: int | None
    manifest: Mapping[str, Any]


_QUERIES = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_RUN_COLUMNS = tuple(RunInfo.__dataclass_fields__)


class Store:
    """Reader of one store.

    Args:
        path: the DuckDB file.
        wait_s: how long a call waits for a writer, in seconds.

    Raises:
        StoreError: the file is missing, is no store, or has another schema version.
    """

    def __init__(self, path: str | os.PathLike[str], *, wait_s: float = 30.0) -> None:
        self.path: Path = resolve_store(path)
        self._wait_s = wait_s
        self._shared = threading.local()
        with reading(self.path, wait_s=wait_s):
            pass

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @contextmanager
    def connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for several queries on one state of the store.

        Writers wait while it is open: keep the block short and fetch every result inside it.
        """
        with (
            database_errors(f"reading {self.path}"),
            reading(self.path, wait_s=self._wait_s) as con,
        ):
            yield con

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the queries of this thread inside the block share one connection.

        For a handful of small queries, of which opening the file would be most of the time.
        Writers wait while the block lasts.
        """
        if getattr(self._shared, "con", None) is not None:
            yield
            return
        with self.connection() as con:
            self._shared.con = con
            try:
                yield
            finally:
                self._shared.con = None

    def arrow(self, sql: str, params: Parameters | None = None) -> pa.Table:
        """The whole result of a query as an Arrow table.

        Raises:
            StoreError: the store is gone, or the query reaches for something outside of it, or
                would write: the shards beside the store are files that COPY could reach.
            StoreBusyError: a writer kept the store for too long.
            duckdb.Error: the query itself is wrong.
        """
        shared = getattr(self._shared, "con", None)
        with self.connection() if shared is None else nullcontext(shared) as con:
            _require_queries(con, sql)
            relation = con.sql(sql, params=params)
            return pa.table({}) if relation is None else relation.to_arrow_table()

    def query(self, sql: str, params: Parameters | None = None) -> pd.DataFrame:
        """The whole result of a query as a data frame; raises as `arrow` does.

        Integers with nulls become floats with NaN, lists become NumPy arrays.
        """
        frame: pd.DataFrame = self.arrow(sql, params).to_pandas()
        return frame

    def runs(self) -> pd.DataFrame:
        """All runs, oldest first; columns of `runs`, the manifest as JSON text."""
        return self.query(f"SELECT {', '.join(_RUN_COLUMNS)} FROM runs ORDER BY created_at, run_id")

    def run(self, run_id: str) -> RunInfo:
        """One run.

        Raises:
            RunError: there is no such run; the message lists those there are.
        """
        rows = self.arrow(
            f"SELECT {', '.join(_RUN_COLUMNS)} FROM runs WHERE run_id = ?", [run_id]
        ).to_pylist()
        if not rows:
            raise self._unknown_run(run_id)
        return RunInfo(**{**rows[0], "manifest": json.loads(rows[0]["manifest"])})

    def layers(self, run_id: str) -> pd.DataFrame:
        """The routers of a run in model order; columns of `layers` but `run_id`, `rule` as JSON.

        Raises:
            RunError: there is no such run.
        """
        layers = self.query(
            "SELECT * EXCLUDE (run_id) FROM layers WHERE run_id = ? ORDER BY layer, kind", [run_id]
        )
        if layers.empty:
            self.run(run_id)
        return layers

    def has_routing(self, run_id: str) -> bool:
        """Whether single slots were recorded (level topk and above), not only usage.

        Raises:
            RunError: there is no such run.
        """
        found = self.arrow(
            "SELECT EXISTS (SELECT 1 FROM routing_arrays WHERE run_id = ?) AS found", [run_id]
        )
        if found["found"][0].as_py():
            return True
        self.run(run_id)
        return False

    def _unknown_run(self, run_id: str) -> RunError:
        known = self.arrow("SELECT run_id FROM runs ORDER BY created_at, run_id")[
            "run_id"
        ].to_pylist()
        there = f"it has {', '.join(known)}" if known else "it has no runs yet"
        return RunError(f"{self.path} has no run {run_id!r}; {there}")


def _require_queries(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    for statement in con.extract_statements(sql):
        if statement.type not in _QUERIES:
            raise StoreError(
                f"a store is only read here, {statement.type.name} is refused; write a SELECT"
            )
