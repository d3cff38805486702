"""Figures of transitions between layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.coactivation import amounts, log_lift, one_layer, square
from moescope.probe.figures.style import (
    LINE_COLORS,
    NEUTRAL,
    blank_figure,
    dress,
    legend_above,
    only_kind,
    transparent,
)

_MEASURES = {
    "share": ("Which expert follows which", "share<br>of slots"),
    "hit_rate": ("Which expert follows which", "share of<br>tokens"),
    "lift": ("Which expert follows which, relative to chance", "lift<br>(chance 1)"),
}
# Name, chance, prefix of the interval's ends, axis title.
_PANELS = (
    ("best_successor_share", "base_rate", None, "share of tokens<br>with best successor"),
    ("gain", "gain_chance", "gain", "gain over<br>best guess"),
    ("information_share", None, "information_share", "information<br>(share of H)"),
)

# Hit rates from which paths have the next color and width.
_STEPS = (0.25, 0.5, 0.75)


def transition_heatmap(
    table: AnalysisTable, *, layer: int, measure: str = "hit_rate", kind: str | None = None
) -> go.Figure:
    """Experts x successors of one pair of layers.

    Args:
        table: of `expert_transitions`.
        layer: the first decoder layer of the pair.
        measure: `hit_rate`, `share` or `lift` (on a logarithmic scale).
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: when no transition of the table starts in that layer, or for an unknown
            measure.
    """
    if measure not in _MEASURES:
        raise AnalysisInputError(f"measure is {measure!r}; it is one of {', '.join(_MEASURES)}")
    frame = one_layer(only_kind(table.frame, kind), layer)
    following = int(frame["next_layer"].iloc[0])
    grid = square(frame, measure, "expert", "successor")
    words, unit = _MEASURES[measure]
    slots = "top-1 experts" if table.context.parameters["slots"] == "top1" else "all slots"
    title = f"{words}, layer {layer} to {following} ({slots})"
    figure = blank_figure(table, title, height=640)
    figure.add_trace(
        go.Heatmap(
            **(log_lift(grid) if measure == "lift" else amounts(grid)),
            x=np.arange(grid.shape[1]),
            y=np.arange(grid.shape[0]),
            customdata=grid,
            hovertemplate=f"layer {layer}, expert %{{y}} to layer {following}, expert %{{x}}: "
            + f"{measure} %{{customdata:.4g}}<extra></extra>",
        )
    )
    figure.data[0].colorbar.title = {"text": unit}
    axis = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(title_text=f"expert of layer {following}", **axis)
    figure.update_yaxes(title_text=f"expert of layer {layer}", autorange="reversed", **axis)
    return figure


def transition_strength_curves(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Best successor, gain and information by layer, chance dashed, intervals as bands.

    Args:
        table: of `transition_strength`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    figure = make_subplots(rows=len(_PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, (name, chance, prefix, label) in enumerate(_PANELS, start=1):
        for trace in _curves(frame, name, chance, prefix, is_first=row == 1):
            figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(title_text=label, rangemode="tozero", row=row, col=1)
    dress(figure, table, table.title, height=680)
    distance = table.context.parameters["distance"]
    end = "the next routed layer" if distance == 1 else f"the routed layer {distance} further"
    if len(frame) <= 32:
        figure.update_xaxes(tickmode="array", tickvals=frame["layer"].to_numpy())
    figure.update_xaxes(title_text=f"layer (its experts predict {end})", row=len(_PANELS), col=1)
    legend_above(figure)
    return figure


def transition_paths(
    table: AnalysisTable, *, strongest: int = 5, kind: str | None = None
) -> go.Figure:
    """The most frequent transitions of every pair of layers, drawn from expert to expert.

    Args:
        table: of `expert_transitions`.
        strongest: how many transitions of each pair of layers; the lowest ids of equals.
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: for a number below 1.
    """
    if strongest < 1:
        raise AnalysisInputError(f"strongest is {strongest}; it is 1 or more")
    frame = only_kind(table.frame, kind)
    frame = frame[frame["num_pairs"] > 0].sort_values("num_pairs", ascending=False, kind="stable")
    frame = frame.groupby("layer").head(strongest)
    figure = blank_figure(
        table, f"The {strongest} most frequent transitions of each layer", height=620
    )
    step = np.digitize(frame["hit_rate"].to_numpy(), _STEPS)
    for index, color in enumerate(LINE_COLORS[: len(_STEPS) + 1]):
        words = (
            f"from {_STEPS[index - 1]:.0%} of its tokens" if index else f"less than {_STEPS[0]:.0%}"
        )
        figure.add_trace(
            go.Scatter(
                **_segments(frame[step == index]),
                mode="lines+markers",
                name=words,
                line={"color": color, "width": 1 + 1.5 * index},
                marker={"color": color, "size": 5},
                hovertemplate="%{text}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="expert", autorange="reversed")
    legend_above(figure)
    return figure


def _segments(links: pd.DataFrame) -> dict[str, Any]:
    """A line for each row from its expert to the successor, a gap after each."""
    x, y = (
        np.column_stack([links[first], links[second], np.full(len(links), np.nan)]).ravel()
        for first, second in (("layer", "next_layer"), ("expert", "successor"))
    )
    text = [
        f"L{row['layer']} E{row['expert']} to L{row['next_layer']} E{row['successor']}: "
        f"{row['hit_rate']:.1%} of its tokens (chance {row['hit_base_rate']:.1%}), "
        f"{row['num_pairs']:,} pairs"
        for row in links.to_dict("records")
    ]
    return {"x": x, "y": y, "text": np.repeat(np.asarray(text, dtype=object), 3)}


def _curves(
    frame: pd.DataFrame, name: str, chance: str | None, prefix: str | None, *, is_first: bool
) -> list[go.Scatter]:
    """One measure by layer with its interval, and its chance level."""
    layers = frame["layer"].to_numpy()
    expected = np.zeros(len(frame)) if chance is None else frame[chance].to_numpy()
    hover = "layer %{x} to %{customdata}: %{y:.4g}<extra></extra>"
    shared: dict[str, Any] = {"x": layers, "showlegend": is_first}
    traces = []
    if prefix is not None:
        known = frame[frame[f"{prefix}_low"].notna()]
        ends = (known[f"{prefix}_high"].to_numpy(), known[f"{prefix}_low"].to_numpy()[::-1])
        traces.append(
            go.Scatter(
                x=np.concatenate([known["layer"].to_numpy(), known["layer"].to_numpy()[::-1]]),
                y=np.concatenate(ends),
                fill="toself",
                fillcolor=transparent(LINE_COLORS[0], 0.25),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
            )
        )
    return [
        *traces,
        go.Scatter(
            **shared,
            y=frame[name].to_numpy(),
            customdata=frame["next_layer"].to_numpy(),
            mode="lines+markers",
            name="observed",
            line={"color": LINE_COLORS[0]},
            hovertemplate=hover,
        ),
        go.Scatter(
            **shared,
            y=expected,
            mode="lines",
            name="chance (first panel: the busiest expert)",
            line={"color": NEUTRAL, "dash": "dash"},
            hovertemplate="chance: %{y:.4g}<extra></extra>",
        ),
    ]
