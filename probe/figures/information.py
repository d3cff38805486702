"""Figures of routing as information."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.style import (
    LINE_COLORS,
    NEUTRAL,
    SEQUENTIAL,
    SYMBOLS,
    amount_range,
    blank_figure,
    escaped,
    grid_height,
    layer_by_expert,
    map_axes,
    only_kind,
    transparent,
)

_GIVEN = {"none": "", "token": ", given the token"}


def information_curves(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Share of H(expert) that each factor tells, by layer, with interval; chance is 0.

    Args:
        table: of `routing_information`, not per expert.
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: when the table is per expert.
    """
    frame = only_kind(table.frame, kind)
    if "expert" in frame:
        raise AnalysisInputError(
            "the table is per expert; draw it with information_map, or compute it without"
        )
    given = _GIVEN[table.context.parameters["given"]]
    title = f"What each factor tells about the expert of a slot{given}"
    figure = blank_figure(table, title, height=480)
    for index, (factor, part) in enumerate(frame.groupby("factor", sort=False)):
        color = LINE_COLORS[index % len(LINE_COLORS)]
        layers = part["layer"].to_numpy()
        figure.add_trace(
            go.Scatter(
                legendgroup=str(factor),
                x=np.concatenate([layers, layers[::-1]]),
                y=np.concatenate([part["high"], part["low"][::-1]]),
                mode="lines",
                fill="toself",
                fillcolor=transparent(color, 0.18),
                line={"width": 0},
                showlegend=False,
                hoverinfo="skip",
            )
        )
        details = ["information", "information_nats", "shuffled_nats", "num_values"]
        figure.add_trace(
            go.Scatter(
                legendgroup=str(factor),
                x=layers,
                y=part["share"].to_numpy(),
                mode="lines+markers",
                name=escaped(str(factor)),
                line={"color": color},
                marker={"symbol": SYMBOLS[index % len(SYMBOLS)]},
                customdata=part[details].to_numpy(),
                hovertemplate="layer %{x}: %{y:.4f} of H<br>%{customdata[0]:.4f} nats: "
                "%{customdata[1]:.4f} counted, %{customdata[2]:.4f} shuffled<br>"
                "%{customdata[3]} values",
            )
        )
    layers = np.sort(frame["layer"].unique())
    figure.add_trace(
        go.Scatter(
            x=layers,
            y=np.zeros(len(layers)),
            mode="lines",
            name="chance",
            line={"color": NEUTRAL, "dash": "dash"},
            hoverinfo="skip",
        )
    )
    curve_axes(figure, layers)
    figure.update_yaxes(title_text="information<br>(share of H(expert))")
    return figure


def curve_axes(figure: go.Figure, layers: NDArray[np.integer]) -> None:
    """Whole layers below, and the legend under them: it takes as many rows as a window needs."""
    step = max(1, int(np.ptp(layers)) // 12)
    figure.update_xaxes(title_text="layer", tick0=0, dtick=step)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"})


def information_map(table: AnalysisTable, *, factor: str, kind: str | None = None) -> go.Figure:
    """Layers x experts: share of H(selected or not) that a factor tells, per expert.

    Args:
        table: of `routing_information` with `per_expert`.
        factor: the factor.
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: when the table is not per expert or has no such factor.
    """
    frame = only_kind(table.frame, kind)
    factors = list(dict.fromkeys(frame["factor"]))
    if "expert" not in frame or factor not in factors:
        raise AnalysisInputError(
            f"the table has no information of {factor!r} per expert; it has "
            f"{', '.join(factors)}{'' if 'expert' in frame else ', not per expert'}"
        )
    grid, layers, experts = layer_by_expert(frame[frame["factor"] == factor], "share")
    given = _GIVEN[table.context.parameters["given"]]
    figure = blank_figure(
        table,
        f"What {factor} tells about whether a token selects an expert{given}",
        height=grid_height(len(layers)),
    )
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=experts,
            y=layers,
            **amount_range(grid),
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": "share of H<br>(chance 0)"}},
            hovertemplate="layer %{y}, expert %{x}<br>%{z:.4f} of H<extra></extra>",
        )
    )
    map_axes(figure, layers)
    return figure
