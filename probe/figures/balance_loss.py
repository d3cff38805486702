"""Figure of the load-balancing loss at its three levels."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.figures.style import (
    LINE_COLORS,
    NEUTRAL,
    SYMBOLS,
    dress,
    only_kind,
    only_value,
    transparent,
)

_LEVELS = (
    ("loss_sequence", "sequences"),
    ("loss_batch", "batches"),
    ("loss_corpus", "all tokens"),
)


def balance_loss_curves(
    table: AnalysisTable, *, value: str | None = None, kind: str | None = None
) -> go.Figure:
    """Loss of sequences, batches and corpus by layer; below, the gap with its interval.

    Args:
        table: of `balance_loss`.
        value: which value, where the table is split by a field.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(only_value(table, table.frame, value), kind)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for index, (name, label) in enumerate(_LEVELS):
        figure.add_trace(_line(frame, name, label, index), row=1, col=1)
    figure.add_trace(_dashed(frame, "loss_balanced", "all experts alike (K)"), row=1, col=1)
    for trace in _gap(frame):
        figure.add_trace(trace, row=2, col=1)
    if frame["gap_chance"].notna().any():
        chance = _dashed(frame, "gap_chance", "gap by chance", symbol="dot")
        figure.add_trace(chance, row=2, col=1)
    title = "Load-balancing loss by layer, and how much prompts specialize"
    dress(figure, table, title if value is None else f"{title}: {value}", height=560)
    figure.update_yaxes(title_text="loss", row=1, col=1)
    figure.update_yaxes(title_text="gap: sequences<br>minus all tokens", row=2, col=1)
    figure.update_yaxes(rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="layer", row=2, col=1)
    return figure


def _line(frame: pd.DataFrame, name: str, label: str, index: int) -> go.Scatter:
    return go.Scatter(
        x=frame["layer"].to_numpy(),
        y=frame[name].to_numpy(),
        mode="lines+markers",
        name=label,
        line={"color": LINE_COLORS[index]},
        marker={"symbol": SYMBOLS[index]},
        hovertemplate="layer %{x}: %{y:.4g}",
    )


def _dashed(frame: pd.DataFrame, name: str, label: str, symbol: str = "dash") -> go.Scatter:
    return go.Scatter(
        x=frame["layer"].to_numpy(),
        y=frame[name].to_numpy(),
        mode="lines",
        name=label,
        line={"color": NEUTRAL, "dash": symbol},
        hovertemplate="layer %{x}: %{y:.4g}",
    )


def _gap(frame: pd.DataFrame) -> tuple[go.Scatter, go.Scatter]:
    """The band of the interval, and the gap."""
    layers = frame["layer"].to_numpy()
    band = go.Scatter(
        x=[*layers, *layers[::-1]],
        y=[*frame["gap_high"], *frame["gap_low"][::-1]],
        fill="toself",
        fillcolor=transparent(LINE_COLORS[3], 0.2),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    return band, _line(frame, "gap", "gap, 95 % interval", 3)
