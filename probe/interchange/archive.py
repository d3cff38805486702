"""Putting an archive of a run into a store.

An archive may come from anybody. It is unpacked and loaded into a store of its own first, where
everything that a recorded run must fulfil is checked; only then is the run copied into the user's
store, in one transaction. Until then that store is not touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moescope.probe.errors import ImportFileError, RunError
from moescope.probe.interchange.archive_checks import find_impossible
from moescope.probe.interchange.archive_format import member_of, run_row, table_schemas
from moescope.probe.interchange.archive_zip import OpenedArchive, opened_archive
from moescope.probe.interchange.report import LACKS, ImportReport
from moescope.probe.storage.care import merge_stores
from moescope.probe.storage.copying import RUN_TABLES
from moescope.probe.storage.files import disk_errors, resolve_store, temporary_sibling
from moescope.probe.storage.locks import writing
from moescope.probe.storage.rows import insert_rows, transaction
from moescope.probe.storage.runs import check_run_name, check_store_target, run_folder
from moescope.probe.storage.store import Store

_ROWS_AT_ONCE: Final = 65_536
_ROWS_OF_ARRAYS_AT_ONCE: Final = 8_192
_LARGEST_GROWTH: Final = 200
_GROWTH_FROM: Final = 64 << 20
_MOST_ROWS_A_BYTE: Final = 20
"""Rows that repeat each other take almost no space; recorded ones take more than a byte each."""
_ROWS_FROM: Final = 1_000_000


def read_archive(
    path: str | os.PathLike[str],
    store: str | os.PathLike[str],
    name: str | None = None,
    *,
    announce: Callable[[str], None] | None = None,
) -> ImportReport:
    """Put the run of an archive into a store, wholly or not at all.

    Needs about twice the archive's size beside the store meanwhile.

    Args:
        path: the archive.
        store: the DuckDB file; made when missing.
        name: the run's name; that in the archive without it.
        announce: told in a sentence what is waited for.

    Returns:
        What was found.

    Raises:
        ImportFileError: it is no archive, is damaged, holds other files or columns than it should,
            or the run in it contradicts itself; the store is as it was.
        RunError: the store has a run of this name, or the name is unusable.
        StoreError: what is at `store` is no store.
        MoescopeError: the disk is full, or the store stayed busy.
    """
    target = resolve_store(store)
    check_store_target(target)
    source = Path(path)
    with opened_archive(source) as archive:
        run_name = archive.run["run_id"] if name is None else name
        check_run_name(run_name)
        _refuse_taken(target, run_name)
        with _workshop(target) as folder:
            try:
                report = _stage(archive, folder, folder / "staged.duckdb", run_name)
            except ImportFileError as error:
                raise ImportFileError(f"{source}: {error}") from error
            merge_stores(target, [folder / "staged.duckdb"], announce=announce)
    return report


def _refuse_taken(store: Path, name: str) -> None:
    if store.exists() and name in Store(store).runs()["run_id"].tolist():
        raise RunError(f"{store} has a run {name!r} already; choose another name with --run")
    if run_folder(store, name).has_run():
        raise RunError(f"run {name!r} is being recorded; choose another name with --run")


@contextmanager
def _workshop(store: Path) -> Iterator[Path]:
    """A temporary folder on the store's disk; not named like the leftovers of its writers."""
    existing = next(parent for parent in store.parents if parent.exists())
    folder = temporary_sibling(existing / f"archive-for-{store.name}")
    with disk_errors(f"unpacking beside {store}"):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _stage(archive: OpenedArchive, folder: Path, staged: Path, name: str) -> ImportReport:
    """Unpack, check and load the run into a store of its own."""
    files = {table: archive.extract(member_of(table), folder) for table in RUN_TABLES}
    schemas = table_schemas()
    for table, file in files.items():
        _check_columns(file, schemas[table])
        _check_size(file, archive.packed(file.name), archive.rows(file.name))
    _check_run(archive.run, files["runs"])
    with writing(staged) as con:
        try:
            with transaction(con):
                for table, file in files.items():
                    for rows in _rows(file, table, archive.run["run_id"]):
                        insert_rows(con, table, rows, run_id=name)
                    file.unlink()
        except duckdb.Error as error:
            first = str(error).splitlines()[0]
            raise ImportFileError(f"{table} holds what the store cannot: {first}") from error
        try:
            problems = list(find_impossible(con, name))
            found = _found(con)
        except duckdb.Error as error:
            first = str(error).splitlines()[0]
            raise ImportFileError(f"the run in it cannot be checked: {first}") from error
    if problems:
        more = f" ({len(problems)} problems in all)" if len(problems) > 1 else ""
        raise ImportFileError(f"the run in it contradicts itself: {problems[0]}{more}")
    report = ImportReport(
        "archive", archive.version, found={"model": archive.run["model"], **found}
    )
    report.lacks += [key for key in archive.run["manifest"].get("lacks", []) if key in LACKS]
    return report


