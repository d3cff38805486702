"""Results of analyses, stored and found again when nothing has changed.

A result is the same when the run (its prompts and shards, also those of a run it is compared with),
the filters, the parameters, every file they name and the code of the analyses are the same. Its key
is the hash of all these; a result under another key is never read, so nothing can go stale.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moescope.probe.analysis.export import write_table
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import Analysis, AnalysisTable, Column, Context
from moescope.probe.errors import InputError
from moescope.probe.storage.results import results_folder, run_stamp
from moescope.probe.storage.store import Store


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The result of an analysis.

    Attributes:
        table: the table.
        stored_at: when it was computed, if it was found; None when it was computed now.
        not_stored: why it could not be stored, if it could not.
    """

    table: AnalysisTable
    stored_at: datetime | None = None
    not_stored: str | None = None


def answer(
    store: Store,
    run_id: str,
    analysis: Analysis,
    *,
    filters: Filters,
    arguments: Mapping[str, Any],
    fresh: bool = False,
    worth_s: float = 0.0,
) -> Answer:
    """Find the result of an analysis, or compute and store it.

    Args:
        store: where the run lies.
        run_id: the run.
        analysis: what to ask.
        filters: which prompts, tokens and routers count.
        arguments: of the analysis' function, as `Analysis.parse` gives them.
        fresh: compute it again, also when it is stored.
        worth_s: results that took fewer seconds are not stored.

    Raises:
        InputError: as the analysis does.
    """
    if not analysis.stored:
        return Answer(table=analysis.function(store, run_id, filters=filters, **arguments))
    path = _path(store, run_id, analysis, filters, arguments)
    if not fresh and path.is_file():
        found = _read(path)
        if found is not None:
            return Answer(table=found, stored_at=datetime.fromtimestamp(path.stat().st_mtime, UTC))
    began = time.monotonic()
    table = analysis.function(store, run_id, filters=filters, **arguments)
    if time.monotonic() - began < worth_s:
        return Answer(table=table)
    # The run may have grown meanwhile: then the result is of a state that nobody asks for again.
    if path == _path(store, run_id, analysis, filters, arguments):
        try:
            write_table(table, path)
        except InputError as error:
            return Answer(table=table, not_stored=str(error))
    return Answer(table=table)


def _path(
    store: Store,
    run_id: str,
    analysis: Analysis,
    filters: Filters,
    arguments: Mapping[str, Any],
) -> Path:
    runs = [run_id]
    files = []
    for parameter in analysis.parameters:
        value = arguments.get(parameter.name)
        if value is not None and parameter.type == "run":
            runs.append(str(value))
        elif value is not None and parameter.type == "file":
            files.append(_digest(Path(str(value))))
    key = {
        "analysis": analysis.name,
        "arguments": dict(arguments),
        "filters": filters.to_json(),
        "runs": [run_stamp(store, run) for run in runs],
        "files": files,
        "code": _code(),
    }
    text = json.dumps(key, sort_keys=True, default=list)
    name = f"{analysis.name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.parquet"
    return results_folder(store.path, run_id) / name


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@cache
def _code() -> str:
    """Hash of the code that analyses are made of, so that a mended one is asked again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> AnalysisTable | None:
    """A stored table; None where the file is damaged."""
    try:
        rows = pq.read_table(path)
        about = json.loads(rows.schema.metadata[b"moescope"])
        return AnalysisTable(
            name=about["name"],
            title=about["title"],
            frame=rows.to_pandas(),
            columns=tuple(Column(**column) for column in about["columns"]),
            context=Context(**about["context"]),
            notes=tuple(about["notes"]),
            summary=about["summary"],
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
