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


_PANELS = (
    ("jsd", "jsd_low", "jsd_high", "JSD (nats)"),
    ("d_hjs", "d_low", "d_high", "JSD over<br>entropy headroom"),
    ("jsd_excess", "excess_low", "excess_high", "JSD above<br>floor (nats)"),
)


def language_curves(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Raw and entropy-normalized divergence by layer, and what exceeds the floor (dashed).

    Args:
        table: of `language_divergence`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    parameters = table.context.parameters
    panels = _PANELS if parameters["floor"] != "none" else _PANELS[:2]
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for index, (language, part) in enumerate(frame.groupby("lang", sort=False)):
        for row, panel in enumerate(panels, start=1):
            for trace in _traces(str(language), part, panel, index, is_first=row == 1):
                figure.add_trace(trace, row=row, col=1)
    layers = np.sort(frame["layer"].unique())
    if len(panels) == len(_PANELS):
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=np.zeros(len(layers)),
                mode="lines",
                name="floor (same language)",
                line={"color": NEUTRAL, "dash": "dash"},
                hoverinfo="skip",
            ),
            row=len(panels),
            col=1,
        )
    for row, panel in enumerate(panels, start=1):
        ranged = {} if panel[0] == "jsd_excess" else {"rangemode": "tozero"}
        figure.update_yaxes(title_text=panel[3], **ranged, row=row, col=1)
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
    panel: tuple[str, str, str, str],
    index: int,
    *,
    is_first: bool,
) -> list[go.Scatter]:
    """Interval band and curve of one language in one panel."""
    measure, low, high, _ = panel
    color = LINE_COLORS[index % len(LINE_COLORS)]
    layers = part["layer"].to_numpy()
    common = {"x": layers, "legendgroup": language, "showlegend": False}
    details = ["num_passages", "num_tokens", "jsd_compared", "jsd_floor"]
    hover = "layer %{x}: %{y:.4f}<br>" + (
        "between languages %{customdata[2]:.4f}, within %{customdata[3]:.4f}"
        if measure == "jsd_excess"
        else "%{customdata[0]} passages, %{customdata[1]} tokens"
    )
    return [
        go.Scatter(
            **(common | {"x": np.concatenate([layers, layers[::-1]])}),
            y=np.concatenate([part[high].to_numpy(), part[low].to_numpy()[::-1]]),
            mode="lines",
            fill="toself",
            fillcolor=transparent(color, 0.18),
            line={"width": 0},
            hoverinfo="skip",
        ),
        go.Scatter(
            **(common | {"showlegend": is_first}),
            y=part[measure].to_numpy(),
            mode="lines+markers",
            name=escaped(language),
            line={"color": color},
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)]},
            customdata=part[details].to_numpy(),
            hovertemplate=hover,
        ),
    ]


def score_curves(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Correlation over languages of divergence and score, by layer, with its interval.

    Args:
        table: of `language_scores`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    parameters = table.context.parameters
    figure = go.Figure(
        go.Scatter(
            x=frame["layer"],
            y=frame["pearson"],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": frame["high"] - frame["pearson"],
                "arrayminus": frame["pearson"] - frame["low"],
                "color": transparent(LINE_COLORS[0], 0.5),
            },
            mode="lines+markers",
            line={"color": LINE_COLORS[0]},
            customdata=frame[["low", "high", "spearman", "p", "p_max"]].to_numpy(),
            hovertemplate="layer %{x}: Pearson %{y:.2f} [%{customdata[0]:.2f}, "
            "%{customdata[1]:.2f}]<br>Spearman %{customdata[2]:.2f}<br>p %{customdata[3]:.3f}, "
            "after the search over layers %{customdata[4]:.3f}<extra></extra>",
        )
    )
    number = counted(int(frame["num_languages"].max()), "language")
    title = f"Divergence from {parameters['pivot']} against {parameters['score']} ({number})"
    dress(figure, table, title, height=110 + PANEL_HEIGHT)
    figure.add_hline(y=0, line={"color": NEUTRAL, "dash": "dash"})
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="correlation over languages", range=[-1.05, 1.05])
    return figure
