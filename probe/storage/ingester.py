"""Starting the ingester beside a collector, and hearing from it.

Use, with a `point` from `begin_run`:

    with start_ingester(store, point.folder) as ingester:
        for shard_id in point.missing:
            ingester.check()                      # raises what it stopped with
            write_shard(...)
        point.folder.finish()
    # here every shard is in the store and the run is complete
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from moescope.probe import errors
from moescope.probe.errors import MoescopeError
from moescope.probe.storage.files import disk_errors, resolve_store
from moescope.probe.storage.run_folder import RunFolder

LOG_FILE: Final = "ingester.log"
STATUS_FILE: Final = "ingester.json"
_MODULE: Final = "moescope.probe.storage.ingest"
_END_WITHIN_S: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class IngestStatus:
    """How far the ingester is.

    Attributes:
        num_ingested: shards of the run that are in the store.
        num_planned: all shards of the run.
        waiting_for: what it waits for at the store, or None.
    """

    num_ingested: int
    num_planned: int
    waiting_for: str | None


class IngesterProcess:
    """An ingester that runs beside this process; use it in a `with`.

    The block's normal end waits until the run is complete in the store. An exception lets the
    ingester finish what is whole and end, and leaves the run to be resumed.
    """

    def __init__(self, store: Path, folder: RunFolder, *, keep_shards: bool = False) -> None:
        self._folder = folder
        self._last_status: IngestStatus | None = None
        command = [sys.executable, "-P", "-m", _MODULE, str(store), str(folder.path)]
        command += ["--collector-pid", str(os.getpid())]
        command += ["--keep-shards"] if keep_shards else []
        self._log = folder.path / LOG_FILE
        with (
            disk_errors(f"starting the ingester of {folder.path}"),
            self._log.open("ab") as log,
            _holding_back(signal.SIGTERM),  # until the ingester is ready to end in good order
        ):
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the collector, which then ends this one
            )

    def check(self) -> None:
        """Raise what the ingester stopped with; return at once while it works.

        Raises:
            MoescopeError: of the type and with the sentence that the ingester gave.
        """
        if self.process.poll() not in (None, 0):
            self._raise()

    def status(self) -> IngestStatus | None:
        """How far it is, by its own last word; None before its first."""
        try:
            data = json.loads((self._folder.path / STATUS_FILE).read_text(encoding="utf-8"))
            self._last_status = IngestStatus(**data)
        except (OSError, ValueError, TypeError):
            pass  # not there yet, or removed with the folder of a complete run
        return self._last_status

    def wait_until_done(
        self,
        *,
        timeout_s: float | None = None,
        on_status: Callable[[IngestStatus], None] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        """Wait until the ingester has ended; after `RunFolder.finish` the run is then complete.

        Args:
            timeout_s: give up after so many seconds; None waits for as long as it works.
            on_status: told the status about five times a second.
            announce: told in one sentence what the ingester waits for, when that changes.

        Raises:
            MoescopeError: what the ingester stopped with, or that it takes longer.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        announced = None
        while True:
            try:
                self.process.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                status = self.status()
            if on_status is not None and status is not None:
                on_status(status)
            waiting = status.waiting_for if status is not None else None
            if announce is not None and waiting not in (None, announced):
                announce(waiting)
                announced = waiting
            if deadline is not None and time.monotonic() > deadline:
                raise MoescopeError(
                    f"the ingester did not finish within {timeout_s:g} s"
                    f"{f' ({waiting})' if waiting else ''}; the same command goes on later"
                )
        if self.process.returncode:
            self._raise()
        self._close()

    def abandon(self) -> None:
        """Let it ingest what is whole and end; the run can be resumed."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=_END_WITHIN_S)
            except subprocess.TimeoutExpired:  # what it did not get in stays on disk
                self.process.kill()
                self.process.wait()
        self._close()

    def __enter__(self) -> IngesterProcess:
        """Work beside the ingester."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the complete run, or after an exception end the ingester."""
        if error is None:
            self.wait_until_done()
        else:
            self.abandon()

    def _raise(self) -> None:
        code = self.process.wait()
        pipe = self.process.stdout
        words = pipe.read().decode(errors="replace") if pipe is not None and not pipe.closed else ""
        self._close()
        if code < 0:
            raise MoescopeError(
                f"the ingester was killed by signal {-code}; start the same command again, "
                f"what was recorded so far is kept (its log: {self._log})"
            )
        try:
            told = json.loads(words.splitlines()[-1])
            kind = getattr(errors, told["type"], MoescopeError)
            sentence = told["message"]
        except (IndexError, ValueError, KeyError):
            kind, sentence = MoescopeError, f"the ingester ended with exit code {code}"
        if kind is MoescopeError:
            sentence = f"{sentence} (its log: {self._log})"
        raise kind(sentence)

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def _holding_back(number: signal.Signals) -> Iterator[None]:
    """Let processes started in this block begin with the signal blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_ingester(
    store_path: str | os.PathLike[str], folder: RunFolder | Path, *, keep_shards: bool = False
) -> IngesterProcess:
    """Start the ingester of a begun run as a process of its own.

    Args:
        store_path: the store; made when missing.
        folder: the run folder, as in `ResumePoint.folder`.
        keep_shards: leave shards and folder on disk after they were ingested.
    """
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    run.read()
    return IngesterProcess(resolve_store(store_path), run, keep_shards=keep_shards)
