"""Figures of load and balance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.figures.style import (
    LINE_COLORS,
    NEUTRAL,
    SEQUENTIAL,
    SYMBOLS,
    amount_range,
    blank_figure,
    dress,
    escaped,
    grid_height,
    layer_by_expert,
    map_axes,
    only_kind,
    only_value,
)

_MEASURES = {
    "load": ("Load: share of slots by expert", "share of slots"),
    "token_share": ("Share of tokens that use each expert", "share of tokens"),
    "importance": ("Importance: share of routing weight by expert", "share of weight"),
}
_PANELS = (
    ("usage_entropy", None, "usage entropy<br>(share of ln E)"),
    ("gini", "gini_chance", "Gini of load"),
    ("never_used", "never_used_chance", "experts<br>never used"),
)


def load_heatmap(
    table: AnalysisTable,
    *,
    measure: str = "load",
    value: str | None = None,
    kind: str | None = None,
) -> go.Figure:
    """Layers x experts of the table `load`.

    Args:
        table: of `expert_load`.
        measure: `load`, `token_share` or `importance`.
        value: which value, where the table is split by a field.
        kind: which kind of router; the first there is by default.
    """
    title, unit = _MEASURES[measure]
    frame = only_kind(only_value(table, table.frame, value), kind)
    grid, layers, experts = layer_by_expert(frame, measure)
    heading = title if value is None else f"{title}: {value}"
    figure = blank_figure(table, heading, height=grid_height(len(layers)))
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=experts,
            y=layers,
            **amount_range(grid),
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": unit.replace(" of ", "<br>of ")}},
            hovertemplate="layer %{y}, expert %{x}<br>%{z:.4f} " + unit + "<extra></extra>",
        )
    )
    map_axes(figure, layers)
    return figure


def balance_curves(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Usage entropy, Gini and never-used experts by layer, chance dashed.

    Args:
        table: of `load_balance`; one line per value where it is split by a field.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    split = "value" in frame
    groups = list(frame.groupby("value", sort=False)) if split else [("", frame)]
    figure = make_subplots(rows=len(_PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, (name, chance, label) in enumerate(_PANELS, start=1):
        for index, (value, part) in enumerate(groups):
            legend = str(value) if split else "observed"
            for trace in _curves(part, name, chance, legend, index, is_first=row == 1):
                figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(title_text=label, rangemode="tozero", row=row, col=1)
    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            name="uniform routing",
            line={"color": NEUTRAL, "dash": "dash"},
        )
    )
    dress(figure, table, table.title + ", by layer", height=640)
    figure.update_yaxes(range=[0, max(1.0, 1.05 * frame["never_used"].max())], row=3, col=1)
    figure.update_xaxes(title_text="layer", row=len(_PANELS), col=1)
    return figure


def _curves(
    part: pd.DataFrame, name: str, chance: str | None, legend: str, index: int, *, is_first: bool
) -> list[go.Scatter]:
    """One measure by layer, and what uniform routing would give."""
    color = LINE_COLORS[index % len(LINE_COLORS)]
    layers = part["layer"].to_numpy()
    expected = np.ones(len(part)) if chance is None else part[chance].to_numpy()
    return [
        go.Scatter(
            x=layers,
            y=part[name].to_numpy(),
            mode="lines+markers",
            name=escaped(legend),
            legendgroup=legend,
            showlegend=is_first,
            line={"color": color},
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)]},
            hovertemplate="layer %{x}: %{y:.4g}",
        ),
        go.Scatter(
            x=layers,
            y=expected,
            mode="lines",
            name=escaped(f"{legend}, uniform routing"),
            legendgroup=legend,
            showlegend=False,
            line={"color": color, "dash": "dash", "width": 1},
            hovertemplate="uniform routing: %{y:.4g}",
        ),
    ]
