"""A look at the head of a GGUF file before the library reads it.

The library trusts the counts in the head and walks along them, which on a damaged file takes hours.
Here every count is held against the bytes that are left. Source: the GGUF specification of ggml.
"""

from __future__ import annotations

import struct
from typing import Final

from moescope.probe.errors import ImportFileError

_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of values that have a fixed size."""

_STRING, _ARRAY = 8, 9
_SMALLEST_ENTRY: Final = 12
_MOST_DIMENSIONS: Final = 8


class _Cursor:
    """A place in the bytes of a head that never leaves them."""

    def __init__(self, content: bytes, name: str) -> None:
        self._content = content
        self._name = name
        self.place = 4

    def number(self, form: str) -> int:
        """A number of this form of `struct`."""
        size = struct.calcsize(form)
        self.skip(size)
        return int(struct.unpack_from(f"<{form}", self._content, self.place - size)[0])

    def skip(self, size: int) -> None:
        """Go on by so many bytes."""
        if size > len(self._content) - self.place:
            raise ImportFileError(f"{self._name} is a damaged GGUF file: its head is cut short")
        self.place += size

    def count(self, form: str, smallest: int) -> int:
        """A number of things that take at least so many bytes each."""
        number = self.number(form)
        if number * smallest > len(self._content) - self.place:
            raise ImportFileError(
                f"{self._name} is a damaged GGUF file: it counts {number:,} things at byte "
                f"{self.place}, more than fit"
            )
        return number

    def value(self, kind: int) -> None:
        """Step over a value."""
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.count("Q", 1))
        elif kind == _ARRAY:
            self.array()
        else:
            raise ImportFileError(f"{self._name} is a damaged GGUF file: a value of type {kind}")

    def array(self) -> None:
        """Step over an array; arrays within arrays are not in use."""
        kind = self.number("I")
        if kind not in (*_SIZES, _STRING):
            raise ImportFileError(f"{self._name} is a damaged GGUF file: an array of type {kind}")
        number = self.count("Q", _SIZES.get(kind, 8))
        if kind in _SIZES:
            self.skip(number * _SIZES[kind])
            return
        for _ in range(number):
            self.value(_STRING)


def check_head(content: bytes, name: str) -> None:
    """Refuse a head whose counts do not fit the file.

    Args:
        content: the file, which begins with the magic bytes.
        name: of the file, for the message.

    Raises:
        ImportFileError: says at which byte.
    """
    cursor = _Cursor(content, name)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ImportFileError(f"{name} is GGUF version {version}; 2 and 3 are known")
    tensors = cursor.count("Q", _SMALLEST_ENTRY)
    fields = cursor.count("Q", _SMALLEST_ENTRY)
    for _ in range(fields):
        cursor.value(_STRING)
        cursor.value(cursor.number("I"))
    for _ in range(tensors):
        cursor.value(_STRING)
        dimensions = cursor.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ImportFileError(f"{name} is a damaged GGUF file: {dimensions} dimensions")
        cursor.skip(8 * dimensions + 4 + 8)
