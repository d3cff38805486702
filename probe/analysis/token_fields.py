"""Fields of tokens that a table can be split by, beside the fields of prompts.

Phase, segment and whether a token is special stand in `usage`; positions, in buckets that double
(0, 1, 2-3, 4-7, ...), need the routing of single tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moescope.probe.analysis.filters import SEGMENTS
from moescope.probe.analysis.selection import IntArray, Selection
from moescope.probe.analysis.token_slots import Tokens

_USAGE_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "phase": ("prompt", "generated"),
    "segment": SEGMENTS,
    "is_special": (False, True),
}
TOKEN_FIELDS: Final = (*_USAGE_VALUES, "position")


@dataclass(frozen=True, kw_only=True)
class TokenField:
    """A field of tokens.

    Attributes:
        name: of `TOKEN_FIELDS`.
        labels: its values as tables show them, in order.
    """

    name: str
    labels: tuple[str, ...]

    @property
    def needs_positions(self) -> bool:
        """Whether only single tokens have it, not usage."""
        return self.name not in _USAGE_VALUES

    def of_usage(self, rows: pa.Table) -> IntArray:
        """The value of each row of `usage_arrays`, as an index into the labels."""
        values = pa.array(_USAGE_VALUES[self.name])
        found = pc.index_in(rows.column(self.name), value_set=values)
        return np.asarray(found.to_numpy(), dtype=np.int64)

    def of_tokens(self, tokens: Tokens) -> IntArray:
        """The value of each token, as an index into the labels."""
        if self.name == "position":
            return position_buckets(tokens.positions)
        column = pa.array(tokens.columns[self.name])
        return self.of_usage(pa.table({self.name: column}))


def token_field(selection: Selection, name: str) -> TokenField:
    """A field of tokens by name, with the values that a run can have."""
    if name != "position":
        labels = tuple(str(value).lower() for value in _USAGE_VALUES[name])
        return TokenField(name=name, labels=labels)
    longest = selection.store.arrow(
        "SELECT coalesce(max(position), 0) AS last FROM tokens WHERE run_id = ?",
        [selection.run_id],
    )["last"][0].as_py()
    number = int(position_buckets(np.array([longest]))[0]) + 1
    return TokenField(name=name, labels=tuple(bucket_label(index) for index in range(number)))


def position_buckets(positions: NDArray[Any]) -> IntArray:
    """Bucket of each position: 0, 1, 2-3, 4-7, 8-15, ... are 0, 1, 2, 3, 4, ..."""
    # The exponent that frexp gives counts the binary digits.
    return np.asarray(np.frexp(positions)[1], dtype=np.int64)


def bucket_label(index: int) -> str:
    """`0`, `1`, `2-3`, `4-7`, ..."""
    first, last = (0, 0) if index == 0 else (2 ** (index - 1), 2**index - 1)
    return str(first) if first == last else f"{first}-{last}"
