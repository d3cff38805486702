"""The conditions of an evaluation in words: `control:random:0` is `random experts, seed 0`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_CONTROL: Final = "control"

#: Kind of control -> its words; any other kind is shown under the name it was given.
_KINDS: Final[Mapping[str, str]] = {
    "random": "random experts",
    "load-matched": "random experts, matched on load",
    "bottom": "bottom of the ranking",
    "random-rank": "another rank, at random",
    "random-references": "random references",
}
# Nothing is drawn for these, so the seed in their name tells nothing.
_UNSEEDED: Final = ("bottom",)


def control_kind(condition: str) -> str | None:
    """What kind of control a condition is; None for `unsteered`, `steered` and the like.

    Args:
        condition: `control:KIND`, `control:KIND:SEED`, or a name without `control:`.
    """
    first, colon, rest = condition.partition(":")
    if first != _CONTROL or not colon:
        return None
    return _split_seed(rest)[0]


def condition_in_words(condition: str) -> str:
    """A condition as people read it, as `random experts, matched on load, seed 1`.

    Names that nobody knows (`control:mine`) are kept: `control mine`.
    """
    first, colon, rest = condition.partition(":")
    if first != _CONTROL or not colon:
        return condition
    kind, seed = _split_seed(rest)
    words = _KINDS.get(kind, f"{_CONTROL} {kind}")
    return words if seed is None or kind in _UNSEEDED else f"{words}, seed {seed}"


def kind_in_words(kind: str) -> str:
    """A kind of control as people read it, as `random experts`."""
    return _KINDS.get(kind, f"{_CONTROL} {kind}")


def _split_seed(name: str) -> tuple[str, str | None]:
    """`random:0` -> kind and seed; no seed where none stands at the end."""
    kind, colon, seed = name.rpartition(":")
    return (kind, seed) if colon and seed.isdecimal() else (name, None)
