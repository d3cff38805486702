"""How outcomes of answers look in every figure, as told apart with any color vision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Outcome -> color of Okabe and Ito, as on badges.
OUTCOME_COLORS: Final[Mapping[str, str]] = {
    "correct": "#009E73", "other": "#8C8C8C", "partial": "#E69F00", "refused": "#D55E00",
    "broken": "#CC79A7",
}  # fmt: skip
#: Outcome -> marker.
OUTCOME_SYMBOLS: Final[Mapping[str, str]] = {
    "correct": "circle", "other": "square", "partial": "diamond", "refused": "x",
    "broken": "triangle-up",
}  # fmt: skip