def _check_columns(file: Path, schema: pa.Schema) -> None:
    """Refuse what is no Parquet, or has other columns than the store."""
    try:
        found = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise ImportFileError(f"{file.name} is no Parquet file: {first}") from error
    for one, other in zip_longest(found, schema):
        if one is None or other is None or (one.name, one.type) != (other.name, other.type):
            raise ImportFileError(f"{file.name} has {_shown(one)} where {_shown(other)} should be")


def _check_size(file: Path, packed: int, rows: int) -> None:
    """Refuse what would unpack from these bytes to far too much, or to other rows than stated."""
    about = pq.read_metadata(file)
    groups = [about.row_group(index) for index in range(about.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    if unpacked > _LARGEST_GROWTH * packed + _GROWTH_FROM or (
        about.num_rows > _MOST_ROWS_A_BYTE * packed + _ROWS_FROM
    ):
        raise ImportFileError(
            f"{file.name} has {packed:,} bytes and would unpack to {unpacked:,} bytes in "
            f"{about.num_rows:,} rows; that is no real recording"
        )
    if about.num_rows != rows:
        raise ImportFileError(
            f"{file.name} has {about.num_rows:,} rows, the manifest says {rows:,}"
        )


def _shown(field: pa.Field | None) -> str:
    return "no column" if field is None else f"column {field.name} ({field.type})"


def _check_run(run: dict[str, Any], runs: Path) -> None:
    """Refuse a row of `runs` that is another than that of the manifest, or no finished run."""
    try:
        stored = run_row(pq.read_table(runs))
    except (ValueError, TypeError, ArithmeticError, RecursionError, OSError) as error:
        raise ImportFileError(f"runs.parquet does not hold one sound row: {error}") from error
    different = [key for key in stored if stored[key] != run.get(key)]
    if different:
        raise ImportFileError(f"runs.parquet and the manifest differ in {different[0]!r}")
    if run["status"] != "complete":
        raise ImportFileError(f"the run in it is {run['status']}, not complete")


def _rows(file: Path, table: str, run_id: str) -> Iterator[pa.Table]:
    """A table's rows without `run_id`, sound in themselves."""
    is_wide = table in ("usage_arrays", "router_probs")
    try:
        with pq.ParquetFile(file) as parquet:
            size = _ROWS_OF_ARRAYS_AT_ONCE if is_wide else _ROWS_AT_ONCE
            for batch in parquet.iter_batches(size):
                batch.validate(full=True)  # text is valid UTF-8, lists lie within their values
                rows = pa.Table.from_batches([batch])
                _check_rows(rows, file.name, run_id)
                yield rows.drop_columns(["run_id"])
    except (pa.ArrowException, OSError) as error:
        raise ImportFileError(f"{file.name} is damaged: {str(error).splitlines()[0]}") from error


def _check_rows(rows: pa.Table, where: str, run_id: str) -> None:
    same = pc.all(pc.fill_null(pc.equal(rows["run_id"], run_id), False)).as_py()
    if rows.num_rows and not same:
        raise ImportFileError(f"{where} has rows of another run than {run_id!r}")
    for name in rows.column_names:
        column = rows[name].combine_chunks()
        if pa.types.is_list(column.type) and column.flatten().null_count:
            raise ImportFileError(f"{where}: a value is missing within {name}")
    if "bf16_weights" in rows.column_names:
        both = pc.and_(rows["weights"].is_valid(), rows["bf16_weights"].is_valid())
        if pc.any(both).as_py():
            raise ImportFileError(f"{where} has weights in both forms in one row")


def _found(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """How much there is, for the report."""
    tables = {"prompts": "prompts", "tokens": "tokens", "layers": "layers"}
    found = {
        word: int(con.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])
        for word, table in tables.items()
    }
    slots = con.execute("SELECT coalesce(sum(len(experts)), 0) FROM routing_arrays").fetchall()
    return {**found, "slots": int(slots[0][0])}
