"""Beginning a run, and beginning it again: who it is, what is planned, what is already whole.

    from moescope.probe.storage.runs import RunDescription, begin_run

    with begin_run(store, "base", description) as point:
        if not point.is_complete:
            for shard_id in point.missing: ...          # collect, write_shard
            point.folder.finish()                       # all planned shards are written

A run's shards lie in `STORE.shards/NAME-HASH/`, where NAME is only a readable hint: the name the
user gave is in `run.json`, and never becomes a path. A run is the same run when its identity (what
decides the numbers: model, prompts, arguments, seed, threads) and its batch plan are the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from moescope.probe.errors import RunError
from moescope.probe.storage.files import disk_errors, remove_unfinished, write_json
from moescope.probe.storage.locks import reading, resolve_store
from moescope.probe.storage.shards import check_shard_id, finished_shards

LAYER_FIELDS: Final = (
    "layer",
    "kind",
    "moe_layer",
    "module",
    "num_experts",
    "top_k",
    "num_shared_experts",
    "rule",
)
"""The columns of `layers` that a description gives."""

_RUN_FILE: Final = "run.json"
_COMPLETE_FILE: Final = "complete.json"
_COLLECTOR_LOCK: Final = "collector.lock"
_LONGEST_NAME: Final = 200


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Everything about a run that is known before its first batch.

    Attributes:
        model: name or path of the model, as the user gave it.
        revision: its revision, if it has one.
        family: transformers' model_type.
        record_level: `usage` or `topk`.
        layers: one mapping per router with the keys of `LAYER_FIELDS`; `rule` is plain JSON data.
        manifest: what `runs.manifest` shall hold: versions, dtype, device, threads, arguments, ...
        identity: what decides the numbers; a run is only resumed under an equal identity.
        planned_shards: shard id -> the prompts in it; every prompt of the run exactly once.
        source: `recorded` or `import:FORMAT`.
        plan_id: the steering plan in force, if any.
    """

    model: str
    revision: str | None
    family: str | None
    record_level: str
    layers: Sequence[Mapping[str, Any]]
    manifest: Mapping[str, Any]
    identity: Mapping[str, Any]
    planned_shards: Mapping[str, Sequence[int]]
    source: str = "recorded"
    plan_id: str | None = None

    def __post_init__(self) -> None:
        """Refuse plans and layers that could not be stored."""
        for shard_id in self.planned_shards:
            check_shard_id(shard_id)
        ids = self.prompt_ids
        if len(set(ids)) != len(ids):
            raise ValueError("a prompt is planned in more than one place")
        for row in self.layers:
            if set(row) != set(LAYER_FIELDS):
                raise ValueError(f"a layer has the keys {', '.join(LAYER_FIELDS)}, not {sorted(row)}")

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """The planned shards, ascending."""
        return tuple(sorted(self.planned_shards))

    @property
    def prompt_ids(self) -> list[int]:
        """The planned prompts, ascending."""
        return sorted(prompt for ids in self.planned_shards.values() for prompt in ids)

    def fingerprint(self) -> dict[str, Any]:
        """Identity and batch plan, as stored in the manifest and compared on resuming."""
        plan = json.dumps({name: list(ids) for name, ids in sorted(self.planned_shards.items())})
        return {
            "identity": json.loads(json.dumps(self.identity)),
            "batch_plan": {
                "num_shards": len(self.planned_shards),
                "sha256": hashlib.sha256(plan.encode()).hexdigest(),
                "prompt_ranges": _ranges(self.prompt_ids),
            },
        }

    def to_json(self) -> dict[str, Any]:
        """The description as plain data."""
        return {
            "model": self.model,
            "revision": self.revision,
            "family": self.family,
            "record_level": self.record_level,
            "layers": [dict(row) for row in self.layers],
            "manifest": dict(self.manifest),
            "identity": dict(self.identity),
            "planned_shards": {name: list(ids) for name, ids in self.planned_shards.items()},
            "source": self.source,
            "plan_id": self.plan_id,
        }


