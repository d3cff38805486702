"""Figures of a contrast: where the experts lie, and how sure the confirmed ones are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.probe.analysis.contrasts.methods import METHODS
from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.figures.style import (
    DIVERGING,
    LINE_COLORS,
    NEUTRAL,
    SEQUENTIAL,
    amount_range,
    blank_figure,
    grid_height,
    layer_by_expert,
    legend_above,
    map_axes,
    only_kind,
)

MOST_ROWS = 30

# What the numbers are: of the score, and of the effect where that is another.
_WORDS = {
    "risk_difference": ("share of tokens<br>in a minus in b",),
    "paired": ("share of tokens<br>in a minus in b",),
    "log_odds": ("log odds ratio<br>(nats)",),
    "ftri": ("share of tokens<br>in a minus others",),
    "npmi": ("normalized PMI<br>with the markers",),
    "safex": ("share of resamples", "share of tokens"),
    "esft_token": ("share of slots",),
    "esft_gate": ("routing weight<br>a token",),
    "seuf": ("routing weight<br>a token",),
}
_MEASURES = {"weights": "routing weight", "scores": "router score"}


def _words(table: AnalysisTable) -> tuple[str, str]:
    """What score and effect count."""
    parameters = table.context.parameters
    method = str(parameters["method"])
    words = _WORDS[method]
    score, effect = words[0], words[-1]
    if parameters["measure"] in _MEASURES and METHODS[method].groups == "two":
        named = _MEASURES[str(parameters["measure"])]
        score = effect = score.replace("share of tokens", named)
    if parameters["average"] == "sum":
        score = effect = "activations a prompt<br>in a minus others"
    if method == "safex" and parameters["b"] is not None:
        effect += " in a minus in b"
    return score, effect


def contrast_map(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """Layers x experts of the score; confirmed experts are marked.

    Args:
        table: of `expert_contrast`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    grid, layers, experts = layer_by_expert(frame, "score")
    figure = blank_figure(table, table.title, height=grid_height(len(layers)))
    words, _ = _words(table)
    largest = float(np.nanmax(np.abs(grid), initial=0)) or 1.0
    compares = METHODS[str(table.context.parameters["method"])].signed
    colors = {"zmin": -largest, "zmax": largest} if compares else amount_range(grid)
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=experts,
            y=layers,
            **colors,
            colorscale=DIVERGING if compares else SEQUENTIAL,
            colorbar={"title": {"text": words}},
            hovertemplate="layer %{y}, expert %{x}<br>"
            + words.replace("<br>", " ")
            + ": %{z:+.4f}<extra></extra>",
        )
    )
    confirmed = frame[frame["confirmed"]]
    if len(confirmed):
        figure.add_trace(
            go.Scatter(
                x=confirmed["expert"].to_numpy(),
                y=confirmed["layer"].to_numpy(),
                mode="markers",
                name=f"confirmed ({len(confirmed)})",
                # White with a black edge shows on every cell and on every page.
                marker={
                    "symbol": "star",
                    "size": 12,
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


def contrast_forest(
    table: AnalysisTable, *, most: int = MOST_ROWS, kind: str | None = None
) -> go.Figure:
    """Effects with intervals of the confirmed experts, or of the candidates if none is confirmed.

    Args:
        table: of `expert_contrast`.
        most: the most rows shown; the strongest effects come first.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    confirmed = frame[frame["confirmed"]]
    shown = confirmed if len(confirmed) else frame[frame["candidate"]]
    shown = shown.iloc[np.argsort(-shown["effect"].abs().to_numpy(), kind="stable")[:most]]
    score, words = _words(table)
    tested = bool(shown["p"].notna().any())
    split = bool(table.context.parameters["split"]) and tested
    figure = blank_figure(
        table, _forest_title(table, len(confirmed), len(shown)), height=grid_height(len(shown) + 2)
    )
    labels = [f"L{layer} E{expert}" for layer, expert in _names(shown)]
    effect, low, high = (shown[name].to_numpy() for name in ("effect", "low", "high"))
    if split and score == words:
        figure.add_trace(
            go.Scatter(
                x=shown["score"].to_numpy(),
                y=labels,
                mode="markers",
                name="discovery half",
                marker={"symbol": "line-ns-open", "color": NEUTRAL, "size": 11},
                hovertemplate="%{y}: %{x:+.4f}<extra>discovery half</extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=effect,
            y=labels,
            mode="markers",
            name=_legend(split=split, tested=tested),
            marker={"color": LINE_COLORS[0], "size": 9},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": high - effect,
                "arrayminus": effect - low,
                "color": LINE_COLORS[0],
            },
            customdata=shown[["low", "high", "p", "q"]].to_numpy(),
            hovertemplate="%{y}: %{x:+.4f} (%{customdata[0]:+.4f} to %{customdata[1]:+.4f})<br>"
            "p %{customdata[2]:.3g}, q %{customdata[3]:.3g}<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1})
    figure.update_xaxes(title_text=words.replace("<br>", " "))
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    legend_above(figure)
    return figure


def _legend(*, split: bool, tested: bool) -> str:
    if split:
        return "confirmation half, 95 % interval"
    return "all units, 95 % (optimistic)" if tested else "all units, 95 % interval"


def _names(frame: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(frame["layer"].tolist(), frame["expert"].tolist(), strict=True))


def _forest_title(table: AnalysisTable, num_confirmed: int, num_shown: int) -> str:
    if not num_confirmed:
        return f"{table.title}: none confirmed; the {num_shown} strongest candidates"
    if num_shown < num_confirmed:
        return f"{table.title}: the {num_shown} strongest of {num_confirmed} confirmed"
    return f"{table.title}: {num_confirmed} confirmed"
