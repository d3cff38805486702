"""Tables of experts as rankings: what all strategies read, in one order.

A table has a row per expert with `layer`, `expert`, perhaps `kind`, and a number to rank by: a
column of that name, or the counts `a1, d1, a2, d2` of active and inactive tokens in two groups,
which give the risk difference (SteerMoE, arXiv 2509.09660). Equal numbers always go to the lower
layer, then to the lower expert. Experts without a number take no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from moescope.probe.errors import PlanError
from moescope.steering.check import RoutedLayer

#: What can be ranked by, most wanted first; a strategy may want another order.
RANK_COLUMNS = ("score", "effect", "risk_difference", "delta")
COUNTS = ("a1", "d1", "a2", "d2")


@dataclass(frozen=True)
class RankedExpert:
    """One expert of a table.

    Attributes:
        layer: decoder layer index.
        kind: which router of it, where the table says so.
        expert: its id.
        value: what it is ranked by.
        is_candidate: whether the method that made the table chose it.
        is_above: whether the table has it above its own threshold; None without such a column.
    """

    layer: int
    kind: str | None
    expert: int
    value: float
    is_candidate: bool = False
    is_above: bool | None = None

    @property
    def place(self) -> tuple[int, int, str]:
        """What decides between equal values."""
        return (self.layer, self.expert, self.kind or "")

    @property
    def router(self) -> tuple[int, str | None]:
        """Layer and kind."""
        return (self.layer, self.kind)


@dataclass(frozen=True)
class Ranking:
    """The experts of a table that take part, by layer and expert.

    Attributes:
        column: what they are ranked by.
        experts: all with a number.
        confirmed_only: whether unconfirmed experts were taken out.
        columns: the table's columns.
        kinds: the kinds of routers of each layer, of rows that take no part too.
    """

    column: str
    experts: tuple[RankedExpert, ...]
    confirmed_only: bool
    columns: tuple[str, ...]
    kinds: Mapping[int, frozenset[str]]

    def largest_first(self) -> list[RankedExpert]:
        """By value, descending."""
        return sorted(self.experts, key=lambda one: (-one.value, one.place))

    def smallest_first(self) -> list[RankedExpert]:
        """By value, ascending."""
        return sorted(self.experts, key=lambda one: (one.value, one.place))

    def by_size(self) -> list[RankedExpert]:
        """By |value|, descending."""
        return sorted(self.experts, key=lambda one: (-abs(one.value), one.place))

    @property
    def noun(self) -> str:
        """What error messages call its experts."""
        return "confirmed experts" if self.confirmed_only else "experts"


def rank_experts(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    rank_by: str | None = None,
    wanted: Sequence[str] = RANK_COLUMNS,
    confirmed_only: bool | None = None,
    value: str | None = None,
    layer_range: tuple[int, int] | None = None,
) -> Ranking:
    """The experts of a table, checked against the model's layers if these are given.

    Args:
        frame: the table.
        layers: the model's routed layers.
        rank_by: the column; by default the first of `wanted` that the table has, or that its
            counts give.
        wanted: columns, most wanted first; where only confirmed experts count, `effect` is.
        confirmed_only: take only rows whose `confirmed` is true; by default where there is such a
            column.
        value: of a table that is split by a field (column `value`), the rows of this value.
        layer_range: first and last decoder layer that take part.

    Raises:
        PlanError: a column is missing, an expert stands there twice or is not in the model.
    """
    _require(frame, ("layer", "expert"))
    frame = _of_value(frame, value)
    kinds = _kinds(frame)
    if confirmed_only is None:
        confirmed_only = "confirmed" in frame
    if confirmed_only:
        if "confirmed" not in frame:
            raise PlanError(
                "the table has no column 'confirmed'; make it with moescope contrast, or allow "
                "unconfirmed experts"
            )
        frame = frame[_is_true(frame["confirmed"])]
        # The effect was measured on other prompts than those that chose the expert.
        wanted = ("effect", *(name for name in wanted if name != "effect"))
    column, values = _ranked_column(frame, rank_by, wanted)
    experts = _experts(frame, values)
    _check_places(experts, layers)
    if layer_range is not None:
        first, last = layer_range
        if not 0 <= first <= last:
            raise PlanError(
                f"layers {first}-{last} are no range; name the first and the last, both included"
            )
        experts = [one for one in experts if first <= one.layer <= last]
    ranked = tuple(one for one in experts if not np.isnan(one.value))
    return Ranking(column, ranked, confirmed_only, tuple(map(str, frame.columns)), kinds)


def router_of(
    layer: int, kind: str | None, layers: Sequence[RoutedLayer], what: str = "the table"
) -> RoutedLayer:
    """The router that a row names.

    Raises:
        PlanError: there is none, or the row does not say which of several.
    """
    here = [one for one in layers if one.layer == layer]
    found = [one for one in here if kind in (None, one.kind)]
    if len(found) == 1:
        return found[0]
    kinds = ", ".join(sorted(one.kind for one in here))
    if not here:
        raise PlanError(
            f"{what} has layer {layer}, where the model has no router: it is of another model, or "
            "counts layers differently"
        )
    if not found:
        raise PlanError(
            f"{what} has a router of kind {kind!r} in layer {layer}, and the model has {kinds}"
        )
    raise PlanError(
        f"{what} has no column 'kind', and layer {layer} has several routers ({kinds}); it needs "
        "the column"
    )


def _of_value(frame: pd.DataFrame, value: str | None) -> pd.DataFrame:
    """The rows of one value of a split table."""
    if "value" not in frame:
        if value is not None:
            raise PlanError(f"the table is not split by a field, so it has no value {value!r}")
        return frame
    values = list(dict.fromkeys(frame["value"].map(str)))
    if value is None and len(values) > 1:
        raise PlanError(f"the table holds several values; name one of {', '.join(values)}")
    if value is None:
        return frame
    if value not in values:
        raise PlanError(f"the table has no value {value!r}; it has {', '.join(values) or 'none'}")
    return frame[frame["value"].map(str) == value]


def _ranked_column(
    frame: pd.DataFrame, rank_by: str | None, wanted: Sequence[str]
) -> tuple[str, pd.Series[float]]:
    names = (rank_by,) if rank_by is not None else wanted
    has_counts = set(COUNTS) <= set(frame.columns)
    for name in names:
        if name in frame:
            return name, _numbers(frame, name)
        if name == "risk_difference" and has_counts:
            a1, d1, a2, d2 = (_numbers(frame, count) for count in COUNTS)
            return name, a1 / (a1 + d1) - a2 / (a2 + d2)
    quoted = ", ".join(map(repr, names))
    asked = f"no column {quoted}" if len(names) == 1 else f"none of the columns {quoted}"
    counts = ", nor the counts a1, d1, a2, d2" if "risk_difference" in names else ""
    raise PlanError(
        f"the table has {asked}{counts} to rank by; it has {', '.join(map(str, frame.columns))}"
    )


def _numbers(frame: pd.DataFrame, name: str) -> pd.Series[float]:
    """A column as float64, missing where nothing stands there."""
    try:
        numbers = pd.to_numeric(frame[name], errors="raise").astype("float64")
    except (ValueError, TypeError):
        raise PlanError(f"column {name!r} of the table holds something else than numbers") from None
    if np.isinf(numbers.to_numpy()).any():
        raise PlanError(f"column {name!r} of the table holds an infinite number")
    return numbers


def _experts(frame: pd.DataFrame, values: pd.Series[float]) -> list[RankedExpert]:
    places = {name: _numbers(frame, name).to_numpy() for name in ("layer", "expert")}
    for name, numbers in places.items():
        if not ((numbers >= 0) & (numbers == np.floor(numbers))).all():
            raise PlanError(f"column {name!r} of the table must hold whole numbers from 0")
    kinds = frame["kind"] if "kind" in frame else pd.Series([None] * len(frame), dtype=object)
    chosen = _is_true(frame["candidate"]) if "candidate" in frame else [False] * len(frame)
    above = _is_true(frame["above"]) if "above" in frame else [None] * len(frame)
    columns = zip(places["layer"], kinds, places["expert"], values, chosen, above, strict=True)
    experts = [
        RankedExpert(
            int(layer),
            None if pd.isna(kind) else str(kind),
            int(expert),
            float(number),
            bool(is_candidate),
            None if is_above is None else bool(is_above),
        )
        for layer, kind, expert, number, is_candidate, is_above in columns
    ]
    experts.sort(key=lambda one: one.place)
    for one, other in pairwise(experts):
        if one.place == other.place:
            raise PlanError(
                f"the table names expert {one.expert} of layer {one.layer} twice; it needs one row "
                "per expert"
            )
    return experts


def _kinds(frame: pd.DataFrame) -> dict[int, frozenset[str]]:
    found: dict[int, set[str]] = defaultdict(set)
    if "kind" in frame:
        rows = frame[["layer", "kind"]].dropna().drop_duplicates()
        for layer, kind in zip(_numbers(rows, "layer"), rows["kind"], strict=True):
            found[int(layer)].add(str(kind))
    return {layer: frozenset(kinds) for layer, kinds in found.items()}


def _check_places(experts: Sequence[RankedExpert], layers: Sequence[RoutedLayer] | None) -> None:
    """Every row must be an expert of the model."""
    if layers is None:
        return
    routers = {at: router_of(*at, layers) for at in dict.fromkeys(one.router for one in experts)}
    for one in experts:
        num_experts = routers[one.router].num_experts
        if one.expert >= num_experts:
            raise PlanError(
                f"the table has expert {one.expert} of layer {one.layer}, but the model has "
                f"{num_experts} experts there: it is a table of another model"
            )


def _is_true(column: pd.Series[bool]) -> pd.Series[bool]:
    """A column of truth values, also as text or numbers; missing ones are false."""
    return column.map(lambda value: str(value).strip().lower() in ("true", "1", "1.0", "yes"))


def _require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in frame]
    if missing:
        raise PlanError(
            f"the table has no column {' and no column '.join(map(repr, missing))}; it has "
            f"{', '.join(map(str, frame.columns))}"
        )
