"""Writing a run for another system: whole or not at all, and never over what is there already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from moescope.probe.errors import InputError, RunError
from moescope.probe.interchange.registry import Exporter
from moescope.probe.storage.files import (
    REMOVED_PREFIX,
    disk_errors,
    resolve_store,
    sync_directory,
    temporary_sibling,
)
from moescope.probe.storage.store import Store

_OPTION_NAMES: Final = {
    "keep": "--keep",
    "num_layers": "--num-layers",
    "without_text": "--without-text",
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a user says about an export.

    Attributes:
        keep: experts of each layer that a keep-list names; all without it.
        num_layers: layers of the model, where the run does not say how many follow the last routed.
        without_text: leave out what was read and written, so that a run can be passed on.
    """

    keep: int | None = None
    num_layers: int | None = None
    without_text: bool = False


def export_run(
    exporter: Exporter,
    store: Store,
    run_id: str,
    out: str | os.PathLike[str],
    options: ExportOptions,
    *,
    force: bool = False,
) -> None:
    """Write a complete run in a format.

    Writers of the store wait meanwhile, so that all is of one state of it.

    Args:
        exporter: the format.
        store: where the run is.
        run_id: the run.
        out: the file or folder to write; it appears only when it is whole.
        options: of the export.
        force: replace what is there: a file by a file, a folder only if an export wrote it.

    Raises:
        RunError: there is no such run, or it is not complete.
        InputError: `out` is taken or has the wrong name, an option does not belong to the format,
            or the run does not have what the format needs.
        MoescopeError: the place cannot be written, or the disk is full.
    """
    target = Path(out)
    _check_options(exporter, options)
    _check_name(exporter, target)
    check_target(target, is_folder=not exporter.suffixes, members=exporter.members, force=force)
    if resolve_store(target) == store.path:
        raise InputError(f"{target} is the store itself; name another place with --out")
    status = store.run(run_id).status
    if status != "complete":
        raise RunError(
            f"run {run_id!r} is {status}, only complete runs are exported; "
            f"`moescope store verify --store {store.path}` says what is wrong with it"
        )
    with whole(target) as unfinished:
        exporter.write(store, run_id, unfinished, options)


def _check_options(exporter: Exporter, options: ExportOptions) -> None:
    for field in fields(options):
        given = getattr(options, field.name) != field.default
        if given and field.name not in exporter.takes:
            raise InputError(f"{_OPTION_NAMES[field.name]} is no option of {exporter.name!r}")


def _check_name(exporter: Exporter, target: Path) -> None:
    if exporter.suffixes and target.suffix.lower() not in exporter.suffixes:
        raise InputError(
            f"{exporter.name!r} is written to a file whose name ends in "
            f"{' or '.join(exporter.suffixes)}, not to {target}"
        )


def check_target(
    target: Path, *, is_folder: bool, members: tuple[str, ...] = (), force: bool = False
) -> None:
    """Refuse a place that is taken.

    Args:
        target: what shall be written.
        is_folder: whether that is a folder.
        members: what the names of its files end in.
        force: whether it may take the place of a file, or of a folder with nothing but such files.

    Raises:
        InputError: says what is there.
    """
    if not os.path.lexists(target):
        return
    if not force:
        raise InputError(f"{target} is there already; name another place, or give --force")
    if target.is_dir() != is_folder:
        there, wanted = ("file", "folder") if is_folder else ("folder", "file")
        raise InputError(f"{target} is a {there}, and a {wanted} would be written")
    if is_folder:
        foreign = [
            entry.name
            for entry in target.iterdir()
            if entry.suffix not in members or not entry.is_file()
        ]
        if foreign or target.is_symlink():
            what = sorted(foreign)[0] if foreign else "a link"
            raise InputError(f"{target} is no earlier export ({what}) and is not replaced")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write to; what is there when the block ends well takes the name of the target.

    It has the target's own name, in a temporary folder beside it. What the block leaves after an
    error is removed, and the target stays as it was.

    Raises:
        MoescopeError: the place cannot be written, or the disk is full.
    """
    workshop = temporary_sibling(target)
    with disk_errors(f"writing {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop.mkdir()
        try:
            unfinished = workshop / target.name
            yield unfinished
            _sync(unfinished)
            _put_in_place(unfinished, target)
            sync_directory(target.parent)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)


def _sync(path: Path) -> None:
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        sync_directory(file)  # the same call serves files
    if path.is_dir():
        sync_directory(path)


def _put_in_place(unfinished: Path, target: Path) -> None:
    if not target.is_dir():
        unfinished.replace(target)
        return
    old = temporary_sibling(target, REMOVED_PREFIX)
    target.rename(old)
    try:
        unfinished.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
