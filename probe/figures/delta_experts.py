"""Figure of the experts that a language or task uses above a reference."""

from __future__ import annotations

import plotly.graph_objects as go

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.figures.style import (
    LINE_COLORS,
    SYMBOLS,
    blank_figure,
    escaped,
    legend_above,
    only_kind,
)


def delta_expert_counts(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """How many experts each value uses above tau, by layer.

    Args:
        table: of `delta_experts`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    parameters = table.context.parameters
    title = (
        f"Experts used above {parameters['reference']} by more than {parameters['tau']:g}, by layer"
    )
    figure = blank_figure(table, title, height=440)
    values = sorted(frame["value"].unique())
    for index, value in enumerate(values):
        own = frame[frame["value"] == value]
        by_layer = own.groupby("layer")[["above", "surely_above"]].sum()
        color = LINE_COLORS[index % len(LINE_COLORS)]
        figure.add_trace(
            go.Scatter(
                x=by_layer.index.to_numpy(),
                y=by_layer["above"].to_numpy(),
                mode="lines+markers",
                name=escaped(str(value)),
                line={"color": color},
                marker={"symbol": SYMBOLS[index % len(SYMBOLS)]},
                customdata=by_layer[["surely_above"]].to_numpy(),
                hovertemplate="layer %{x}: %{y} experts above tau, of "
                "%{customdata[0]} the whole interval",
            )
        )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="experts above tau", rangemode="tozero")
    legend_above(figure)
    return figure
