"""Beginning a run, and beginning it again: what was planned, what is already whole.

Use:

    with begin_run(store, "base", description) as point:
        if not point.is_complete:
            for shard_id in point.missing: ...          # collect, write_shard
            point.folder.finish()                       # all planned shards are written

A run is the same run when its identity (what decides the numbers: model, prompts, arguments, seed,
threads) and its batch plan are the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

from moescope.probe.errors import RunError
from moescope.probe.storage.files import (
    TEMPORARY_PREFIX,
    disk_errors,
    remove_folder,
    remove_leftovers,
    resolve_store,
)
from moescope.probe.storage.locks import reading
from moescope.probe.storage.run_folder import (
    RunDescription,
    RunFolder,
    check_run_name,
    run_folder,
)
from moescope.probe.storage.shards import finished_shards

__all__ = [
    "ResumePoint",
    "RunDescription",
    "RunFolder",
    "begin_run",
    "check_run_name",
    "check_store_target",
    "claim_run",
    "run_folder",
]

_COLLECTOR_LOCK: Final = "collector.lock"


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a collector starts; while it is open, no other collector works on the same run.

    Attributes:
        run_id: the run's name.
        folder: where its shards go.
        is_complete: the run is in the store, verified; there is nothing to do.
        is_new: nothing of this run existed before.
        finished: the planned shards that are whole, in the store or on disk.
        missing: the planned shards that are still to be collected, ascending.
    """

    run_id: str
    folder: RunFolder
    is_complete: bool
    is_new: bool
    finished: frozenset[str]
    missing: tuple[str, ...]
    _release: weakref.finalize[Any, Any] | None = field(default=None, repr=False, compare=False)

    def close(self) -> None:
        """Let other collectors work on this run."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> ResumePoint:
        """Use the resume point for a block; its end lets other collectors in."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let other collectors work on this run."""
        self.close()


