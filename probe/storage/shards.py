"""Shards: the finished work of a collector, as folders that are whole or absent.

A shard holds the rows of some whole planned batches, in `RUN_FOLDER/shard-00012/`: one Parquet file
per table and `manifest.json` with the number of rows, bytes and the SHA-256 of each file and the
ids of the prompts inside. It is written under a temporary name, synced, and renamed, so a folder
named `shard-...` is always complete; what is wrong with its content afterwards is damage, and said.

The files carry no `run_id`: a folder belongs to one run, and the ingester adds the column.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moescope.probe.errors import RecordingError
from moescope.probe.storage.encoding import encode
from moescope.probe.storage.files import (
    disk_errors,
    remove_folder,
    sync_directory,
    temporary_sibling,
    write_synced,
)
from moescope.probe.storage.schema import SHARD_TABLES, conform
from moescope.probe.storage.slots import check_slots

MANIFEST: Final = "manifest.json"
_SHARD_NAME: Final = re.compile(r"shard-[0-9]{5,12}")
_TEXT_OF_FEW_VALUES: Final = ("phase", "segment", "kind")


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One Parquet file of a shard.

    Attributes:
        rows: its rows.
        size_bytes: its size.
        sha256: of its bytes, in hexadecimal.
        weights: how routing weights are encoded in it; None in other files.
    """

    rows: int
    size_bytes: int
    sha256: str
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """What a shard holds.

    Attributes:
        shard_id: its name, as planned.
        prompt_ids: the prompts whose rows are inside, ascending.
        files: table name -> its file.
    """

    shard_id: str
    prompt_ids: tuple[int, ...]
    files: Mapping[str, ShardFile]

    @property
    def checksum(self) -> str:
        """One checksum over the files of the shard."""
        lines = "".join(f"{name} {self.files[name].sha256}\n" for name in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()


def shard_name(number: int) -> str:
    """The id of the shard with this number in the plan, from 0."""
    if number < 0:
        raise ValueError(f"shards are numbered from 0, not {number}")
    return f"shard-{number:05d}"


def check_shard_id(shard_id: str) -> None:
    """Refuse an id that is not of the form `shard-00012`: it becomes the name of a folder."""
    if not _SHARD_NAME.fullmatch(shard_id):
        raise ValueError(f"a shard id has the form shard-00012, not {shard_id!r}")


def finished_shards(folder: Path) -> list[str]:
    """The ids of the shards that are whole in this run folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if _SHARD_NAME.fullmatch(entry.name))


def write_shard(
    folder: Path, shard_id: str, tables: Mapping[str, pa.Table], *, prompt_ids: Sequence[int]
) -> ShardManifest:
    """Write the rows of one shard durably; after it returns they survive anything but disk loss.

    A shard that is there already is kept as it is: batches are planned, so it holds the same.

    Args:
        folder: the run folder.
        shard_id: the shard's id from the plan.
        tables: rows by table name, columns as in `SHARD_TABLES`; absent tables count as empty.
        prompt_ids: the planned prompts of this shard; each has exactly one row in `prompts`.

    Returns:
        The manifest as written.

    Raises:
        RecordingError: the rows do not fit the tables, or other prompts than planned are inside.
        MoescopeError: the disk is full or the folder cannot be written.
    """
    check_shard_id(shard_id)
    target = folder / shard_id
    where = f"{shard_id} in {folder}"
    content = {
        name: conform(tables.get(name, schema.empty_table()), name, where)
        for name, schema in SHARD_TABLES.items()
    }
    unknown = sorted(set(tables) - set(SHARD_TABLES))
    if unknown:
        raise RecordingError(f"{where}: a shard has no table {', '.join(unknown)}")
    _check_prompts(content, prompt_ids, where)
    check_slots(content["routing_arrays"], where)
    if target.exists():
        return read_manifest(folder, shard_id)
    encoded, ways = {}, {}
    for name, table in content.items():
        encoded[name], ways[name] = encode(name, table)
    manifest = ShardManifest(
        shard_id=shard_id,
        prompt_ids=tuple(sorted(prompt_ids)),
        files={
            name: ShardFile(
                rows=content[name].num_rows,
                size_bytes=len(blob),
                sha256=hashlib.sha256(blob).hexdigest(),
                weights=ways[name],
            )
            for name, blob in encoded.items()
        },
    )
    with disk_errors(f"writing {where}"):
        _write_folder(target, encoded, manifest)
    return manifest


def read_manifest(folder: Path, shard_id: str) -> ShardManifest:
    """The manifest of a finished shard.

    Raises:
        RecordingError: it is missing or malformed; the message names the shard and the remedy.
    """
    check_shard_id(shard_id)
    try:
        data = json.loads((folder / shard_id / MANIFEST).read_text(encoding="utf-8"))
        manifest = ShardManifest(
            shard_id=data["shard_id"],
            prompt_ids=tuple(int(prompt_id) for prompt_id in data["prompt_ids"]),
            files={name: ShardFile(**data["files"][name]) for name in SHARD_TABLES},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, shard_id, f"its {MANIFEST} cannot be read") from error
    if manifest.shard_id != shard_id:
        raise _damaged(folder, shard_id, f"its {MANIFEST} is that of {manifest.shard_id}")
    return manifest


def read_shard(folder: Path, shard_id: str) -> tuple[ShardManifest, dict[str, pa.Table]]:
    """Read a finished shard and prove that it is what was written.

    Returns:
        The manifest, and the rows of every table of `SHARD_TABLES`.

    Raises:
        RecordingError: a file is missing or has other bytes or rows than the manifest says.
    """
    manifest = read_manifest(folder, shard_id)
    tables = {}
    for name, expected in manifest.files.items():
        file = f"{name}.parquet"
        try:
            blob = (folder / shard_id / file).read_bytes()
        except OSError as error:
            raise _damaged(folder, shard_id, f"{file} cannot be read") from error
        if len(blob) != expected.size_bytes or hashlib.sha256(blob).hexdigest() != expected.sha256:
            raise _damaged(folder, shard_id, f"{file} has other bytes than were written")
        table = pq.read_table(
            pa.BufferReader(blob),
            read_dictionary=[c for c in _TEXT_OF_FEW_VALUES if c in SHARD_TABLES[name].names],
        )
        if table.num_rows != expected.rows:
            raise _damaged(folder, shard_id, f"{file} has other rows than were written")
        tables[name] = table
    return manifest, tables


def remove_shard(folder: Path, shard_id: str) -> None:
    """Delete a shard; killed in between it leaves no half of one."""
    check_shard_id(shard_id)
    remove_folder(folder / shard_id)


def _damaged(folder: Path, shard_id: str, what: str) -> RecordingError:
    return RecordingError(
        f"{shard_id} is damaged: {what}; delete {folder / shard_id} and start the same command "
        "again, it records the prompts of this shard anew"
    )


def _check_prompts(tables: Mapping[str, pa.Table], prompt_ids: Sequence[int], where: str) -> None:
    """Every planned prompt once, and no rows of any other."""
    planned = sorted(prompt_ids)
    present = sorted(tables["prompts"].column("prompt_id").to_pylist())
    if present != planned:
        raise RecordingError(
            f"{where}: planned are the prompts {_some(planned)}, recorded were {_some(present)}"
        )
    _check_meta(tables["prompts"], where)
    for name, table in tables.items():
        others = set(pc.unique(table.column("prompt_id")).to_pylist()) - set(planned)
        if others:
            raise RecordingError(
                f"{where}: {name} has rows of prompts that are not planned: {_some(sorted(others))}"
            )


def _check_meta(prompts: pa.Table, where: str) -> None:
    """Only text that DuckDB takes as JSON: the ingester could do nothing about any other."""
    for prompt_id, meta in zip(
        prompts.column("prompt_id").to_pylist(), prompts.column("meta").to_pylist(), strict=True
    ):
        try:
            if meta is not None:
                json.dumps(json.loads(meta), ensure_ascii=False).encode()
        except ValueError as error:
            raise RecordingError(f"{where}: the meta of prompt {prompt_id} is no JSON") from error


def _some(ids: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in ids[:10])
    return f"{shown} and {len(ids) - 10} more" if len(ids) > 10 else shown or "none"


def _write_folder(target: Path, encoded: Mapping[str, memoryview], manifest: ShardManifest) -> None:
    temporary = temporary_sibling(target)
    try:
        temporary.mkdir()
        for name, blob in encoded.items():
            write_synced(temporary / f"{name}.parquet", blob)
        write_synced(temporary / MANIFEST, json.dumps(_plain(manifest)).encode())
        sync_directory(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)


def _plain(manifest: ShardManifest) -> dict[str, Any]:
    return {
        "shard_id": manifest.shard_id,
        "prompt_ids": list(manifest.prompt_ids),
        "files": {name: asdict(file) for name, file in manifest.files.items()},
    }
