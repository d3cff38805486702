"""Figures of a run against another one: saturation by layer, drift of the experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.figures.style import (
    DIVERGING,
    LINE_COLORS,
    NEUTRAL,
    SYMBOLS,
    blank_figure,
    grid_height,
    layer_by_expert,
    legend_above,
    map_axes,
    only_kind,
    transparent,
)

MOST_ROWS = 30

# Measure, ends of its interval, its chance, words.
_CURVES = (
    ("saturation", ("low", "high"), "chance", "experts kept (95 % interval)"),
    (
        "top1_match",
        ("top1_low", "top1_high"),
        "top1_chance",
        "first expert the same (95 % interval)",
    ),
    ("identical", None, None, "all experts the same"),
)


def saturation_curves(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Shares of kept experts by layer, with 95 % intervals, chance dashed.

    Args:
        table: of `router_saturation`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind).sort_values("layer")
    figure = blank_figure(table, table.title, height=460)
    layers = frame["layer"].to_numpy()
    for index, (name, ends, chance, words) in enumerate(_CURVES):
        if frame[name].isna().all():
            continue
        color = LINE_COLORS[index]
        if ends is not None:
            figure.add_trace(_band(frame, ends, color, words))
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=frame[name].to_numpy(),
                mode="lines+markers",
                name=words,
                legendgroup=words,
                line={"color": color},
                marker={"symbol": SYMBOLS[index]},
                hovertemplate="layer %{x}: %{y:.4f}",
            )
        )
        if chance is not None:
            figure.add_trace(
                _chance(frame, chance, "dash", color, f"{words.partition(' (')[0]}, chance")
            )
    figure.add_trace(
        _chance(frame, "chance_by_load", "dot", LINE_COLORS[0], "experts kept, chance by load")
    )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="share of experts, or of tokens", range=[0, 1.02])
    _legend_below(figure)
    return figure


def _band(frame: pd.DataFrame, ends: tuple[str, str], color: str, words: str) -> go.Scatter:
    """The interval as an area; there and back along the layers."""
    known = frame[frame[list(ends)].notna().all(axis=1)]
    layers = known["layer"].to_numpy()
    low, high = (known[name].to_numpy() for name in ends)
    return go.Scatter(
        x=np.concatenate([layers, layers[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        mode="lines",
        fill="toself",
        fillcolor=transparent(color, 0.25),
        line={"width": 0},
        legendgroup=words,
        showlegend=False,
        hoverinfo="skip",
    )


def _chance(frame: pd.DataFrame, name: str, dash: str, color: str, words: str) -> go.Scatter:
    return go.Scatter(
        x=frame["layer"].to_numpy(),
        y=frame[name].to_numpy(),
        mode="lines",
        name=words,
        line={"color": color, "dash": dash, "width": 1.5},
        hovertemplate="%{y:.4f}",
    )


def _legend_below(figure: go.Figure) -> None:
    """Below the plot: the entries take as many rows as a narrow window needs."""
    legend = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    figure.update_layout(legend=legend)


def drift_map(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Layers x experts of the shift; experts that moved are marked.

    Args:
        table: of `expert_drift`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    grid, layers, experts = layer_by_expert(frame, "shift")
    figure = blank_figure(table, table.title, height=grid_height(len(layers)))
    largest = float(np.nanmax(np.abs(grid), initial=0)) or 1.0
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=experts,
            y=layers,
            zmin=-largest,
            zmax=largest,
            colorscale=DIVERGING,
            colorbar={"title": {"text": "shift of<br>token share"}},
            hovertemplate="layer %{y}, expert %{x}<br>shift %{z:+.4f}<extra></extra>",
        )
    )
    moved = frame[frame["moved"]]
    if len(moved):
        figure.add_trace(
            go.Scatter(
                x=moved["expert"].to_numpy(),
                y=moved["layer"].to_numpy(),
                mode="markers",
                name=f"moved ({len(moved)})",
                # White with a black edge shows on every cell and on every page.
                marker={
                    "symbol": "diamond",
                    "size": 6,
                    "color": "#FFFFFF",
                    "line": {"width": 1, "color": "#000000"},
                },
                showlegend=True,
                hoverinfo="skip",
            )
        )
        legend_above(figure)
    map_axes(figure, layers)
    return figure


def drift_forest(
    table: AnalysisTable, *, most: int = MOST_ROWS, kind: str | None = None
) -> go.Figure:
    """Shifts with intervals of the experts that moved most, or of the largest shifts if none did.

    Args:
        table: of `expert_drift`.
        most: the most rows shown; the largest shifts come first.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    moved = frame[frame["moved"]]
    shown = (moved if len(moved) else frame)[:most]
    figure = blank_figure(
        table, _forest_title(table, len(moved), len(shown)), height=grid_height(len(shown) + 2)
    )
    names = zip(shown["layer"].tolist(), shown["expert"].tolist(), strict=True)
    shift, low, high = (shown[name].to_numpy() for name in ("shift", "low", "high"))
    figure.add_trace(
        go.Scatter(
            x=shift,
            y=[f"L{layer} E{expert}" for layer, expert in names],
            mode="markers",
            name="shift, 95 % interval",
            marker={"color": LINE_COLORS[0], "size": 9},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": high - shift,
                "arrayminus": shift - low,
                "color": LINE_COLORS[0],
            },
            customdata=shown[
                ["low", "high", "p", "kept", "token_share_against", "token_share"]
            ].to_numpy(),
            hovertemplate="%{y}: %{x:+.4f} (%{customdata[0]:+.4f} to %{customdata[1]:+.4f})<br>"
            "from %{customdata[4]:.4f} to %{customdata[5]:.4f} of the tokens<br>"
            "%{customdata[3]:.4f} of its tokens keep it, adjusted p %{customdata[2]:.3g}"
            "<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1})
    figure.update_xaxes(title_text="shift of token share, 95 % interval")
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def _forest_title(table: AnalysisTable, num_moved: int, num_shown: int) -> str:
    if not num_moved:
        return f"{table.title}: none moved surely; the {num_shown} largest shifts"
    if num_shown < num_moved:
        return f"{table.title}: the {num_shown} largest shifts of {num_moved} experts that moved"
    return f"{table.title}: {num_moved} experts moved"
