"""What all figures share: colors, subtitle, layers x experts as an array, the bare figure.

Colors are told apart with any color vision: Viridis for amounts, a blue-white-red scale for
differences, and the palette of Okabe and Ito for lines, without its black and yellow, which vanish
on dark and on light pages, and two of Tol's colors after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.errors import AnalysisInputError

SEQUENTIAL = "Viridis"
DIVERGING = "RdBu_r"
LINE_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#999933",
)
#: For up to ten categories: Tol's "muted" scheme and grey, told apart with any color vision.
CATEGORY_COLORS = (
    "#332288", "#88CCEE", "#44AA99", "#DDCC77", "#CC6677",
    "#882255", "#117733", "#AA4499", "#999933", "#888888",
)  # fmt: skip
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
CLEAR = "rgba(0,0,0,0)"
GRID = "rgba(128,128,128,0.25)"
NEUTRAL = "rgb(128,128,128)"

EXPORT_CONFIG = {"showSendToCloud": False, "displaylogo": False}
"""Plotly's configuration for exported pages: nothing is offered that leaves this machine."""

ROW_HEIGHT = 22
LEAST_HEIGHT = 320
MOST_HEIGHT = 900


def blank_figure(table: AnalysisTable, title: str, *, height: int) -> go.Figure:
    """A figure with title and subtitle, without data."""
    figure = go.Figure()
    dress(figure, table, title, height=height)
    return figure


def dress(figure: go.Figure, table: AnalysisTable, title: str, *, height: int) -> None:
    """Give a figure its title, subtitle, transparent background and grid."""
    figure.update_layout(
        title={
            "text": escaped(title),
            "subtitle": {"text": escaped(subtitle(table))},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 12, "t": 14},
        },
        height=height,
        margin={"l": 70, "r": 30, "t": 76, "b": 60},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"bgcolor": CLEAR},
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID)


def subtitle(table: AnalysisTable) -> str:
    """Model, run, number of prompts and tokens, which tokens."""
    context = table.context
    model = context.model if context.revision is None else f"{context.model}@{context.revision}"
    return (
        f"{model} · run {context.run_id} · {counted(context.num_prompts, 'prompt')}, "
        f"{counted(context.num_tokens, 'token')} · {context.selection}"
    )


def escaped(text: str) -> str:
    """Text whose `<`, `>` and `&` plotly shows instead of reading them as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def counted(number: int, noun: str) -> str:
    """`1 prompt`, `2,304 tokens`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def only_kind(frame: pd.DataFrame, kind: str | None) -> pd.DataFrame:
    """Rows of one kind of router: the one named, else the first there is.

    Raises:
        AnalysisInputError: when the table has no such kind.
    """
    kinds = list(dict.fromkeys(frame["kind"]))
    chosen = kinds[0] if kind is None and kinds else kind
    if chosen not in kinds:
        raise AnalysisInputError(
            f"the table has no routers of kind {chosen!r}; it has {', '.join(kinds) or 'none'}"
        )
    return frame[frame["kind"] == chosen]


def only_value(table: AnalysisTable, frame: pd.DataFrame, value: str | None) -> pd.DataFrame:
    """Rows of one value of the field a table is split by; all rows where it is not split.

    Raises:
        AnalysisInputError: when the value is not there, or has to be named.
    """
    if "value" not in frame:
        return frame
    values = list(dict.fromkeys(frame["value"]))
    if value not in values:
        asked = "name one value" if value is None else f"there is no value {value!r}"
        raise AnalysisInputError(
            f"the table is split by {table.context.parameters.get('by')}: {asked} of "
            f"{', '.join(values)}"
        )
    return frame[frame["value"] == value]


def layer_by_expert(
    frame: pd.DataFrame, measure: str
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """A measure as [layers, experts] (NaN where a layer has fewer experts), layers, experts."""
    layers = np.sort(frame["layer"].unique())
    rows = np.searchsorted(layers, frame["layer"].to_numpy())
    experts = frame["expert"].to_numpy(dtype=np.int64)
    grid = np.full((len(layers), int(experts.max()) + 1), np.nan, dtype=np.float32)
    grid[rows, experts] = frame[measure].to_numpy(dtype=np.float32)
    return grid, layers, np.arange(grid.shape[1])


def amount_range(grid: NDArray[Any]) -> dict[str, float]:
    """Color limits of amounts: from 0 to the largest, so that shades compare across figures."""
    largest = float(np.nanmax(grid)) if np.isfinite(grid).any() else 0.0
    return {"zmin": 0.0, "zmax": largest or 1.0}


def grid_height(num_rows: int) -> int:
    """Height in pixels of a map with so many rows."""
    return int(np.clip(150 + ROW_HEIGHT * num_rows, LEAST_HEIGHT, MOST_HEIGHT))


def legend_above(figure: go.Figure) -> None:
    """Put the legend between subtitle and plot."""
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
    figure.update_layout(legend=legend, margin={"t": 104})


def map_axes(figure: go.Figure, layers: Sequence[int] | NDArray[Any]) -> None:
    """Axes of a layers x experts map: whole numbers, layer 0 at the bottom, no grid."""
    figure.update_xaxes(title_text="expert", showgrid=False, zeroline=False)
    figure.update_yaxes(
        title_text="layer",
        showgrid=False,
        zeroline=False,
        **({"tickmode": "array", "tickvals": np.asarray(layers)} if len(layers) <= 32 else {}),
    )


def transparent(color: str, alpha: float) -> str:
    """A `#RRGGBB` color with an opacity."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
