"""One run as one file that says what it is, and that `read_archive` puts into a store again."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow.parquet as pq

from moescope.probe.interchange.archive_format import (
    FORMAT,
    MANIFEST,
    README,
    VERSION,
    manifest_of,
    member_of,
    readme,
    run_row,
)
from moescope.probe.interchange.exporting import ExportOptions
from moescope.probe.interchange.registry import Exporter
from moescope.probe.interchange.run_tables import stream
from moescope.probe.interchange.writers import write_parquet
from moescope.probe.storage.copying import RUN_TABLES
from moescope.probe.storage.store import Store

_ZIP_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the same run gives the same bytes


def write(store: Store, run_id: str, out: Path, options: ExportOptions) -> None:
    """Write the archive; beside it, one table at a time needs as much space again."""
    bare = options.without_text
    members: dict[str, Any] = {}
    with store.connection() as con, zipfile.ZipFile(out, "x") as archive:
        text = readme(run_id, without_text=bare).encode()
        members[README] = {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
        archive.writestr(_info(README), text, zipfile.ZIP_DEFLATED)
        for table in RUN_TABLES:
            part = out.with_name(member_of(table))
            members[part.name] = _write_table(con, table, run_id, part, bare=bare)
            if table == "runs":
                run = run_row(pq.read_table(part))
            _add(archive, part)
            part.unlink()
        manifest = manifest_of(run, members, moescope=version("moescope"), without_text=bare)
        content = json.dumps(manifest, ensure_ascii=False, indent=1).encode()
        archive.writestr(_info(MANIFEST), content, zipfile.ZIP_DEFLATED)


def _write_table(
    con: duckdb.DuckDBPyConnection, table: str, run_id: str, path: Path, *, bare: bool
) -> dict[str, Any]:
    with stream(con, table, run_id, without_text=bare) as rows:
        number = write_parquet(path, rows.schema, rows.batches)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size, "rows": number}


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _ZIP_EPOCH)
    info.external_attr = 0o644 << 16
    return info


def _add(archive: zipfile.ZipFile, path: Path) -> None:
    """Add a Parquet file as it is: it is compressed already."""
    info = _info(path.name)
    info.file_size = path.stat().st_size  # decides whether it needs the form for large files
    with path.open("rb") as source, archive.open(info, "w") as target:
        shutil.copyfileobj(source, target, 1 << 20)


EXPORTER: Final = Exporter(
    name="archive",
    description="the whole run as one .zip, to keep, to pass on, and to import again",
    versions=(f"{FORMAT} {VERSION}",),
    needs="nothing",
    write=write,
    suffixes=(".zip",),
    takes=("without_text",),
)
