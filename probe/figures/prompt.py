"""Figures of one prompt: its tokens at all layers, and one token in detail."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.figures.style import (
    SEQUENTIAL,
    amount_range,
    blank_figure,
    escaped,
    grid_height,
    only_kind,
)

# Beyond so many tokens, ids in cells cannot be read, and not every token gets a label.
MOST_LABELED_TOKENS = 60

_COLORS = {
    "top_weight": "weight of<br>rank 0",
    "weight_sum": "sum of<br>weights",
    "weight_entropy": "entropy of<br>weights / ln K",
}


def prompt_heatmap(
    table: AnalysisTable, *, color: str = "top_weight", kind: str | None = None
) -> go.Figure:
    """Tokens x layers: color is a column, the number in a cell is the expert of rank 0.

    An invisible layer of points lies over the cells, because maps do not report clicks: each
    point's `customdata` is (position, layer).

    Args:
        table: of `prompt_routing`.
        color: `top_weight`, `weight_sum` or `weight_entropy`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    positions = np.sort(frame["position"].unique())
    layers = np.sort(frame["layer"].unique())
    columns = np.searchsorted(positions, frame["position"].to_numpy())
    rows = np.searchsorted(layers, frame["layer"].to_numpy())
    grid = np.full((len(layers), len(positions)), np.nan, dtype=np.float32)
    grid[rows, columns] = frame[color].to_numpy(dtype=np.float32)
    labels = np.full(grid.shape, "", dtype=object)
    labels[rows, columns] = frame["top_expert"].astype("str").fillna("").to_numpy()
    figure = blank_figure(table, table.title, height=grid_height(len(layers)) + 60)
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=np.arange(len(positions)),
            y=np.arange(len(layers)),
            **amount_range(grid),
            text=labels,
            texttemplate="%{text}" if len(positions) <= MOST_LABELED_TOKENS else "",
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": _COLORS[color]}},
            hoverinfo="skip",
            xgap=1,
            ygap=1,
        )
    )
    figure.add_trace(_click_layer(frame, columns, rows))
    tokens = frame.drop_duplicates("position").sort_values("position").to_dict("records")
    step = -(-len(positions) // MOST_LABELED_TOKENS)
    figure.update_xaxes(
        title_text="token (template and special tokens in italics)",
        tickmode="array",
        tickvals=np.arange(0, len(positions), step),
        ticktext=[_token_label(row) for row in tokens[::step]],
        tickangle=-60,
        showgrid=False,
        zeroline=False,
        range=[-0.5, len(positions) - 0.5],
    )
    figure.update_yaxes(
        title_text="layer",
        tickmode="array",
        tickvals=np.arange(len(layers)),
        ticktext=[str(layer) for layer in layers],
        showgrid=False,
        zeroline=False,
        range=[-0.5, len(layers) - 0.5],
    )
    return figure


def token_bars(table: AnalysisTable, *, kind: str | None = None) -> go.Figure:
    """The experts of one token by layer: length of a bar is the routing weight.

    Args:
        table: of `token_routing`.
        kind: which kind of router; the first there is by default.
    """
    frame = only_kind(table.frame, kind)
    layers = sorted(frame["layer"].unique())
    figure = blank_figure(table, table.title, height=grid_height(len(layers)) + 40)
    order = frame.groupby("layer").cumcount()
    for place, part in frame.groupby(order):
        figure.add_trace(
            go.Bar(
                x=part["weight"].to_numpy(),
                y=part["layer"].astype("str").to_numpy(dtype=object),
                orientation="h",
                name=f"rank {place}",
                text=[str(expert) for expert in part["expert"]],
                textposition="inside",
                insidetextanchor="middle",
                marker={
                    "color": np.full(len(part), float(place)),
                    "cmin": 0,
                    "cmax": max(float(order.max()), 1.0),
                    "colorscale": SEQUENTIAL,
                },
                customdata=part[["expert", "weight_share"]].to_numpy(),
                hovertemplate="layer %{y}, expert %{customdata[0]:.0f}<br>weight %{x:.4f}, "
                "%{customdata[1]:.1%} of the token's weight<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack", showlegend=False)
    figure.update_xaxes(title_text="routing weight (number in a bar: expert)")
    figure.update_yaxes(
        title_text="layer",
        type="category",
        categoryorder="array",
        categoryarray=[str(layer) for layer in layers],
        showgrid=False,
    )
    return figure


def _click_layer(
    frame: pd.DataFrame, columns: np.ndarray[tuple[int], np.dtype[np.int64]], rows: object
) -> go.Scattergl:
    """Invisible points over the cells, which carry hover text and answer clicks."""
    names = ["token", "position", "layer", "experts", "top_weight", "weight_sum"]
    details = [
        f"{escaped(repr(row['token']))} at {row['position']}, layer {row['layer']}<br>"
        f"experts {', '.join(str(expert) for expert in row['experts'])}<br>"
        f"rank 0 weighs {row['top_weight']:.4f} of {row['weight_sum']:.4f}"
        for row in frame[names].to_dict("records")
    ]
    return go.Scattergl(
        x=columns,
        y=rows,
        mode="markers",
        marker={"symbol": "square", "size": 18, "opacity": 0},
        customdata=frame[["position", "layer"]].to_numpy(dtype=np.int64),
        text=details,
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _token_label(row: dict[object, object]) -> str:
    """A token for an axis: blanks made visible, markup escaped, template in italics."""
    text = escaped(str(row["token"]).replace("\n", "⏎").replace(" ", "␣"))
    return f"<i>{text}</i>" if row["is_special"] or row["segment"] == "template" else text
