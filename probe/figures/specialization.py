"""Figures of specialization."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.style import (
    CATEGORY_COLORS,
    SEQUENTIAL,
    amount_range,
    blank_figure,
    counted,
    escaped,
    grid_height,
    layer_by_expert,
    map_axes,
    only_kind,
    only_value,
)

_MEASURES = {
    "token_share": ("Share of tokens that use each expert", "chance", "share<br>of tokens"),
    "composition": ("Where each expert's use comes from", "composition_chance", "share<br>of use"),
    "lift": ("Use relative to the other values", None, "ratio"),
}


def specialization_by_value(
    table: AnalysisTable, *, layer: int, measure: str = "token_share", kind: str | None = None
) -> go.Figure:
    """Field values x experts of one layer.

    Args:
        table: of `expert_specialization`.
        layer: the decoder layer.
        measure: `token_share`, `composition` or `lift`.
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: when the table has no such layer.
    """
    frame = only_kind(table.frame, kind)
    layers = sorted(frame["layer"].unique())
    if layer not in layers:
        known = ", ".join(str(known) for known in layers)
        raise AnalysisInputError(f"the table has no layer {layer}; it has {known}")
    frame = frame[frame["layer"] == layer]
    values = list(dict.fromkeys(frame["value"]))
    grid = np.stack(
        [frame.loc[frame["value"] == value, measure].to_numpy(dtype=np.float32) for value in values]
    )
    first = frame.drop_duplicates("value")[["value", "num_prompts", "num_tokens"]]
    labels = [
        f"{escaped(row['value'])} ({counted(row['num_prompts'], 'prompt')}, "
        f"{counted(row['num_tokens'], 'token')})"
        for row in first.to_dict("records")
    ]
    title, chance, unit = _MEASURES[measure]
    figure = blank_figure(
        table,
        f"{title}, by {table.context.parameters['by']}, layer {layer}",
        height=grid_height(max(len(values), 8)),
    )
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=np.arange(grid.shape[1]),
            y=labels,
            **amount_range(grid),
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": unit + _chance_text(frame, chance)}},
            hovertemplate="%{y}<br>expert %{x}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="expert", showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, autorange="reversed", automargin=True)
    return figure


def specialization_map(
    table: AnalysisTable, *, value: str, measure: str = "token_share", kind: str | None = None
) -> go.Figure:
    """Layers x experts for one field value; arguments as in `specialization_by_value`."""
    frame = only_kind(only_value(table, table.frame, value), kind)
    grid, layers, experts = layer_by_expert(frame, measure)
    title, chance, unit = _MEASURES[measure]
    figure = blank_figure(
        table,
        f"{title}: {table.context.parameters['by']} {value}",
        height=grid_height(len(layers)),
    )
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=experts,
            y=layers,
            **amount_range(grid),
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": unit + _chance_text(frame, chance)}},
            hovertemplate="layer %{y}, expert %{x}: %{z:.4f}<extra></extra>",
        )
    )
    map_axes(figure, layers)
    return figure


def specialization_leaders(
    table: AnalysisTable, *, least: float | None = None, kind: str | None = None
) -> go.Figure:
    """Layers x experts, each expert in the color of the value with most of its use.

    Args:
        table: of `expert_specialization`.
        least: composition from which an expert is colored; twice chance by default. Experts below
            it stay empty.
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: when there are more values than colors that can be told apart.
    """
    frame = only_kind(table.frame, kind)
    values = list(dict.fromkeys(frame["value"]))
    by = table.context.parameters["by"]
    if len(values) > len(CATEGORY_COLORS):
        raise AnalysisInputError(
            f"{by} has {len(values)} values, and at most {len(CATEGORY_COLORS)} colors can be told "
            "apart; keep fewer values with a filter"
        )
    chance = float(frame["composition_chance"].iloc[0])
    least = min(2 * chance, 0.99) if least is None else least
    grids = [layer_by_expert(frame[frame["value"] == value], "composition") for value in values]
    _, layers, experts = grids[0]
    share = np.nan_to_num(np.stack([grid for grid, *_ in grids]))
    leader, most = share.argmax(axis=0), share.max(axis=0)
    is_led = most >= least
    figure = blank_figure(
        table,
        f"What experts specialize in, by {by} "
        f"(colored from {least:.0%} of an expert's use on; chance {chance:.1%})",
        height=grid_height(len(layers)) + 60,
    )
    words = [escaped(str(value)) for value in values]
    figure.add_trace(
        go.Heatmap(
            z=np.where(is_led, leader, np.nan),
            text=[
                [f"{words[i]}: {part:.0%} of its use" for i, part in zip(*row, strict=True)]
                for row in zip(leader, most, strict=True)
            ],
            x=experts,
            y=layers,
            zmin=-0.5,
            zmax=len(values) - 0.5,
            colorscale=_steps(CATEGORY_COLORS[: len(values)]),
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate="layer %{y}, expert %{x}<br>%{text}<extra></extra>",
        )
    )
    for index, (word, color) in enumerate(zip(words, CATEGORY_COLORS, strict=False)):
        count = counted(int((is_led & (leader == index)).sum()), "expert")
        marker = {"color": color, "symbol": "square", "size": 12}
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=f"{word} ({count})")
        )
    map_axes(figure, layers)
    # Below: it takes as many rows as a narrow window needs, and they must not cover the map.
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"})
    return figure


def _steps(colors: Sequence[str]) -> list[list[float | str]]:
    """A color scale of equal steps without transitions."""
    edges = np.linspace(0.0, 1.0, len(colors) + 1)
    return [
        [float(edge), color]
        for color, *ends in zip(colors, edges[:-1], edges[1:], strict=True)
        for edge in ends
    ]


def _chance_text(frame: pd.DataFrame, chance: str | None) -> str:
    """The chance level for the color bar, where all rows share one."""
    levels = [] if chance is None else frame[chance].unique().tolist()
    return f"<br>(chance {levels[0]:.3g})" if len(levels) == 1 else ""
