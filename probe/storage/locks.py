"""Opening a store: readers and writers take turns, and nobody keeps the file.

DuckDB locks its file by process, both ways, and refuses a second way of opening it inside one
process with a different error. So both `reading` and `writing` open the file for one piece of work,
wait with a bounded back-off when they cannot, and close it again.

How a writer gets its turn among readers that come all the time: it holds an exclusive `flock` on
`STORE.lock` from the moment it wants in until it is out again, and readers step through that lock
before they open the store. The operating system drops the lock of a process that dies, so there is
no stale request. The same lock makes writers wait for each other.

Two facts that are easy to get wrong:

- DuckDB's locks are POSIX record locks: when a process closes *any* descriptor of the file, all its
  locks on the file are gone. Two threads, one opening and one closing the store, can so leave a
  reader without a lock, which a writer then walks over. `_OPEN_OR_CLOSE` makes opening and closing
  exclude each other inside this process. For the same reason, never open the store's file by other
  means (not even to look at its first bytes) in a process that uses it.
- DuckDB knows a file by the spelling of its path, so every path is resolved first.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa

from moescope.probe.errors import StoreBusyError
from moescope.probe.storage.faults import (
    busy_with,
    database_errors,
    missing_store,
    unreadable,
)
from moescope.probe.storage.files import (
    TEMPORARY_PREFIX,
    disk_errors,
    remove_leftovers,
    resolve_store,
    sync_directory,
    temporary_sibling,
)
from moescope.probe.storage.in_shards import show_runs_in_shards
from moescope.probe.storage.rows import insert_rows
from moescope.probe.storage.run_folder import shards_beside
from moescope.probe.storage.schema import SCHEMA_VERSION, check_schema, create_schema

Announce = Callable[[str], None]
"""Told in one sentence what a writer waits for."""

_CONFIG: Final[dict[str, str | bool | int | float | list[str]]] = {
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
}


APPENDABLE: Final = ("plans", "evaluations", "measurements")

_FIRST_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.1
_LET_WRITER_IN_S: Final = 2.0  # a reader waits this long for a writer before it tries all the same
_ASK_S: Final = 5.0  # a writer asks readers to wait this long, then lets them pass for a moment
_STEP_BACK_S: Final = 1.0
_ANNOUNCE_AFTER_S: Final = 0.5
_ANNOUNCE_EVERY_S: Final = 10.0
_OPEN_OR_CLOSE = threading.Lock()


def lock_path(path: str | os.PathLike[str]) -> Path:
    """The file on which writers of this store hold their lock."""
    store = resolve_store(path)
    return store.with_name(store.name + ".lock")


@contextmanager
def reading(
    path: str | os.PathLike[str],
    *,
    wait_s: float = 30.0,
    versions: Sequence[int] = (SCHEMA_VERSION,),
    with_shards: bool = True,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection to a store, for one piece of work.

    External access is off and the configuration locked. Fetch every result to its end inside the
    block: an open result would keep the file.

    Args:
        path: the store.
        wait_s: how long to wait for a writer, in seconds.
        versions: schema versions that are welcome.
        with_shards: show the routing of runs that stays in shards; else only what is in the file.

    Yields:
        A connection of this thread's own.

    Raises:
        StoreError: the file is missing, is no store, or has another schema version.
        StoreBusyError: a writer kept the store for longer than `wait_s`.
    """
    store = resolve_store(path)
    deadline = time.monotonic() + wait_s
    _let_writer_in(store, deadline)
    con = _open(store, read_only=True, deadline=deadline, while_busy=lambda holder: None)
    try:
        if check_schema(con, store, versions) == SCHEMA_VERSION and with_shards:
            show_runs_in_shards(con, store)
        yield con
    finally:
        _close(con)


@contextmanager
def writing(
    path: str | os.PathLike[str],
    *,
    wait_s: float = 60.0,
    announce: Announce | None = None,
    versions: Sequence[int] = (SCHEMA_VERSION,),
) -> Iterator[duckdb.DuckDBPyConnection]:
    """The one writing connection to a store, for one short piece of work; makes a missing store.

    What the block did not commit is rolled back when it ends.

    Args:
        path: the store; it and its folder are made when missing.
        wait_s: how long to wait for readers and other writers, in seconds.
        announce: told what is waited for when that takes longer than half a second.
        versions: schema versions that are welcome.

    Yields:
        A connection that no one else can write beside.

    Raises:
        StoreError: the file is no store or has another schema version.
        StoreBusyError: others kept the store for longer than `wait_s`.
        MoescopeError: the folder or the lock file cannot be written.
    """
    store = resolve_store(path)
    with _having_turn(store, wait_s, announce, versions) as turn:
        if not store.exists():
            _create(store)
        con = _open(store, read_only=False, deadline=turn.deadline, while_busy=turn.ask)
        try:
            check_schema(con, store, versions)
            yield con
        finally:
            _close(con)


