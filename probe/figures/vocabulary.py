"""Figures of vocabulary: specialization by layer, and the words of one expert."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.information import curve_axes
from moescope.probe.figures.style import (
    LEAST_HEIGHT,
    LINE_COLORS,
    NEUTRAL,
    ROW_HEIGHT,
    SYMBOLS,
    blank_figure,
    escaped,
    only_kind,
    transparent,
)

_LABELS = {"input": "token", "next": "next token", "predicted": "predicted token"}


def vocabulary_curves(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """The three readings of vocabulary specialization by layer, chance dashed.

    Args:
        table: of `vocabulary_specialization`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    parameters = table.context.parameters
    readings = (
        ("mean_all", "all ids alike"),
        ("mean_min_count", f"ids seen {parameters['min_count']} times or more"),
        ("weighted", "by frequency"),
    )
    slots = "of rank 1" if parameters["slots"] == "top1" else "of any rank"
    title = f"How far each {_LABELS[parameters['label']]} keeps to one expert ({slots})"
    figure = blank_figure(table, title, height=480)
    layers = frame["layer"].to_numpy()
    for index, (name, words) in enumerate(readings):
        color = LINE_COLORS[index]
        common = {"legendgroup": name, "x": layers}
        if f"{name}_low" in frame:
            figure.add_trace(
                go.Scatter(
                    legendgroup=name,
                    x=np.concatenate([layers, layers[::-1]]),
                    y=np.concatenate([frame[f"{name}_high"], frame[f"{name}_low"][::-1]]),
                    mode="lines",
                    fill="toself",
                    fillcolor=transparent(color, 0.18),
                    line={"width": 0},
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
        figure.add_trace(
            go.Scatter(
                **common,
                y=frame[name].to_numpy(),
                mode="lines+markers",
                name=words,
                line={"color": color},
                marker={"symbol": SYMBOLS[index]},
                hovertemplate="layer %{x}: %{y:.4f}",
            )
        )
        figure.add_trace(
            go.Scatter(
                **common,
                y=frame[f"{name}_chance"].to_numpy(),
                mode="lines",
                name=f"{words}, labels shuffled",
                line={"color": color, "dash": "dash", "width": 1},
                showlegend=False,
                hovertemplate="labels shuffled: %{y:.4f}",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            name="labels shuffled",
            line={"color": NEUTRAL, "dash": "dash"},
        )
    )
    curve_axes(figure, frame["layer"].unique())
    figure.update_yaxes(
        title_text="vocabulary specialization<br>(share of occurrences)", rangemode="tozero"
    )
    return figure


def expert_words(
    table: AnalysisTable, *, layer: int, expert: int, kind: str | None = None
) -> go.Figure:
    """The words of one expert: share of each id that uses it, with interval, chance dashed.

    Args:
        table: of `expert_tokens`.
        layer: the decoder layer.
        expert: the routed expert.
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: when the table has no word of this expert.
    """
    frame = only_kind(table.frame, kind)
    frame = frame[(frame["layer"] == layer) & (frame["expert"] == expert)]
    if frame.empty:
        raise AnalysisInputError(
            f"the table has no word of expert {expert} in layer {layer}; it has words of the "
            "experts that some frequent id uses more than other ids do"
        )
    label = _LABELS[table.context.parameters["label"]]
    rate = float(frame["expert_rate"].iloc[0])
    figure = blank_figure(
        table,
        f"Words of layer {layer}, expert {expert}: share of each {label} that uses it "
        f"(chance {rate:.1%})",
        height=max(LEAST_HEIGHT, 150 + ROW_HEIGHT * len(frame)),
    )
    places = np.arange(len(frame))
    share = frame["share"].to_numpy()
    figure.add_trace(
        go.Bar(
            x=share,
            y=places,
            orientation="h",
            marker={"color": LINE_COLORS[0]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": frame["high"].to_numpy() - share,
                "arrayminus": share - frame["low"].to_numpy(),
                "color": NEUTRAL,
            },
            customdata=frame[["num_slots", "count", "lift", "num_units", "token_id"]].to_numpy(),
            hovertemplate="id %{customdata[4]}: %{customdata[0]} of %{customdata[1]} occurrences"
            "<br>%{customdata[2]:.1f} times the rate of all tokens, %{customdata[3]} units"
            "<extra></extra>",
        )
    )
    words = [escaped(_shown(text)) for text in frame["token"]]
    figure.add_vline(x=rate, line={"color": NEUTRAL, "dash": "dash"})
    figure.update_xaxes(title_text="share of occurrences", range=[0, 1.02])
    figure.update_yaxes(
        tickmode="array", tickvals=places, ticktext=words, autorange="reversed", automargin=True,
        showgrid=False, zeroline=False,
    )  # fmt: skip
    return figure


def _shown(text: object, most: int = 24) -> str:
    """A token with its blanks visible, cut where it is long."""
    shown = str(text).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return shown if len(shown) <= most else shown[: most - 1] + "…"
