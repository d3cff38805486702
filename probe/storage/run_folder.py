"""What a run is, and the folder in which its shards wait for the ingester.

A run's shards lie in `STORE.shards/NAME-HASH/`, where NAME is only a readable hint: the name the
user gave is in `run.json`, and never becomes a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from moescope.probe.errors import RunError
from moescope.probe.storage.files import disk_errors, resolve_store, write_json
from moescope.probe.storage.shards import check_shard_id

RoutingPlace = Literal["store", "shards"]

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
_FACTS_FILE: Final = "facts.json"
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
        routing_in: `store`, or `shards` when routing stays in the Parquet shards.
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
    routing_in: RoutingPlace = "store"

    def __post_init__(self) -> None:
        """Refuse plans and layers that could not be stored."""
        for shard_id in self.planned_shards:
            check_shard_id(shard_id)
        ids = self.prompt_ids
        if len(set(ids)) != len(ids):
            raise ValueError("a prompt is planned in more than one place")
        for row in self.layers:
            if set(row) != set(LAYER_FIELDS):
                raise ValueError(
                    f"a layer has the keys {', '.join(LAYER_FIELDS)}, not {sorted(row)}"
                )

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
            "identity": _plain(self.identity),
            "batch_plan": {
                "num_shards": len(self.planned_shards),
                "sha256": hashlib.sha256(plan.encode()).hexdigest(),
                "prompt_ranges": _ranges(self.prompt_ids),
            },
        }

    def to_json(self) -> dict[str, Any]:
        """The description as plain data."""
        data = {
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
            "routing_in": self.routing_in,
        }
        plain: dict[str, Any] = _plain(data)
        return plain


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

    def add_fact(self, name: str, key: str, value: object) -> None:
        """Keep a fact that comes to light while the run is recorded, for `runs.manifest`."""
        with disk_errors(f"noting {name} in {self.path}"):
            facts = self.facts()
            facts.setdefault(name, {})[key] = value
            write_json(self.path / _FACTS_FILE, facts)

    def facts(self) -> dict[str, Any]:
        """What `add_fact` kept, also in calls before this one."""
        try:
            facts: dict[str, Any] = json.loads((self.path / _FACTS_FILE).read_text("utf-8"))
        except FileNotFoundError:
            return {}
        return facts

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
    hint = re.sub(r"[^a-z0-9]+", "-", run_name.lower())[:40].strip("-") or "run"
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:12]
    return RunFolder(shards_beside(store_path) / f"{hint}-{digest}")


def shards_beside(store_path: str | os.PathLike[str]) -> Path:
    """The folder with the run folders of a store."""
    store = resolve_store(store_path)
    return store.with_name(f"{store.name}.shards")


def _plain(value: Any) -> Any:
    """The value as JSON would give it back; what is no valid text (odd file names) gets a `?`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.loads(text.encode("utf-8", "replace"))


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as `[first, last]` pairs, so that a long plan stays short."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges
