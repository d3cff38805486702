"""Reading data frames that others pickled, without letting a pickle construct anything.

An unpickler calls what the file names. This one, written in Python, answers every name it knows
with a stand-in of ours that takes numbers, texts and lists, checks their sizes and builds plain
columns; every other name is refused. The real classes are never involved: NumPy and pandas trust
what a pickle tells them about memory, and a damaged one ends the process.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import read_bytes
from moescope.probe.interchange.imported import Array

_DTYPES: Final = {
    "b1": bool, "i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64, "u1": np.uint8,
    "u2": np.uint16, "u4": np.uint32, "u8": np.uint64, "f2": np.float16, "f4": np.float32,
    "f8": np.float64, "O8": object,
}  # fmt: skip


class _DamagedError(Exception):
    """What the pickle says cannot be."""


@dataclass
class Columns:
    """A table: arrays or lists by column, and the frame's `attrs`."""

    columns: dict[str, Any]
    attrs: dict[str, Any]
    num_rows: int


class _DType:
    """A NumPy dtype by its short name; byte order comes with its state."""

    def __init__(self, name: object = "", *_: object) -> None:
        if name not in _DTYPES:
            raise _DamagedError(f"arrays of {name!r}")
        self.real = np.dtype(_DTYPES[str(name)])

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise _DamagedError("big-endian or structured arrays")


def _array_of(shape: object, dtype: object, data: object, *, fortran: bool) -> Array:
    """An array made of checked parts."""
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple):
        raise _DamagedError("an array without a shape or dtype")
    if not all(isinstance(size, int) and 0 <= size < 1 << 40 for size in shape) or len(shape) > 8:
        raise _DamagedError(f"an array of the shape {shape!r}")
    size = int(np.prod([int(one) for one in shape], dtype=object)) if shape else 1
    if dtype.real.hasobject:
        if not isinstance(data, list) or len(data) != size:
            raise _DamagedError("an array of objects with another number of them")
        flat: Array = np.empty(size, object)
        for index, value in enumerate(data):
            flat[index] = value
    else:
        if not isinstance(data, (bytes, bytearray)) or len(data) != size * dtype.real.itemsize:
            raise _DamagedError("an array with another number of bytes")
        flat = np.frombuffer(bytes(data), dtype.real)
    return flat.reshape(shape, order="F" if fortran else "C")


class _Array:
    """An array that is filled by its state."""

    def __init__(self, *_: object) -> None:
        self.real: Array = np.zeros(0)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _DamagedError("an array with an unknown state")
        _, shape, dtype, fortran, data = state
        self.real = _array_of(shape, dtype, data, fortran=bool(fortran))


def _from_buffer(
    data: object, dtype: object, shape: object, order: object = "C", axes: object = None
) -> _Array:
    made = _Array()
    made.real = _array_of(shape, dtype, data, fortran=order == "F")
    if axes is not None:
        if not isinstance(axes, tuple) or sorted(axes) != list(range(made.real.ndim)):
            raise _DamagedError("an array with unknown axes")
        made.real = made.real.transpose(axes)
    return made


def _scalar(dtype: object, data: object = b"") -> Any:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes) or dtype.real.hasobject:
        raise _DamagedError("a number without a dtype")
    return _array_of((), dtype, data, fortran=False)[()].item()


@dataclass
class _Labels:
    """An index: its labels, or the ends of a range."""

    values: Any = None

    @classmethod
    def new(cls, _kind: object, parts: object) -> _Labels:
        """As pandas' `_new_Index` is called."""
        if not isinstance(parts, dict):
            raise _DamagedError("an index without parts")
        if "data" in parts:
            return cls(parts["data"])
        ends = [parts.get(name) for name in ("start", "stop", "step")]
        if not all(isinstance(end, int) for end in ends) or not ends[2]:
            raise _DamagedError("a range without ends")
        return cls(range(*ends))  # type: ignore[arg-type]


@dataclass
class _Block:
    values: Any
    placement: Any
    ndim: Any = 2


@dataclass
class _Manager:
    blocks: Any = ()
    axes: Any = ()


@dataclass
class _Frame:
    """A data frame, filled by its state."""

    state: dict[str, Any] = field(default_factory=dict)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise _DamagedError("a frame with an unknown state")
        self.state = state


def _encoded(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _DamagedError("bytes in an unknown form")
    return text.encode("latin1")


_STAND_INS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("builtins", "slice"): slice,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encoded,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("pandas", "DataFrame"): _Frame,
    ("pandas", "Index"): _Labels,
    ("pandas", "RangeIndex"): _Labels,
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.indexes.base", "Index"): _Labels,
    ("pandas.core.indexes.base", "_new_Index"): _Labels.new,
    ("pandas.core.indexes.range", "RangeIndex"): _Labels,
    ("pandas.core.internals.managers", "BlockManager"): _Manager,
    ("pandas._libs.internals", "_unpickle_block"): _Block,
}
"""What a pickle may ask for, and what it gets."""

