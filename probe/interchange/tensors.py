"""Loading files of tensors from others: nothing in them can run code, and sizes are bounded."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import existing_file
from moescope.probe.interchange.imported import Array

_LARGEST_GROWTH: Final = 20


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote: tensors, numbers, texts, lists and dicts alone.

    Raises:
        ImportFileError: it is no such file, holds anything else, or unpacks to far too much.
    """
    import torch

    existing_file(path)
    check_growth(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImportFileError(f"{path} is no file of tensors: {first[:160]}") from error


def check_growth(path: Path) -> None:
    """Refuse an archive that unpacks to far more than its size (a zip bomb)."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ImportFileError(f"{path} is a damaged archive: {error}") from error
    if unpacked > _LARGEST_GROWTH * path.stat().st_size + (1 << 20):
        raise ImportFileError(
            f"{path} would unpack to {unpacked:,} bytes; that is no real recording"
        )


def integers(value: Any, place: str, dimensions: int) -> Array:
    """A tensor or nested list of whole numbers as int64 with so many dimensions.

    Raises:
        ImportFileError: it is something else; `place` stands in the sentence.
    """
    try:
        array: Array = value.numpy() if hasattr(value, "numpy") else np.array(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ImportFileError(f"{place}: expected whole numbers") from error
    if array.dtype.kind not in "iu" or array.ndim != dimensions:
        raise ImportFileError(
            f"{place}: expected whole numbers in {dimensions} dimensions, got {array.dtype} "
            f"{list(array.shape)}"
        )
    return array.astype(np.int64)