def check_store_target(store_path: str | os.PathLike[str]) -> None:
    """Refuse early, before a model is loaded, a place where no run can be recorded.

    Raises:
        StoreError: something is there that is no store of this version.
        MoescopeError: the folder cannot be made or written.
    """
    store = resolve_store(store_path)
    if store.exists():
        with reading(store):
            return
    existing = next(parent for parent in store.parents if parent.exists())
    with disk_errors(f"looking for a place for {store}"):
        if not existing.is_dir():
            raise NotADirectoryError(20, f"{existing} is a file, not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(13, f"{existing} cannot be written")


def begin_run(
    store_path: str | os.PathLike[str], run_name: str, description: RunDescription
) -> ResumePoint:
    """Begin a run, or find out where to go on with it.

    Args:
        store_path: the store; it need not exist yet.
        run_name: the run's name, any printable text of 1 to 200 characters.
        description: what the run is and what is planned.

    Returns:
        What is whole and what is missing. Close it (or use it in a `with`) when collecting is over.

    Raises:
        RunError: the name is unusable; a run of this name was begun otherwise (every difference is
            named, nothing was written); or another collector works on it right now.
        StoreError: the store is not one, or of another version.
    """
    folder = run_folder(store_path, run_name)
    found = _look(store_path, run_name, folder, description)
    if not found.is_complete:
        release = _claim(folder, run_name)
        found = _look(store_path, run_name, folder, description)  # nobody changes it any more
    if found.is_complete:
        _tidy(folder)
        return ResumePoint(
            run_id=run_name,
            folder=folder,
            is_complete=True,
            is_new=False,
            finished=frozenset(description.planned_shards),
            missing=(),
        )
    missing = tuple(sorted(set(description.planned_shards) - found.whole))
    with disk_errors(f"beginning the run in {folder.path}"):
        remove_leftovers(folder.path, TEMPORARY_PREFIX)
        if not folder.has_run():
            folder.write(run_name, found.created_at, description)
        if missing:
            folder.reopen()
    return ResumePoint(
        run_id=run_name,
        folder=folder,
        is_complete=False,
        is_new=found.is_new,
        finished=frozenset(description.planned_shards) - frozenset(missing),
        missing=missing,
        _release=release,
    )


@dataclass(frozen=True)
class _Found:
    """What there is of a run, in the store and on disk."""

    is_complete: bool
    is_new: bool
    created_at: datetime
    whole: set[str]


def _look(
    store_path: str | os.PathLike[str],
    run_name: str,
    folder: RunFolder,
    description: RunDescription,
) -> _Found:
    """Find what there is of a run, writing nothing; refuse it when it was begun otherwise."""
    on_disk = finished_shards(folder.path)  # before the store: shards only move from here to there
    stored = _stored_run(store_path, run_name)
    has_folder = folder.has_run()
    created_at = datetime.now(UTC)
    if stored is not None:
        _refuse_differences(run_name, stored.fingerprint, description)
        created_at = stored.created_at
    elif has_folder:
        name, created_at, recorded = folder.read()
        if name != run_name:
            raise RunError(f"{folder.path} holds the run {name!r}, not {run_name!r}")
        _refuse_differences(run_name, recorded.fingerprint(), description)
    return _Found(
        is_complete=stored is not None and stored.status == "complete",
        is_new=stored is None and not has_folder,
        created_at=created_at,
        whole={*on_disk, *(stored.ingested if stored is not None else ())},
    )


def _tidy(folder: RunFolder) -> None:
    """Remove the folder of a complete run, unless its shards were to be kept."""
    if folder.is_finished and not finished_shards(folder.path):
        with suppress(OSError):  # its ingester is just doing the same
            remove_folder(folder.path)
            folder.path.parent.rmdir()


@dataclass(frozen=True)
class _StoredRun:
    status: str
    created_at: datetime
    fingerprint: Mapping[str, Any]
    ingested: set[str]


def _stored_run(store_path: str | os.PathLike[str], run_name: str) -> _StoredRun | None:
    if not resolve_store(store_path).exists():
        return None
    with reading(store_path) as con:
        rows = con.execute(
            "SELECT status, epoch_us(created_at), manifest, source FROM runs WHERE run_id = ?",
            [run_name],
        ).fetchall()
        shards = con.execute(
            "SELECT shard_id FROM ingested_shards WHERE run_id = ?", [run_name]
        ).fetchall()
    if not rows:
        return None
    status, created_us, manifest_text, source = rows[0]
    manifest = json.loads(manifest_text)
    if "identity" not in manifest or "batch_plan" not in manifest:
        raise RunError(
            f"the store has a run {run_name!r} already ({source}) that cannot be gone on with; "
            "choose another name with --run"
        )
    return _StoredRun(
        status=status,
        created_at=datetime.fromtimestamp(created_us / 1e6, UTC),
        fingerprint={key: manifest[key] for key in ("identity", "batch_plan")},
        ingested={row[0] for row in shards},
    )


def _refuse_differences(
    run_name: str, recorded: Mapping[str, Any], description: RunDescription
) -> None:
    now = description.fingerprint()
    differences = list(_differences("", recorded["identity"], now["identity"]))
    if not differences:  # a changed identity explains a changed plan
        differences = list(_differences("batch_plan", recorded["batch_plan"], now["batch_plan"]))
    if differences:
        raise RunError(
            f"run {run_name!r} was begun otherwise ({'; '.join(differences)}): start it with the "
            "recorded values to go on with it, or choose another name with --run"
        )


def _differences(place: str, recorded: Any, new: Any) -> Iterator[str]:
    """Every value that differs, as `field: recorded -> new`."""
    if isinstance(recorded, Mapping) and isinstance(new, Mapping):
        for key in sorted({*recorded, *new}):
            here = f"{place}.{key}" if place else str(key)
            yield from _differences(here, recorded.get(key), new.get(key))
    elif recorded != new:
        yield f"{place}: {_shown(recorded)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def claim_run(folder: RunFolder, run_name: str) -> Iterator[None]:
    """Keep collectors away from a run while the block runs; makes its folder.

    Raises:
        RunError: one is recording it right now.
    """
    release = _claim(folder, run_name)
    try:
        yield
    finally:
        release()


def is_claimed(folder: RunFolder) -> bool:
    """Whether a collector has this run right now."""
    try:
        descriptor = os.open(folder.path / _COLLECTOR_LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _claim(folder: RunFolder, run_name: str) -> weakref.finalize[Any, Any]:
    """Make the folder and take the lock that one collector of a run holds."""
    with disk_errors(f"making {folder.path}"):
        for attempt in range(3):  # an ingester that ends removes empty folders
            try:
                folder.path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(
                    folder.path / _COLLECTOR_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666
                )
                break
            except FileNotFoundError:
                if attempt == 2:
                    raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunError(
            f"run {run_name!r} is being recorded by another process right now; "
            "wait for it, or choose another name with --run"
        ) from error
    return weakref.finalize(folder, os.close, descriptor)
