"""Figures of specialization."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.style import (
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


def _chance_text(frame: pd.DataFrame, chance: str | None) -> str:
    """The chance level for the color bar, where all rows share one."""
    levels = [] if chance is None else frame[chance].unique().tolist()
    return f"<br>(chance {levels[0]:.3g})" if len(levels) == 1 else ""