_MOVED: Final = {
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    "pandas.indexes.base": "pandas.core.indexes.base",
}


_PYTHON: Any = pickle._Unpickler


class _DataOnly(_PYTHON):  # type: ignore[misc]
    """Python's own unpickler, which is memory-safe, with stand-ins for all names."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PYTHON.dispatch)

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._limit = len(content)

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; every other one is refused."""
        found = _STAND_INS.get((_MOVED.get(module, module), name))
        if found is None:
            raise ImportFileError(f"it asks for {module}.{name}, which no table needs")
        return found

    def persistent_load(self, pid: object) -> Any:
        """Refuse references to anything outside of the file."""
        raise ImportFileError("it refers to something outside of itself")

    def load_bytearray8(self) -> None:
        """Bytes that can be written to, no more than the file has."""
        unpickler: Any = self
        size = int.from_bytes(unpickler.read(8), "little")
        if size > self._limit:
            raise _DamagedError("more bytes than the file has")
        unpickler.append(bytearray(unpickler.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def read_frame(path: Path) -> Columns:
    """A pickled data frame of numbers, texts, lists, dicts and arrays.

    Raises:
        ImportFileError: it is none, or asks for anything but data; nothing of it was run.
    """
    content = read_bytes(path)
    try:
        return _columns(_DataOnly(content).load())
    except ImportFileError as error:
        raise ImportFileError(f"{path} was not opened: {error}") from error
    except _DamagedError as error:
        raise ImportFileError(f"{path} is no pickled table that can be read: {error}") from error
    except Exception as error:  # a broken pickle fails in as many ways as there are opcodes
        raise ImportFileError(f"{path} is no sound pickle ({type(error).__name__})") from error


def _columns(frame: object) -> Columns:
    """The columns of the stand-ins."""
    if not isinstance(frame, _Frame):
        raise _DamagedError(f"it holds no data frame, but {type(frame).__name__}")
    manager = frame.state.get("_mgr")
    if not isinstance(manager, _Manager) or len(manager.axes) != 2:
        raise _DamagedError("a frame of an unknown version of pandas; save it as Parquet instead")
    names = _labels(manager.axes[0])
    num_rows = len(_labels(manager.axes[1]))
    columns: dict[str, Any] = {}
    for block in manager.blocks:
        values = _real(block.values)
        if not isinstance(values, np.ndarray) or values.ndim != 2 or values.shape[1] != num_rows:
            raise _DamagedError("a block of another shape than its table")
        for index, place in enumerate(_places(block.placement, len(names))):
            columns[str(names[place])] = values[index]
    if len(columns) != len(names):
        raise _DamagedError("a table without all of its columns")
    attrs = frame.state.get("attrs")
    plain = (
        {str(key): _real(value) for key, value in attrs.items()} if isinstance(attrs, dict) else {}
    )
    return Columns(columns, plain, num_rows)


def _labels(axis: object) -> Any:
    if not isinstance(axis, _Labels):
        raise _DamagedError("a table without labels")
    values = _real(axis.values)
    if not isinstance(values, (range, np.ndarray, list)) or len(values) > 1 << 32:
        raise _DamagedError("labels that are no list")
    return values


def _places(placement: object, number: int) -> list[int]:
    found = _real(placement)
    if isinstance(found, slice):
        if not all(end is None or isinstance(end, int) for end in (found.start, found.stop)):
            raise _DamagedError("columns that are not numbered")
        return list(range(number))[found]
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.ndim != 1:
        raise _DamagedError("columns that are not numbered")
    places = [int(place) for place in found]
    if not all(0 <= place < number for place in places):
        raise _DamagedError("a column that does not exist")
    return places


def real_value(value: Any, depth: int = 8) -> Any:
    """A value of a cell: arrays and what is in lists and dicts, as themselves, to some depth."""
    if depth and isinstance(value, list):
        return [real_value(one, depth - 1) for one in value]
    if depth and isinstance(value, dict):
        return {key: real_value(one, depth - 1) for key, one in value.items()}
    return _real(value)


def _real(value: Any) -> Any:
    return value.real if isinstance(value, _Array) else value


def numbers(table: Columns, name: str, path: Path) -> Array:
    """A column of finite numbers, float64[rows]."""
    try:
        values = np.asarray(table.columns[name], dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ImportFileError(f"{path}, column {name!r}: expected numbers") from error
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ImportFileError(f"{path}, column {name!r}: not all are finite numbers")
    return values