@dataclass(frozen=True)
class RunFolder:
    """The folder in which a run's shards wait for the ingester."""

    path: Path

    def read(self) -> tuple[str, datetime, RunDescription]:
        """Name, time of beginning and description of the run.

        Raises:
            RunError: the folder has no readable `run.json`.
        """
        try:
            data = json.loads((self.path / _RUN_FILE).read_text(encoding="utf-8"))
            created_at = datetime.fromisoformat(data["created_at"])
            return data["run_id"], created_at, RunDescription(**data["description"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.path} is no folder of a run: its {_RUN_FILE} cannot be read ({error})"
            ) from error

    def has_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / _RUN_FILE).is_file()

    def write(self, run_id: str, created_at: datetime, description: RunDescription) -> None:
        """Make the folder a run's, in one step."""
        write_json(
            self.path / _RUN_FILE,
            {
                "format": 1,
                "run_id": run_id,
                "created_at": created_at.isoformat(),
                "description": description.to_json(),
            },
        )

    def finish(self) -> None:
        """State that every planned shard was written; the ingester then completes the run."""
        with disk_errors(f"finishing the run in {self.path}"):
            write_json(self.path / _COMPLETE_FILE, {"finished_at": datetime.now(UTC).isoformat()})

    def reopen(self) -> None:
        """Take back `finish`, when shards turn out to be missing."""
        (self.path / _COMPLETE_FILE).unlink(missing_ok=True)

    @property
    def is_finished(self) -> bool:
        """Whether every planned shard was written, by the collector's word."""
        return (self.path / _COMPLETE_FILE).is_file()


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


def check_run_name(name: str) -> None:
    """Refuse a name that is empty, too long or not printable.

    Raises:
        RunError: says what is wrong with it.
    """
    if not 1 <= len(name) <= _LONGEST_NAME:
        raise RunError(f"a run's name has 1 to {_LONGEST_NAME} characters, this has {len(name)}")
    if not name.isprintable():
        bad = next(character for character in name if not character.isprintable())
        raise RunError(
            f"a run's name consists of printable characters, {name!a} has U+{ord(bad):04X}"
        )


def run_folder(store_path: str | os.PathLike[str], run_name: str) -> RunFolder:
    """Where a run's shards lie; the folder need not exist."""
    check_run_name(run_name)
    store = resolve_store(store_path)
    hint = re.sub(r"[^a-z0-9]+", "-", run_name.lower())[:40].strip("-") or "run"
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:12]
    return RunFolder(store.with_name(f"{store.name}.shards") / f"{hint}-{digest}")


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
    on_disk = finished_shards(folder.path)  # before the store: shards only move from here to there
    stored = _stored_run(store_path, run_name)
    created_at = datetime.now(UTC)
    if stored is not None:
        _refuse_differences(run_name, stored.fingerprint, description)
        created_at = stored.created_at
    elif folder.has_run():
        name, created_at, recorded = folder.read()
        if name != run_name:
            raise RunError(f"{folder.path} holds the run {name!r}, not {run_name!r}")
        _refuse_differences(run_name, recorded.fingerprint(), description)
    planned = set(description.planned_shards)
    if stored is not None and stored.status == "complete":
        return ResumePoint(
            run_id=run_name,
            folder=folder,
            is_complete=True,
            is_new=False,
            finished=frozenset(planned),
            missing=(),
        )
    is_new = stored is None and not folder.has_run()
    release = _claim(folder, run_name)
    finished = planned & (set(on_disk) | (stored.ingested if stored is not None else set()))
    missing = tuple(sorted(planned - finished))
    with disk_errors(f"beginning the run in {folder.path}"):
        remove_unfinished(folder.path)
        if not folder.has_run():
            folder.write(run_name, created_at, description)
        if missing:
            folder.reopen()
    return ResumePoint(
        run_id=run_name,
        folder=folder,
        is_complete=False,
        is_new=is_new,
        finished=frozenset(finished),
        missing=missing,
        _release=release,
    )


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


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as `[first, last]` pairs, so that a long plan stays short."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


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
