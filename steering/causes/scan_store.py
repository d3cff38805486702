"""Finished parts of a scan, kept in the store's table `measurements`.

One row per batch and router under an id that is a hash of all the numbers depend on; a scan that
was killed goes on where it stopped. Rows are written at most every two seconds, each time in one
transaction.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.steering.causes.targets import TargetRow
from moescope.steering.sweep_cells import hash_of

if TYPE_CHECKING:
    from moescope.steering.causes.scan_plan import ScanPlan

#: `what` of the rows.
WHAT = "ablation_chunk"
#: Part of the id; another format makes all parts again.
_FORMAT = 1
#: Parts are written together when this much time has passed.
SECONDS = 2.0


@dataclass(frozen=True, eq=False)
class ScanChunk:
    """What one batch gave without the experts of one router.

    Attributes:
        batch: number of the batch.
        module: name of the router; None for the baseline.
        values: effects of the experts on the batch's rows, float64[X, B]; the baseline's values
            of the rows, [1, B].
        used: tokens of each row that use the expert, int64[X, B].
    """

    batch: int
    module: str | None
    values: NDArray[np.float64]
    used: NDArray[np.int64]


@dataclass
class ScanStore:
    """The parts of one scan in a store, or nowhere.

    Attributes:
        path: the store, or None.
        scan_id: hash of what the numbers depend on.
        model: its name.
        num_found: parts that were there already.
    """

    path: Path | None = None
    scan_id: str = ""
    model: str = ""
    num_found: int = 0
    _there: dict[tuple[int, str | None], ScanChunk] = field(default_factory=dict)
    _waiting: list[ScanChunk] = field(default_factory=list)
    _written: float = 0.0

    @classmethod
    def open(
        cls,
        path: str | Path | None,
        bundle: ModelBundle,
        rows: Sequence[TargetRow],
        rendered: Sequence[RenderedPrompt],
        plan: ScanPlan,
        settings: Mapping[str, Any],
    ) -> ScanStore:
        """The parts of this scan that a store has.

        Raises:
            InputError: a target that is a Python function, which has no hash.
            StoreError: the file is no store of this version.
        """
        if path is None:
            return cls()
        if any(row.function is not None for row in rows):
            raise InputError(
                "a target that is a Python function cannot be told from another one in a store; "
                "leave the store out"
            )
        scan_id = hash_of({
            "format": _FORMAT, "model": bundle.name, "revision": bundle.revision,
            "dtype": str(bundle.model.dtype), "mode": plan.mode, "via": plan.via,
            "experts": plan.experts, **settings,
            "base_plan": None if plan.base_plan is None else plan.base_plan.plan_id,
            "prompts": [one.prompt.prompt_id for one in rendered],
            "rows": [asdict(row) for row in rows],
        })[:32]  # fmt: skip
        found = cls(Path(path), scan_id, bundle.name)
        found._there = _stored_chunks(found.path, scan_id)
        return found

    def found(self, batch: int, module: str | None) -> ScanChunk | None:
        """A part that the store had when the scan began, if it did."""
        chunk = self._there.get((batch, module))
        self.num_found += chunk is not None
        return chunk

    def keep(self, chunk: ScanChunk) -> None:
        """Write a part, now or with the next ones."""
        if self.path is None:
            return
        self._waiting.append(chunk)
        if time.monotonic() - self._written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self.path is None or not self._waiting:
            return
        import pyarrow as pa

        from moescope.probe.storage.locks import append

        created = pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC"))
        count = len(self._waiting)
        table = pa.table({
            "measurement_id": [self.scan_id] * count,
            "what": [WHAT] * count,
            "model": [self.model] * count,
            "created_at": pa.repeat(created, count),
            "metric": ["baseline" if one.module is None else "effects" for one in self._waiting],
            "n": pa.array([one.values.size for one in self._waiting], pa.int32()),
            "details": [json.dumps(_packed(one)) for one in self._waiting],
        })  # fmt: skip
        append(self.path, "measurements", table)
        self._waiting.clear()
        self._written = time.monotonic()


def _packed(chunk: ScanChunk) -> dict[str, Any]:
    return {
        "batch": chunk.batch,
        "module": chunk.module,
        "shape": list(chunk.values.shape),
        "values": _text(chunk.values.astype("<f8").tobytes()),
        "used": _text(chunk.used.astype("<i8").tobytes()),
    }


def _unpacked(details: Mapping[str, Any]) -> ScanChunk:
    shape = tuple(details["shape"])
    values = np.frombuffer(_bytes(details["values"]), "<f8").reshape(shape).copy()
    used = np.frombuffer(_bytes(details["used"]), "<i8").reshape(shape).copy()
    return ScanChunk(int(details["batch"]), details["module"], values, used)


def _text(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 1)).decode("ascii")


def _bytes(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def _stored_chunks(path: Path | None, scan_id: str) -> dict[tuple[int, str | None], ScanChunk]:
    if path is None or not path.exists():
        return {}
    from moescope.probe.storage.store import Store

    rows = Store(path).query(
        "SELECT details FROM measurements WHERE measurement_id = ? AND what = ?", [scan_id, WHAT]
    )
    chunks = [_unpacked(json.loads(details)) for details in rows["details"]]
    return {(one.batch, one.module): one for one in chunks}
