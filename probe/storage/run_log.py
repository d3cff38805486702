"""The log of a run: one JSON object a line, in `STORE.logs/NAME-HASH.jsonl`, kept after the run.

Collector and ingester both append whole lines, so their events stand in the order in which they
happened. Keys: `at` (UTC, ISO 8601), `event` (began, resumed, batch, halved, ingested, waiting,
finished, stopped), and what the event is about.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moescope.probe.errors import RunError
from moescope.probe.storage.run_folder import run_folder


@dataclass(frozen=True)
class RunLog:
    """Where the events of a run go."""

    path: Path

    def write(self, event: str, **facts: object) -> None:
        """Append an event. A log that cannot be written stops nothing: the data come first."""
        line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
        with suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, text.encode("utf-8", "replace"))
            finally:
                os.close(descriptor)


def run_log(store_path: str | os.PathLike[str], run_name: str) -> RunLog:
    """The log of a run; the file need not exist."""
    folder = run_folder(store_path, run_name).path
    store_name = folder.parent.name.removesuffix(".shards")
    return RunLog(folder.parent.with_name(f"{store_name}.logs") / f"{folder.name}.jsonl")


def read_log(store_path: str | os.PathLike[str], run_name: str) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a last line that a crash cut off is left out.

    Raises:
        RunError: there is no log of such a run.
    """
    log = run_log(store_path, run_name)
    try:
        lines = log.path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunError(
            f"there is no log of a run {run_name!r} at {log.path}; imported runs and runs of "
            "stores that were moved have none"
        ) from error
    events = []
    for line in lines:
        with suppress(ValueError):
            events.append(json.loads(line))
    return events
