"""Writing a table to a file: CSV, Parquet or JSON, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.files import temporary_sibling, write_synced

SUFFIXES = (".csv", ".parquet", ".json")


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of a file that a table can be written to.

    Commands call it before they compute.

    Raises:
        AnalysisInputError: for another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise AnalysisInputError(
            f"{os.fspath(path)!r} does not say a format; its name must end in {', '.join(SUFFIXES)}"
        )
    return suffix


def write_table(table: AnalysisTable, path: str | os.PathLike[str]) -> Path:
    """Write a table; the suffix decides the format.

    CSV holds the rows. Parquet holds the rows and, in its metadata under `moescope`, everything
    else; JSON holds all of it. The file appears under its name only when it is whole. Missing
    folders are made.

    Raises:
        AnalysisInputError: for an unknown suffix, or a place that cannot be written.
    """
    suffix = check_suffix(path)
    return write_whole(Path(path), _encode(table, suffix))


def write_frame(frame: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write rows without a description of their columns, as `write_table` does.

    Raises:
        AnalysisInputError: for an unknown suffix, or a place that cannot be written.
    """
    suffix = check_suffix(path)
    if suffix == ".json":
        rows = [_plain(row) for row in frame.to_dict("records")]
        text = json.dumps(rows, ensure_ascii=False, indent=1, default=str)
        return write_whole(Path(path), (text + "\n").encode())
    if suffix == ".csv":
        return write_whole(Path(path), _csv(frame))
    return write_whole(Path(path), _parquet(pa.Table.from_pandas(frame, preserve_index=False)))


def write_whole(target: Path, content: bytes) -> Path:
    """Write a file that appears under its name only when it is whole.

    Raises:
        AnalysisInputError: for a place that cannot be written.
    """
    unfinished = temporary_sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(unfinished, content)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise AnalysisInputError(f"{target} cannot be written: {error.strerror}") from error
    return target


def table_as_json(table: AnalysisTable) -> dict[str, Any]:
    """The table as plain data: missing values are None, `rows` is a list of dictionaries."""
    return _about(table) | {"rows": [_plain(row) for row in table.frame.to_dict("records")]}


def _about(table: AnalysisTable) -> dict[str, Any]:
    """Everything but the rows, as plain data."""
    about: dict[str, Any] = _plain(
        {
            "name": table.name,
            "title": table.title,
            "context": asdict(table.context),
            "columns": [asdict(column) for column in table.columns],
            "notes": list(table.notes),
            "summary": dict(table.summary),
        }
    )
    return about


def _encode(table: AnalysisTable, suffix: str) -> bytes:
    if suffix == ".json":
        text = json.dumps(table_as_json(table), ensure_ascii=False, indent=1, allow_nan=False)
        return (text + "\n").encode()
    if suffix == ".csv":
        return _csv(table.frame)
    arrow = pa.Table.from_pandas(table.frame, preserve_index=False)
    about = json.dumps(_about(table), ensure_ascii=False, allow_nan=False)
    return _parquet(arrow.replace_schema_metadata({"moescope": about}))


def _csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, lineterminator="\n").encode()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def _plain(value: Any) -> Any:
    """Numpy and pandas values as those of JSON; NaN, NA and infinities as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
