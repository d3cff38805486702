"""Figures of what parts cause: effects of experts as a map, effects with intervals as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.probe.figures.heading import set_heading
from moescope.probe.figures.style import (
    DIVERGING,
    GRID,
    LINE_COLORS,
    escaped,
    grid_height,
    layer_by_expert,
    map_axes,
)

_MOST_WITH_GAPS: Final = 64
_BAR_HEIGHT: Final = 16
_BESIDE_BARS: Final = 130  # axis, its title and the legend


def swap_figures(frame: pd.DataFrame, title: str, about: str, unit: str) -> list[go.Figure]:
    """A map per kind of router where single experts were exchanged, else bars by layer.

    Args:
        frame: of `moescope.steering.causes.swaps.SwapScan.frame`.
        title: what is shown.
        about: of which models and prompts.
        unit: of the effects.
    """
    kinds = list(dict.fromkeys(frame["kind"]))
    if frame["expert"].notna().all():
        return [
            effect_map(
                frame[frame["kind"] == kind],
                title,
                about if len(kinds) == 1 else f"{about} · {kind} routers",
                unit,
            )
            for kind in kinds
        ]
    several = len(kinds) > 1
    labels = [
        ("all layers" if pd.isna(layer) else f"layer {layer}") + (f" {kind}" if several else "")
        for layer, kind in zip(frame["layer"], frame["kind"], strict=True)
    ]
    return [effect_bars(frame, labels, title, about, unit, by="what")]


def path_figure(frame: pd.DataFrame, title: str, about: str, unit: str) -> go.Figure:
    """Bars of each expert, one per path.

    Args:
        frame: of `moescope.steering.causes.paths.PathEffects.frame`.
        title: what is shown.
        about: of which model and prompts.
        unit: of the effects.
    """
    several = frame["kind"].nunique() > 1
    labels = [
        f"{layer}:{kind}:{expert}" if several else f"{layer}:{expert}"
        for layer, kind, expert in zip(frame["layer"], frame["kind"], frame["expert"], strict=True)
    ]
    return effect_bars(frame, labels, title, about, unit, by="path")


def effect_map(frame: pd.DataFrame, title: str, about: str, unit: str) -> go.Figure:
    """Layers x experts of the effects of single experts; white is no effect.

    Args:
        frame: one row per expert of one kind of router: `layer`, `expert`, `effect`, `low`,
            `high`; with `same_weights`, experts that are the same in both models say so.
        title: what is shown.
        about: of which models and prompts.
        unit: of the effects.
    """
    grid, layers, experts = layer_by_expert(frame, "effect")
    largest = float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    words = np.full(grid.shape, "", dtype=object)
    rows = np.searchsorted(layers, frame["layer"].to_numpy(dtype=np.int64))
    words[rows, frame["expert"].to_numpy(dtype=np.int64)] = [
        _in_words(row) for row in frame.to_dict("records")
    ]
    gap = 1 if len(experts) <= _MOST_WITH_GAPS else 0
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            x=experts,
            y=layers,
            customdata=words,
            zmin=-largest,
            zmax=largest,
            colorscale=DIVERGING,
            xgap=gap,
            ygap=gap,
            colorbar={"title": {"text": f"effect<br>({escaped(unit)})"}},
            hovertemplate="layer %{y}, expert %{x}<br>%{customdata}<extra></extra>",
        )
    )
    set_heading(figure, title, about, plot_height=min(grid_height(len(layers)), 760))
    map_axes(figure, layers)
    return figure


def effect_bars(
    frame: pd.DataFrame, labels: Sequence[str], title: str, about: str, unit: str, *, by: str
) -> go.Figure:
    """Effects with 95 % intervals as bars, the first row on top.

    Args:
        frame: `effect`, `low`, `high`, `n` and the column `by`.
        labels: of each row, what it is about; rows of one label stand together.
        title: what is shown.
        about: of which models and prompts.
        unit: of the effects.
        by: the column whose values get a color each.
    """
    places = list(dict.fromkeys(labels))
    groups = list(dict.fromkeys(frame[by].astype(str)))
    figure = go.Figure()
    for number, group in enumerate(groups):
        is_own = (frame[by].astype(str) == group).to_numpy()
        own = frame[is_own]
        effect = own["effect"].to_numpy()
        figure.add_trace(
            go.Bar(
                x=effect,
                y=[label for label, keep in zip(labels, is_own, strict=True) if keep],
                orientation="h",
                name=escaped(group),
                marker={"color": LINE_COLORS[number % len(LINE_COLORS)]},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": own["high"].to_numpy() - effect,
                    "arrayminus": effect - own["low"].to_numpy(),
                    "thickness": 1.5,
                    "color": "rgb(128,128,128)",
                },
                customdata=own[["low", "high", "n"]].to_numpy(),
                hovertemplate="%{y}: %{x:+.4g} (%{customdata[0]:+.4g} to %{customdata[1]:+.4g}), "
                "n = %{customdata[2]}",
            )
        )
    height = _BESIDE_BARS + _BAR_HEIGHT * len(places) * (len(groups) + 1)
    set_heading(figure, title, about, plot_height=height)
    figure.update_layout(barmode="group", margin={"l": 90}, showlegend=True)
    figure.update_xaxes(
        title_text=f"effect ({escaped(unit)}), 95 % interval", zeroline=True, gridcolor=GRID
    )
    figure.update_yaxes(
        autorange="reversed", type="category", categoryorder="array", categoryarray=places,
        tickmode="array", tickvals=places, ticktext=[escaped(place) for place in places],
    )  # fmt: skip
    return figure


def _in_words(row: Mapping[Any, Any]) -> str:
    """An effect with its interval, or that there is nothing to exchange."""
    if row.get("same_weights"):
        return "the same weights in both models"
    return f"{row['effect']:+.4g} ({row['low']:+.4g} to {row['high']:+.4g})"
