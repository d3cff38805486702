"""Shards on another file system: written by workers anywhere, fetched by the ingester's machine.

A remote folder cannot be renamed in one step, so the manifest goes last: a shard is whole when its
manifest is there, and its checksums prove the rest when it is read.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moescope.probe.errors import InputError, MoescopeError
from moescope.probe.storage.files import disk_errors, sync_directory, temporary_sibling
from moescope.probe.storage.shards import MANIFEST, check_shard_id, read_shard


def open_place(url: str) -> tuple[Any, str]:
    """The file system of an fsspec URL, and the path on it.

    Raises:
        InputError: the URL names no file system that is installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"shards cannot go to {url!r}: {error}") from error
    return system, str(path).rstrip("/")


def put_shard(shard: Path, url: str, run_name: str) -> None:
    """Copy a whole shard to `URL/RUN/SHARD`, its manifest last.

    Raises:
        MoescopeError: the place cannot be written.
    """
    check_shard_id(shard.name)
    system, path = open_place(url)
    target = f"{path}/{run_name}/{shard.name}"
    try:
        system.makedirs(target, exist_ok=True)
        files = sorted(shard.iterdir(), key=lambda file: file.name == MANIFEST)
        for file in files:
            system.put_file(str(file), f"{target}/{file.name}")
    except OSError as error:
        raise MoescopeError(f"{shard.name} cannot be written to {url}: {error}") from error


def fetch_shard(url: str, run_name: str, shard_id: str, folder: Path) -> None:
    """Copy a whole shard into a run folder, prove it, and remove it from the remote place.

    Raises:
        RecordingError: it is not what was written.
        MoescopeError: the place cannot be read, or the disk is full.
    """
    check_shard_id(shard_id)
    system, path = open_place(url)
    source = f"{path}/{run_name}/{shard_id}"
    here = temporary_sibling(folder / shard_id)
    try:
        with disk_errors(f"fetching {shard_id} from {url}"):
            (here / shard_id).mkdir(parents=True)
            for file in system.ls(source, detail=False):
                system.get_file(file, str(here / shard_id / Path(file).name))
            read_shard(here, shard_id)
            if not (folder / shard_id).exists():
                (here / shard_id).rename(folder / shard_id)
                sync_directory(folder)
            system.rm(source, recursive=True)
    finally:
        shutil.rmtree(here, ignore_errors=True)
