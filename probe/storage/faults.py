"""What DuckDB's errors mean to somebody who uses a store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from moescope.probe.errors import MoescopeError, StoreError

_HOLDER = re.compile(r"Conflicting lock is held in (.+?) \(PID (\d+)\)")
_BROKEN = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException)
_MISSING_SHARDS = "put the folder back beside the store"
_NO_SPACE = ("No space left", "File too large", "quota exceeded")


def busy_with(error: duckdb.Error) -> str | None:
    """Who has the store, if that is what the error says; None for any other error."""
    text = str(error)
    if isinstance(error, duckdb.IOException) and "Could not set lock on file" in text:
        holder = _HOLDER.search(text)
        return (
            f"process {holder[2]} ({holder[1]}) has it open" if holder else "it is open elsewhere"
        )
    if isinstance(error, duckdb.ConnectionException) and "different configuration" in text:
        return "this process has it open in another way"
    return None


def missing_store(store: Path) -> StoreError:
    """The error for a store that is not there."""
    return StoreError(
        f"there is no store at {store}; "
        f"`moescope trace MODEL --prompts FILE --store {store} --run NAME` makes one"
    )


def unreadable(store: Path, error: duckdb.Error) -> StoreError:
    """The error for a file that DuckDB cannot open for another reason than a lock."""
    if store.is_dir():
        return StoreError(f"{store} is a folder, a store is a file; name one with --store")
    if "not a valid DuckDB database file" in str(error):
        return StoreError(f"{store} is not a DuckDB file; name a moescope store with --store")
    first_line = str(error).splitlines()[0]
    return StoreError(f"{store} cannot be opened as a store: {first_line}")


@contextmanager
def database_errors(doing: str) -> Iterator[None]:
    """Turn what DuckDB says about disks and damaged files into one sentence.

    Args:
        doing: what was being done and to which file, to stand after "while".

    Raises:
        MoescopeError: in place of IO, fatal and internal errors, and of any about a full disk.
        StoreError: in place of a refused access to something outside the store.
        duckdb.Error: all others, as they are.
    """
    try:
        yield
    except duckdb.PermissionException as error:
        raise StoreError(
            f"refused while {doing}: a view or query tried to reach outside the store "
            f"({str(error).splitlines()[0]})"
        ) from error
    except duckdb.Error as error:
        first_line = str(error).splitlines()[0]
        if _MISSING_SHARDS in first_line:
            raise StoreError(first_line.removeprefix("Invalid Input Error: ")) from error
        if any(words in first_line for words in _NO_SPACE):
            raise MoescopeError(
                f"the disk is full while {doing}; what was there before is kept, make room and "
                f"start the same command again ({first_line})"
            ) from error
        if isinstance(error, _BROKEN) or type(error) is duckdb.Error:  # the latter: Parquet
            raise MoescopeError(f"DuckDB failed while {doing}: {first_line}") from error
        raise
