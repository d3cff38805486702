"""What every measure of causes names: an expert, and how it is taken out."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: How an expert is taken out, as for the action `mask` (our methods, 5.0).
Mode = Literal["drop", "drop_renorm", "replace"]


class ExpertKey(NamedTuple):
    """One routed expert of a model."""

    layer: int
    kind: str
    expert: int