@contextmanager
def rewriting(
    path: str | os.PathLike[str], *, wait_s: float = 60.0, announce: Announce | None = None
) -> Iterator[tuple[duckdb.DuckDBPyConnection, duckdb.DuckDBPyConnection]]:
    """The store and an empty new one, which takes its place when the block ends well.

    Nobody else reads or writes meanwhile. When the block fails or the process is killed the store
    stays as it was.

    Args:
        path: the store, which must exist.
        wait_s: how long to wait for readers and other writers, in seconds.
        announce: told what is waited for when that takes longer than half a second.

    Yields:
        A connection to the store and one to the new file, which has the tables and no row.

    Raises:
        StoreError: the file is missing, no store, or of another schema version.
        StoreBusyError: others kept the store for longer than `wait_s`.
        MoescopeError: the folder cannot be written, or the disk is full.
    """
    store = resolve_store(path)
    with reading(store, wait_s=wait_s):  # a missing store is not to be made here
        pass
    with _having_turn(store, wait_s, announce, (SCHEMA_VERSION,)) as turn:
        # Opened for writing, so that what a killed writer left in the log is in the file.
        con = _open(store, read_only=False, deadline=turn.deadline, while_busy=turn.ask)
        remove_leftovers(store.parent, f"{TEMPORARY_PREFIX}{store.name}-")
        temporary = temporary_sibling(store)
        try:
            check_schema(con, store)
            with _new_store(temporary, store) as new:
                yield con, new
            _close(con)
            with disk_errors(f"putting the new {store} in its place"):
                temporary.replace(store)
                sync_directory(store.parent)
        finally:
            _close(con)
            remove_leftovers(store.parent, temporary.name)


@contextmanager
def _having_turn(
    store: Path, wait_s: float, announce: Announce | None, versions: Sequence[int]
) -> Iterator[_Turn]:
    """Hold the writers' lock of a store, which need not exist yet."""
    deadline = time.monotonic() + wait_s
    if store.exists() and not lock_path(store).exists():
        # Leave no lock file beside what is no store.
        with reading(store, wait_s=wait_s, versions=versions):
            pass
    with disk_errors(f"preparing to write {store}"):
        store.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_path(store), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    turn = _Turn(descriptor, store, deadline, _Waiting(store, announce))
    try:
        turn.take()
        yield turn
    finally:
        turn.release()


def append(
    path: str | os.PathLike[str],
    table_name: str,
    rows: pa.Table,
    *,
    wait_s: float = 60.0,
    announce: Announce | None = None,
) -> None:
    """Add rows to one of the small tables: all of them or, after an error, none.

    A plan that is already there (same `plan_id`, which is the hash of its content) stays as it is.

    Args:
        path: the store; made when missing.
        table_name: one of `APPENDABLE`.
        rows: columns named as in the table; columns left out become null.
        wait_s: how long to wait for others, in seconds.
        announce: told what is waited for.
    """
    if table_name not in APPENDABLE:
        raise ValueError(f"rows can be added to {', '.join(APPENDABLE)}, not to {table_name!r}")
    conflict = "ON CONFLICT DO NOTHING" if table_name == "plans" else ""
    with writing(path, wait_s=wait_s, announce=announce) as con:
        insert_rows(con, table_name, rows, conflict=conflict)


class _Waiting:
    """Says what is waited for, not too early and not too often."""

    def __init__(self, store: Path, announce: Announce | None) -> None:
        self._store = store
        self._announce = announce
        self._next = time.monotonic() + _ANNOUNCE_AFTER_S

    def on(self, holder: str) -> None:
        """Announce the wait for `holder` when it is time to."""
        if self._announce is not None and time.monotonic() >= self._next:
            self._announce(f"waiting for {self._store}: {holder}")
            self._next = time.monotonic() + _ANNOUNCE_EVERY_S


