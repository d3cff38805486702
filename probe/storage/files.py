"""Writing files so that nobody ever sees half of one.

Everything here goes to a temporary name first, is synced, and then renamed; names that begin with
`TEMPORARY_PREFIX` are therefore unfinished by definition and may be removed by whoever owns the
folder. A full disk becomes one sentence instead of a traceback.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moescope.probe.errors import MoescopeError

TEMPORARY_PREFIX = ".unfinished-"
REMOVED_PREFIX = ".removed-"

_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this system allows",
}


def temporary_sibling(path: Path, prefix: str = TEMPORARY_PREFIX) -> Path:
    """A name in the same folder that no one else uses and that marks the file as unfinished."""
    return path.with_name(f"{prefix}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def remove_folder(folder: Path) -> None:
    """Delete a folder in a way that never leaves a part of it under its own name."""
    doomed = temporary_sibling(folder, REMOVED_PREFIX)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_directory(folder: Path) -> None:
    """Make renames and new names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes | memoryview) -> None:
    """Write a new file and wait until the disk has it; the caller renames it or its folder."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any], *, durable: bool = True) -> None:
    """Replace `path` by the given content in one step.

    Args:
        path: the file; its folder exists.
        content: what to write; plain JSON types only.
        durable: wait for the disk. False for status files that a crash may lose.
    """
    temporary = temporary_sibling(path)
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1)
    try:
        if durable:
            write_synced(temporary, text.encode())
        else:
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def remove_leftovers(folder: Path, prefix: str) -> int:
    """Remove what killed processes left behind; returns how many files and folders that were.

    Args:
        folder: where to look; not below.
        prefix: `TEMPORARY_PREFIX` or `REMOVED_PREFIX`, by whose leftovers they are.
    """
    leftovers = [entry for entry in folder.iterdir() if entry.name.startswith(prefix)]
    for entry in leftovers:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    return len(leftovers)


def resolve_store(path: str | os.PathLike[str]) -> Path:
    """The one spelling of a store's path under which this process may open it."""
    return Path(os.path.realpath(path))


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn a full disk and other failures to write into one sentence.

    Args:
        doing: what was being written and where, to stand after "while".

    Raises:
        MoescopeError: in place of any OSError of the block.
    """
    try:
        yield
    except OSError as error:
        reason = _NO_SPACE.get(error.errno or 0, error.strerror or str(error))
        advice = ", make room and start the same command again" if error.errno in _NO_SPACE else ""
        raise MoescopeError(
            f"{reason} while {doing}; nothing half-written is kept{advice}"
        ) from error
