"""Figures of co-activation and partners."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.measures import FloatArray
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.style import (
    DIVERGING,
    LINE_COLORS,
    NEUTRAL,
    SEQUENTIAL,
    amount_range,
    blank_figure,
    legend_above,
    only_kind,
)

LIFT_LIMIT: Final = 3.0
"""Lifts beyond 2**3 and below 2**-3 have the colors of the ends."""

# Experts whose numbers fit beside each other when they are out of order.
MOST_LABELS = 40

_MEASURES = {
    "share": ("Share of an expert's tokens that also select another", "share<br>of tokens"),
    "lift": ("Experts selected together, relative to chance", "lift<br>(chance 1)"),
}


def coactivation_heatmap(
    table: AnalysisTable,
    *,
    layer: int,
    measure: str = "lift",
    order: str = "cluster",
    kind: str | None = None,
) -> go.Figure:
    """Experts x experts of one layer, the diagonal blank.

    Args:
        table: of `expert_coactivation`.
        layer: the decoder layer.
        measure: `lift` (on a logarithmic scale) or `share`.
        order: `expert` by number, or `cluster`: experts with high lift among them stand together
            (average linkage).
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: when the table has no such layer, or for an unknown measure or order.
    """
    for value, known in ((measure, _MEASURES), (order, ("expert", "cluster"))):
        if value not in known:
            raise AnalysisInputError(f"there is no {value!r}; it is one of {', '.join(known)}")
    frame = one_layer(only_kind(table.frame, kind), layer)
    grid = square(frame, measure, "expert", "other")
    places = np.arange(len(grid))
    if order == "cluster":
        places = _clustered(square(frame, "lift", "expert", "other"))
    words, unit = _MEASURES[measure]
    if table.context.parameters["pairs"] == "adjacent":
        words += " (neighbors in rank order only)"
    figure = blank_figure(table, f"{words}, layer {layer}", height=640)
    shown = grid[np.ix_(places, places)]
    figure.add_trace(
        go.Heatmap(
            **(log_lift(shown) if measure == "lift" else amounts(shown)),
            customdata=np.dstack(
                [shown, *np.broadcast_arrays(places[:, None], places[None, :])]
            ).astype(np.float64),
            hovertemplate="expert %{customdata[1]:d} with %{customdata[2]:d}: "
            + f"{measure} %{{customdata[0]:.4g}}<extra></extra>",
        )
    )
    # Its title stands above the highest tick, not on it.
    figure.data[0].colorbar.update(title={"text": unit}, len=0.92, y=0.46)
    _expert_axes(figure, places, is_ordered=order == "expert")
    return figure


def partner_overview(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Effective partners of the experts by layer, and the median by chance dashed.

    Args:
        table: of `expert_partners`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    figure = blank_figure(table, "Partners in effect of each expert, by layer", height=460)
    figure.add_trace(
        go.Box(
            x=frame["layer"].to_numpy(),
            y=frame["effective_partners"].to_numpy(),
            customdata=frame["expert"].to_numpy(),
            name="experts of a layer",
            boxpoints="outliers",
            line={"color": LINE_COLORS[0], "width": 1.5},
            marker={"size": 4},
            hovertemplate="layer %{x}, expert %{customdata}: %{y:.1f}<extra></extra>",
        )
    )
    chance = frame.groupby("layer")["effective_partners_chance"].median()
    figure.add_trace(
        go.Scatter(
            x=chance.index.to_numpy(),
            y=chance.to_numpy(),
            mode="lines+markers",
            name="by load alone (median)",
            line={"color": NEUTRAL, "dash": "dash"},
            marker={"size": 4},
            hovertemplate="by load alone: %{y:.1f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="effective partners (experts)", rangemode="tozero")
    legend_above(figure)
    return figure


def one_layer(frame: pd.DataFrame, layer: int) -> pd.DataFrame:
    """Rows of one layer; raises `AnalysisInputError` naming those there are."""
    part = frame[frame["layer"] == layer]
    if part.empty:
        known = ", ".join(str(known) for known in sorted(frame["layer"].unique()))
        raise AnalysisInputError(f"the table has no layer {layer}; it has {known}")
    return part


def square(frame: pd.DataFrame, measure: str, row: str, column: str) -> FloatArray:
    """A measure of pairs as [experts, experts]; NaN where there is no row."""
    rows, columns = (frame[name].to_numpy(dtype=np.int64) for name in (row, column))
    grid = np.full((int(rows.max()) + 1, int(columns.max()) + 1), np.nan)
    grid[rows, columns] = frame[measure].to_numpy(dtype=np.float64)
    return grid


def amounts(grid: FloatArray) -> dict[str, Any]:
    """What a heatmap of shares needs."""
    return {"z": grid, "colorscale": SEQUENTIAL, **amount_range(grid)}


def log_lift(grid: FloatArray) -> dict[str, Any]:
    """What a heatmap of lifts needs: halves and doubles are equally far from 1."""
    ticks = np.arange(-LIFT_LIMIT, LIFT_LIMIT + 1)
    labels = [f"{2**tick:g}" if tick >= 0 else f"1/{2**-tick:g}" for tick in ticks]
    labels[0], labels[-1] = f"≤ {labels[0]}", f"≥ {labels[-1]}"
    with np.errstate(divide="ignore"):
        shades = np.clip(np.log2(grid), -LIFT_LIMIT, LIFT_LIMIT)
    return {
        "z": shades,
        "colorscale": DIVERGING,
        "zmin": -LIFT_LIMIT,
        "zmax": LIFT_LIMIT,
        "colorbar": {"tickmode": "array", "tickvals": ticks, "ticktext": labels},
    }


def _clustered(lift: FloatArray) -> NDArray[np.int64]:
    """Experts in an order in which those with high lift stand together."""
    if len(lift) < 3:
        return np.arange(len(lift))
    # An expert that is never used has no lift: far from all.
    both = np.nan_to_num((lift + lift.T) / 2)
    distance = 1 / (1 + both)
    np.fill_diagonal(distance, 0.0)
    joined = hierarchy.linkage(
        squareform(distance, checks=False), method="average", optimal_ordering=True
    )
    return np.asarray(hierarchy.leaves_list(joined), dtype=np.int64)


def _expert_axes(figure: go.Figure, places: NDArray[np.int64], *, is_ordered: bool) -> None:
    """Axes of experts; numbers that are out of order only where all of them fit."""
    axis: dict[str, Any] = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    end = "" if is_ordered else ", those of high lift together"
    if not is_ordered:
        fits = len(places) <= MOST_LABELS
        axis |= {
            "tickmode": "array",
            "tickvals": np.arange(len(places)) if fits else [],
            "ticktext": [str(place) for place in places] if fits else [],
        }
    figure.update_xaxes(title_text="other expert" + end, **axis)
    figure.update_yaxes(title_text="expert", autorange="reversed", **axis)
