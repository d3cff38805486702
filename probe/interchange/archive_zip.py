"""Opening the .zip of an archive: names, sizes and hashes are checked before anything is used."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.archive_format import FORMAT, MANIFEST, MEMBERS, README, VERSION
from moescope.probe.interchange.files import existing_file
from moescope.probe.storage.schema import SCHEMA_VERSION

_LARGEST_GROWTH: Final = 200
_GROWTH_FROM: Final = 64 << 10
"""A short text may be compressed better than any limit; it does no harm."""
_LARGEST_TEXT: Final = 64 << 20
_PIECE: Final = 1 << 20
_WAYS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_FAULTS: Final = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError,
    ValueError,
)  # fmt: skip
"""What zipfile raises at damaged archives."""


@dataclass(frozen=True)
class OpenedArchive:
    """An archive with the files it should have; their content is checked as it is read.

    Attributes:
        archive: the .zip.
        manifest: the content of `manifest.json`, checked.
    """

    archive: zipfile.ZipFile
    manifest: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """The run's row."""
        run: dict[str, Any] = self.manifest["run"]
        return run

    @property
    def version(self) -> str:
        """Of the format."""
        return str(self.manifest["version"])

    def rows(self, member: str) -> int:
        """How many rows the manifest says a table has."""
        return int(self.manifest["members"][member]["rows"])

    def packed(self, member: str) -> int:
        """How many bytes of the archive a file takes."""
        return self.archive.getinfo(member).compress_size

    def extract(self, member: str, folder: Path) -> Path:
        """Unpack a file of the archive into a folder.

        Raises:
            ImportFileError: it is damaged, or not what the manifest says.
        """
        target = folder / member
        with target.open("xb") as file:
            for piece in self.read(member):
                file.write(piece)
        return target

    def read(self, member: str) -> Iterator[bytes]:
        """The content of a file in pieces; its hash is compared when it is at its end."""
        stated = self.manifest["members"][member]
        digest = hashlib.sha256()
        source = _pieces(self.archive, member)
        for piece in source:
            digest.update(piece)
            yield piece
        if digest.hexdigest() != stated["sha256"]:
            raise ImportFileError(f"{member} is not what was written: its SHA-256 is another")


@contextmanager
def opened_archive(path: Path) -> Iterator[OpenedArchive]:
    """An archive, opened and checked as far as it can be without unpacking tables.

    Raises:
        ImportFileError: it is no archive of a known version, has other files than it should, or
            would unpack to far more than its size.
    """
    existing_file(path)
    try:
        archive = zipfile.ZipFile(path)
    except _FAULTS as error:
        raise ImportFileError(f"{path} is no whole .zip archive: {error}") from error
    with archive:
        try:
            _check_members(archive.infolist(), path.stat().st_size)
            opened = OpenedArchive(archive, _manifest(archive))
            for _ in opened.read(README):
                pass
        except ImportFileError as error:
            raise ImportFileError(f"{path}: {error}") from error
        yield opened


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    expected = {MANIFEST, *MEMBERS}
    names = [member.filename for member in members]
    foreign = sorted(set(names) - expected)
    missing = sorted(expected - set(names))
    if foreign or missing or len(names) != len(expected):
        what = (
            f"{foreign[0]!r} does not belong into it" if foreign
            else f"{missing[0]} is missing" if missing
            else "a file is in it twice"
        )  # fmt: skip
        raise ImportFileError(f"this is no archive of a run: {what}")
    packed = sum(member.compress_size for member in members)
    if packed > size:
        raise ImportFileError("its files overlap; that is no real archive")
    for member in members:
        if member.compress_type not in _WAYS or member.flag_bits & 1:
            raise ImportFileError(f"{member.filename} is encrypted, or compressed in another way")
        _check_growth(member.filename, member.file_size, member.compress_size)
    _check_growth("it", sum(member.file_size for member in members), packed)


def _check_growth(what: str, unpacked: int, packed: int) -> None:
    if unpacked > _LARGEST_GROWTH * packed + _GROWTH_FROM:
        raise ImportFileError(
            f"{what} would unpack from {packed:,} to {unpacked:,} bytes; that is no real recording"
        )


def _manifest(archive: zipfile.ZipFile) -> dict[str, Any]:
    """The manifest, with everything in it that is used later."""
    if archive.getinfo(MANIFEST).file_size > _LARGEST_TEXT:
        raise ImportFileError(f"{MANIFEST} is larger than any real one")
    try:
        manifest = json.loads(b"".join(_pieces(archive, MANIFEST)))
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ImportFileError(f"{MANIFEST} does not say {FORMAT!r}")
    for key, known in (("version", VERSION), ("schema_version", SCHEMA_VERSION)):
        if manifest.get(key) != known or isinstance(manifest[key], bool):
            raise ImportFileError(
                f"{MANIFEST} has {key} {manifest.get(key)!r}, this moescope reads {known}"
            )
    run = manifest.get("run")
    if not isinstance(run, dict) or not isinstance(run.get("manifest"), dict):
        raise ImportFileError(f"{MANIFEST} does not hold the run's row")
    if not all(isinstance(run.get(key), str) for key in ("run_id", "model", "status")):
        raise ImportFileError(f"{MANIFEST} does not say name, model and status of the run")
    _check_stated(manifest.get("members"), archive)
    return manifest


def _check_stated(members: Any, archive: zipfile.ZipFile) -> None:
    if not isinstance(members, dict) or set(members) != set(MEMBERS):
        raise ImportFileError(f"{MANIFEST} does not name the files of the archive")
    for name, stated in members.items():
        numbers = ("bytes",) if name == README else ("bytes", "rows")
        sound = (
            isinstance(stated, dict)
            and isinstance(stated.get("sha256"), str)
            and all(type(stated.get(key)) is int for key in numbers)
        )
        if not sound:
            raise ImportFileError(f"{MANIFEST} does not say size and SHA-256 of {name}")
        if stated["bytes"] != archive.getinfo(name).file_size:
            raise ImportFileError(f"{name} has another size than the manifest says")


def _pieces(archive: zipfile.ZipFile, member: str) -> Iterator[bytes]:
    try:
        with archive.open(member) as file:
            while piece := file.read(_PIECE):
                yield piece
    except _FAULTS as error:
        raise ImportFileError(f"{member} is damaged: {error}") from error
