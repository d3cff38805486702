"""Reading data frames that others pickled, without letting a pickle construct anything else.

An unpickler calls what the file names. This one knows the few classes and functions of which a
data frame of numbers, texts and lists consists, by their full names, and nothing besides.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import read_bytes

_ALLOWED: Final = {
    "builtins": ("slice", "list", "dict", "set", "tuple", "bytearray", "complex", "range"),
    "collections": ("OrderedDict",),
    "_codecs": ("encode",),
    "numpy": ("dtype", "ndarray"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.numeric": ("_frombuffer",),
    "pandas": ("DataFrame", "Index", "RangeIndex", "Series"),
    "pandas.core.frame": ("DataFrame",),
    "pandas.core.series": ("Series",),
    "pandas.core.indexes.base": ("Index", "_new_Index"),
    "pandas.core.indexes.range": ("RangeIndex",),
    "pandas.core.internals.managers": ("BlockManager", "SingleBlockManager"),
    "pandas._libs.internals": ("_unpickle_block",),
}
"""Module -> names that a pickle may ask for."""

_MOVED: Final = {
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    "pandas.indexes.base": "pandas.core.indexes.base",
}


# Text of pandas 3 is left out: it is restored from raw buffers, whose sizes nobody checks. Tables
# with it are read as Parquet, CSV or JSON lines by the importer `table`.


class _DataOnly(pickle.Unpickler):
    """An unpickler for data frames alone."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every name that is not in the list."""
        module = _MOVED.get(module, module)
        if name not in _ALLOWED.get(module, ()):
            raise ImportFileError(f"it asks for {module}.{name}, which no table needs")
        return super().find_class(module, name)

    def persistent_load(self, pid: object) -> Any:
        """Refuse references to anything outside of the file."""
        raise ImportFileError(f"it refers to something outside of itself ({pid!r})")


def read_frame(path: Path) -> pd.DataFrame:
    """A pickled data frame.

    Raises:
        ImportFileError: it is none, or asks for anything but data; nothing of it was run.
    """
    content = read_bytes(path)
    try:
        frame = _DataOnly(io.BytesIO(content)).load()
    except ImportFileError as error:
        raise ImportFileError(f"{path} was not opened: {error}") from error
    except Exception as error:  # a broken pickle fails in as many ways as there are opcodes
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImportFileError(f"{path} is no sound pickle: {first[:160]}") from error
    if not isinstance(frame, pd.DataFrame):
        raise ImportFileError(f"{path} holds a {type(frame).__name__}, not a table")
    return frame


def numbers(frame: pd.DataFrame, name: str, path: Path) -> Any:
    """A column of finite numbers, float64[rows]."""
    try:
        values = frame[name].to_numpy(dtype=np.float64)
    except Exception as error:  # a frame of odd parts can fail anywhere in pandas
        raise ImportFileError(f"{path}, column {name!r}: expected numbers") from error
    if not np.isfinite(values).all():
        raise ImportFileError(f"{path}, column {name!r}: not all numbers are finite")
    return values
