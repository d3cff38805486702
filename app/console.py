"""What commands print: tables, progress with time left, and plain lines where nobody watches."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    import pandas as pd


class Update(Protocol):
    """Called with what is done, what there is in all, and a few words."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report progress."""


def say(text: str = "") -> None:
    """Print a line for people; it goes to standard error so that results can be piped."""
    typer.echo(text, err=True)


def emit(text: str) -> None:
    """Print a result."""
    typer.echo(text)


def print_frame(
    frame: pd.DataFrame, *, as_json: bool = False, limit: int | None = None, title: str = ""
) -> None:
    """Print a table: for people by default, as JSON records on request."""
    if as_json:
        emit(frame.to_json(orient="records", force_ascii=False, date_format="iso"))
        return
    shown = frame if limit is None else frame.head(limit)
    if title:
        emit(title)
    print_rows([str(name) for name in shown.columns], shown.itertuples(index=False))
    if len(shown) < len(frame):
        emit(f"... {len(frame) - len(shown):,} more rows; --out FILE.csv writes them all")


def print_rows(names: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print columns side by side, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [
        max(len(name), *(len(row[index][0]) for row in cells)) if cells else len(name)
        for index, name in enumerate(names)
    ]
    emit("  ".join(name.ljust(width) for name, width in zip(names, widths, strict=True)).rstrip())
    for row in cells:
        parts = [
            text.rjust(width) if is_number else text.ljust(width)
            for (text, is_number), width in zip(row, widths, strict=True)
        ]
        emit("  ".join(parts).rstrip())


def _cell(value: Any) -> tuple[str, bool]:
    if value is None or value != value:
        return "–", False
    if isinstance(value, bool):
        return ("yes" if value else "no"), False
    if isinstance(value, float):
        return f"{value:.4f}", True
    if isinstance(value, int) or hasattr(value, "__index__"):
        return f"{int(value)}", True
    if hasattr(value, "item"):
        return _cell(value.item())
    return " ".join(str(value).split()), False


def print_json(data: object) -> None:
    """Print plain data as JSON."""
    emit(json.dumps(data, ensure_ascii=False, indent=1, default=str))


@contextmanager
def progress(description: str, unit: str) -> Iterator[Update]:
    """A progress bar with time left; plain lines every few seconds when nobody watches.

    Nothing is shown for work that is over within two seconds.
    """
    if sys.stderr.isatty():
        with _bar(description) as update:
            yield update
    else:
        yield _lines(description, unit)


@contextmanager
def _bar(description: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


def _lines(description: str, unit: str, every_s: float = 5.0, silent_s: float = 2.0) -> Update:
    started = time.monotonic()
    last = started - every_s + silent_s

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every_s and done < total:
            return
        if now - started < silent_s:
            return
        last = now
        left = (now - started) / max(done, 1) * (total - done)
        say(f"{description}: {done:,} of {total:,} {unit}, {duration(left)} left  {note}".rstrip())

    return update


def duration(seconds: float) -> str:
    """Seconds in words: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