class _Turn:
    """A writer's place at the store: the exclusive lock on its lock file."""

    def __init__(self, descriptor: int, store: Path, deadline: float, waiting: _Waiting) -> None:
        self._descriptor = descriptor
        self._store = store
        self.deadline = deadline
        self._waiting = waiting
        self._since = 0.0

    def take(self) -> None:
        """Wait for other writers, then have the lock."""
        for pause in _pauses():
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._other_writer()
                self._waiting.on(holder)
                _pause_until(pause, self.deadline, self._store, holder)
            else:
                break
        self._since = time.monotonic()
        note = json.dumps({"pid": os.getpid(), "since": time.time()}).encode()
        with suppress(OSError):  # only there for other writers' messages
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, note, 0)

    def ask(self, holder: str) -> None:
        """Go on asking readers to wait; after a while let them pass for a moment."""
        self._waiting.on(holder)
        if time.monotonic() - self._since > _ASK_S:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            time.sleep(max(0.0, min(_STEP_BACK_S, self.deadline - time.monotonic())))
            self.take()

    def release(self) -> None:
        """Give the place up, also for copies of the descriptor in forked processes."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _other_writer(self) -> str:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return f"process {json.loads(os.pread(self._descriptor, 200, 0))['pid']} writes it"
        return "another process writes it"


def _pauses() -> Iterator[float]:
    """Growing pauses in seconds, spread at random so that waiters do not knock together."""
    longest = _FIRST_PAUSE_S
    while True:
        yield longest * random.uniform(0.5, 1.0)
        longest = min(2 * longest, _LONGEST_PAUSE_S)


def _pause_until(pause: float, deadline: float, store: Path, holder: str) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise StoreBusyError(f"{store} stayed busy ({holder}); try again when that is done")
    time.sleep(min(pause, left))


def _let_writer_in(store: Path, deadline: float) -> None:
    """Wait at the lock file while a writer wants in or is in, for a bounded time."""
    try:
        descriptor = os.open(lock_path(store), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no writer has been here yet, or this user may not write here anyway
        return
    patience = min(deadline, time.monotonic() + _LET_WRITER_IN_S)
    try:
        for pause in _pauses():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= patience:
                    return
                time.sleep(pause)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                return
    finally:
        os.close(descriptor)


def _open(
    store: Path, *, read_only: bool, deadline: float, while_busy: Announce
) -> duckdb.DuckDBPyConnection:
    """Open the store, waiting while others have it in a way that excludes this one."""
    for pause in _pauses():
        if not store.exists():
            raise missing_store(store)
        try:
            with _OPEN_OR_CLOSE:
                return _connect(store, read_only=read_only, shards=shards_beside(store))
        except duckdb.Error as error:
            holder = busy_with(error)
            if holder is None:
                raise unreadable(store, error) from error
        while_busy(holder)
        _pause_until(pause, deadline, store, holder)
    raise AssertionError("the pauses never end")


def _connect(store: Path, *, read_only: bool, shards: Path) -> duckdb.DuckDBPyConnection:
    """Open a store so that nothing in it can reach further than its own folder of shards.

    A view in somebody else's store could otherwise read any file of this machine. DuckDB takes the
    allowed folder only from an open connection, and nothing after the lock; connections of one
    process to one file share all this.
    """
    con = duckdb.connect(str(store), read_only=read_only, config=_CONFIG)
    try:
        locked = con.execute("SELECT current_setting('lock_configuration')").fetchall()
        if locked == [(False,)]:
            folder = str(shards).replace("'", "''")
            con.execute(f"SET allowed_directories = ['{folder}']").fetchall()
            con.execute("SET enable_external_access = false").fetchall()
            con.execute("SET enable_progress_bar = false").fetchall()  # else on standard output
            con.execute("SET lock_configuration = true").fetchall()
    except BaseException:
        con.close()
        raise
    return con


def _close(con: duckdb.DuckDBPyConnection) -> None:
    with _OPEN_OR_CLOSE:
        con.close()


def _create(store: Path) -> None:
    """Make a new store under a temporary name and give it its own in one step.

    The caller has the writer's lock, so whatever an earlier creator left was killed.
    """
    remove_leftovers(store.parent, f"{TEMPORARY_PREFIX}{store.name}-")
    temporary = temporary_sibling(store)
    try:
        with _new_store(temporary, store):
            pass
        with disk_errors(f"making {store}"):
            temporary.rename(store)
            sync_directory(store.parent)
    finally:
        remove_leftovers(store.parent, temporary.name)  # its write-ahead log, too


@contextmanager
def _new_store(path: Path, store: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to what shall become `store`, without rows; in the end all is in one file."""
    with disk_errors(f"making {store}"), database_errors(f"making {store}"):
        con = _connect(path, read_only=False, shards=shards_beside(path))
        try:
            create_schema(con)
            yield con
            con.execute("CHECKPOINT").fetchall()
        finally:
            con.close()
