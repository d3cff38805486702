"""Reading the files of others: bounded in size, and every fault one sentence with its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from moescope.probe.errors import ImportFileError

LARGEST_TEXT_FILE: Final = 8 << 30


def one_file(paths: Sequence[Path], format_name: str) -> Path:
    """The only path.

    Raises:
        ImportFileError: there are several, or it is no file.
    """
    if len(paths) != 1:
        raise ImportFileError(f"{format_name} takes one file, not {len(paths)}")
    return existing_file(paths[0])


def existing_file(path: Path) -> Path:
    """The path, which must be a file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ImportFileError(f"{path} {what}; name a file")
    return path


def read_bytes(path: Path) -> bytes:
    """The whole file."""
    try:
        return existing_file(path).read_bytes()
    except OSError as error:
        raise ImportFileError(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The whole file as UTF-8."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ImportFileError(f"{path}, line {line}: not UTF-8 text") from error


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file (one, or a list of them) or of JSON lines, each with its place."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        data = parse_json(text, str(path))
        records = data if isinstance(data, list) else [data]
        places = [f"{path}, entry {number}" for number in range(1, len(records) + 1)]
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [f"{path}, line {number}" for number, _ in lines]
        records = [parse_json(line, f"{path}, line {number}") for number, line in lines]
    for place, record in zip(places, records, strict=True):
        if not isinstance(record, dict):
            raise ImportFileError(f"{place}: not a JSON object")
        yield place, record


def parse_json(text: str, place: str) -> Any:
    """Parsed JSON; `place` stands in the sentence."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"{place}: not JSON ({error})") from error


def field_of(record: dict[str, Any], name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """A field that must be there and of a type."""
    value = record.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        expected = kind.__name__ if isinstance(kind, type) else kind[0].__name__
        raise ImportFileError(f"{place}, field {name!r}: expected {expected}, got {_shown(value)}")
    return value


def digest(paths: Sequence[Path]) -> str:
    """One hash over all files at these paths, folders included, in the order of their names."""
    files = []
    for path in paths:
        files += sorted(path.rglob("*")) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        if file.is_file():
            whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
