"""All formats that can be read or written, one module each.

Others add one by an entry point of the group `moescope.importers` or `moescope.exporters` that
names an `Importer` or `Exporter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from moescope.probe.errors import InputError, MoescopeError

if TYPE_CHECKING:
    from moescope.probe.interchange.exporting import ExportOptions
    from moescope.probe.interchange.imported import Imported, ImportOptions
    from moescope.probe.storage.store import Store

_Format = TypeVar("_Format")

_IMPORTERS: Final = (
    "esft", "table", "sglang", "sglang_reply", "vllm", "imatrix", "megatron", "atlas", "steermoe",
    "router_logits",
)  # fmt: skip

_EXPORTERS: Final = (
    "parquet_tables", "csv_tables", "counts", "archive", "sglang", "eplb", "vllm_keep",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Importer:
    """A format that can be read.

    Attributes:
        name: as typed by the user, and kept in `runs.source`.
        description: what the files are, in a line.
        versions: the versions it knows.
        holds: what such a file can answer, in a line.
        read: reads files; raises `ImportFileError` for what is not right.
    """

    name: str
    description: str
    versions: tuple[str, ...]
    holds: str
    read: Callable[[Sequence[Path], ImportOptions], Imported]


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """A format that a run can be written in.

    Attributes:
        name: as typed by the user.
        description: what is written, in a line.
        versions: the versions of the format, or of the systems that read it.
        needs: what a run must have to be written so, in a line.
        write: writes a run of a store to a path at which nothing is yet, in whatever state the
            path is left on errors: `export_run` gives it a temporary one.
        suffixes: what the name of the file must end in; none where a folder is written.
        members: what the names of the files in that folder end in.
        takes: fields of `ExportOptions` that it heeds; the others are refused.
    """

    name: str
    description: str
    versions: tuple[str, ...]
    needs: str
    write: Callable[[Store, str, Path, ExportOptions], None]
    suffixes: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def importers() -> dict[str, Importer]:
    """Every importer by name, those of others included.

    Raises:
        MoescopeError: an entry point cannot be loaded.
    """
    own = [_module("importers", name).IMPORTER for name in _IMPORTERS]
    return {one.name: one for one in [*own, *_of_others("moescope.importers", Importer)]}


def importer(name: str) -> Importer:
    """One importer.

    Raises:
        InputError: there is no such format; the message lists those there are.
    """
    return _named(name, importers(), "import")


def exporters() -> dict[str, Exporter]:
    """Every exporter by name, those of others included.

    Raises:
        MoescopeError: an entry point cannot be loaded.
    """
    own = [_module("exporters", name).EXPORTER for name in _EXPORTERS]
    return {one.name: one for one in [*own, *_of_others("moescope.exporters", Exporter)]}


def exporter(name: str) -> Exporter:
    """One exporter.

    Raises:
        InputError: there is no such format; the message lists those there are.
    """
    return _named(name, exporters(), "export")


def _module(kind: str, name: str) -> Any:
    return import_module(f"moescope.probe.interchange.{kind}.{name}")


def _named(name: str, known: dict[str, _Format], verb: str) -> _Format:
    if name not in known:
        raise InputError(f"there is no format {name!r} to {verb}; known are {', '.join(known)}")
    return known[name]


def _of_others(group: str, kind: type[_Format]) -> list[_Format]:
    found = []
    for point in entry_points(group=group):
        try:
            loaded = point.load()
        except Exception as error:
            raise MoescopeError(f"{group}: {point.name} cannot be loaded: {error}") from error
        if not isinstance(loaded, kind):
            raise MoescopeError(f"{group}: {point.name} is no {kind.__name__}")
        found.append(loaded)
    return found
