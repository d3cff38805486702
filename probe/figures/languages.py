"""Figure of the divergence of languages by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.figures.style import (
    LINE_COLORS,
    NEUTRAL,
    SYMBOLS,
    counted,
    dress,
    escaped,
    only_kind,
    transparent,
)

PANEL_HEIGHT = 240


def language_curves(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Raw and entropy-normalized divergence by layer, one line per language, floor dashed.

    A floor is drawn beside the divergence that was computed as it was: for floor `halves` that is a
    panel of its own, on equal numbers of tokens.

    Args:
        table: of `language_divergence`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    parameters = table.context.parameters
    panels = [
        ("jsd", "jsd_low", "jsd_high", "jsd_floor", "JSD (nats)"),
        ("d_hjs", "d_low", "d_high", "d_floor", "JSD over<br>entropy headroom"),
    ]
    if parameters["floor"] != "other_passages":
        panels = [(*panel[:3], "", panel[4]) for panel in panels]
    if parameters["floor"] == "halves":
        panels.append(("jsd_compared", "", "", "jsd_floor", "JSD (nats),<br>equal token counts"))
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for index, (language, part) in enumerate(frame.groupby("lang", sort=False)):
        for row, panel in enumerate(panels, start=1):
            for trace in _traces(str(language), part, panel, index, is_first=row == 1):
                figure.add_trace(trace, row=row, col=1)
    if parameters["floor"] != "none":
        figure.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="lines",
                name="floor (same language)",
                line={"color": NEUTRAL, "dash": "dash"},
            )
        )
    for row, panel in enumerate(panels, start=1):
        figure.update_yaxes(title_text=panel[4], rangemode="tozero", row=row, col=1)
    distribution = {"softmax": "router scores", "topk": "routing weights", "counts": "selections"}
    title = (
        f"How far each language routes from {parameters['pivot']} "
        f"({distribution[parameters['q']]}, {counted(int(frame['num_passages'].max()), 'passage')})"
    )
    dress(figure, table, title, height=110 + PANEL_HEIGHT * len(panels))
    figure.update_xaxes(title_text="layer", row=len(panels), col=1)
    return figure


def _traces(
    language: str,
    part: pd.DataFrame,
    panel: tuple[str, str, str, str, str],
    index: int,
    *,
    is_first: bool,
) -> list[go.Scatter]:
    """Interval band, curve and floor of one language in one panel."""
    measure, low, high, floor, _ = panel
    color = LINE_COLORS[index % len(LINE_COLORS)]
    layers = part["layer"].to_numpy()
    common = {"x": layers, "legendgroup": language, "showlegend": False}
    traces = []
    if low:
        traces.append(
            go.Scatter(
                **(common | {"x": np.concatenate([layers, layers[::-1]])}),
                y=np.concatenate([part[high].to_numpy(), part[low].to_numpy()[::-1]]),
                mode="lines",
                fill="toself",
                fillcolor=transparent(color, 0.18),
                line={"width": 0},
                hoverinfo="skip",
            )
        )
    traces.append(
        go.Scatter(
            **(common | {"showlegend": is_first}),
            y=part[measure].to_numpy(),
            mode="lines+markers",
            name=escaped(language),
            line={"color": color},
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)]},
            customdata=part[["num_passages", "num_tokens"]].to_numpy(),
            hovertemplate="layer %{x}: %{y:.4f}<br>%{customdata[0]} passages, "
            "%{customdata[1]} tokens",
        )
    )
    if floor:
        traces.append(
            go.Scatter(
                **common,
                y=part[floor].to_numpy(),
                mode="lines",
                name=escaped(f"{language}, floor"),
                line={"color": color, "dash": "dash", "width": 1},
                hovertemplate="floor: %{y:.4f}",
            )
        )
    return traces
