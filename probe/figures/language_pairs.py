"""Figures of the divergence of every two languages: a matrix beside its tree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.measures import FloatArray
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.style import NEUTRAL, SEQUENTIAL, dress, escaped, only_kind

_WORDS = {
    "jsd": "JSD (nats)",
    "d_hjs": "JSD over entropy headroom",
    "jsd_excess": "JSD above floor (nats)",
}


def language_tree(
    table: AnalysisTable,
    layer: int,
    *,
    measure: str = "jsd",
    kind: str | None = None,
) -> go.Figure:
    """Languages x languages at one layer, ordered and joined by average linkage.

    Args:
        table: of `language_pairs`.
        layer: the decoder layer.
        measure: `jsd`, `d_hjs` or `jsd_excess`.
        kind: which kind of router; the first there is by default.

    Raises:
        AnalysisInputError: when the table has no such layer or measure, or a pair is missing.
    """
    if measure not in _WORDS:
        raise AnalysisInputError(f"measure is {measure!r}; it is one of {', '.join(_WORDS)}")
    distance_NN, languages = _matrix(only_kind(table.frame, kind), layer, measure)
    # Noise can leave an excess below 0; a tree needs distances.
    joined = hierarchy.linkage(squareform(np.clip(distance_NN, 0, None)), method="average")
    tree = hierarchy.dendrogram(joined, no_plot=True, labels=languages)
    order = [int(leaf) for leaf in tree["leaves"] or ()]
    names = [escaped(languages[index]) for index in order]
    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.68, 0.32], horizontal_spacing=0.02, shared_yaxes=True
    )
    shown_NN = distance_NN[np.ix_(order, order)]
    places = np.arange(len(order))
    figure.add_trace(_heatmap(shown_NN, names, places, _WORDS[measure]), row=1, col=1)
    for heights, ends in zip(tree["dcoord"], tree["icoord"], strict=True):
        # scipy puts the leaves at 5, 15, 25, ...
        figure.add_trace(
            go.Scatter(
                x=heights,
                y=(np.array(ends) - 5) / 10,
                mode="lines",
                line={"color": NEUTRAL, "width": 2},
                showlegend=False,
                hovertemplate="joined at %{x:.4f}<extra></extra>",
            ),
            row=1,
            col=2,
        )
    dress(figure, table, f"Which languages are routed alike in layer {layer}",
          height=220 + 34 * len(order))  # fmt: skip
    axis = {"tickmode": "array", "tickvals": places, "ticktext": names, "showgrid": False}
    figure.update_xaxes(**axis, zeroline=False, row=1, col=1)
    figure.update_yaxes(**axis, zeroline=False, row=1, col=1)
    figure.update_yaxes(showgrid=False, zeroline=False, row=1, col=2)
    figure.update_xaxes(title_text=_WORDS[measure], rangemode="tozero", row=1, col=2)
    return figure


def _heatmap(
    shown_NN: FloatArray, names: list[str], places: NDArray[Any], words: str
) -> go.Heatmap:
    hidden = np.where(np.eye(len(names), dtype=bool), np.nan, shown_NN)
    return go.Heatmap(
        z=hidden,
        x=places,
        y=places,
        customdata=[[f"{a} and {b}" for b in names] for a in names],
        colorscale=SEQUENTIAL,
        texttemplate="%{z:.2f}",
        hovertemplate="%{customdata}: %{z:.4f}<extra></extra>",
        colorbar={"title": {"text": words, "side": "top"}, "orientation": "h", "y": -0.12,
                  "yanchor": "top", "thickness": 12, "len": 0.66, "x": 0, "xanchor": "left"},
    )  # fmt: skip


def _matrix(frame: pd.DataFrame, layer: int, measure: str) -> tuple[FloatArray, list[str]]:
    """The measure as a symmetric matrix, and its languages."""
    part = frame[frame["layer"] == layer]
    if part.empty:
        layers = ", ".join(map(str, sorted(frame["layer"].unique())))
        raise AnalysisInputError(f"the table has no layer {layer}; it has {layers}")
    languages = sorted(set(part["lang_a"]) | set(part["lang_b"]))
    rows, columns = (np.searchsorted(languages, part[name]) for name in ("lang_a", "lang_b"))
    matrix = np.full((len(languages), len(languages)), np.nan)
    matrix[rows, columns] = matrix[columns, rows] = part[measure]
    np.fill_diagonal(matrix, 0.0)
    if np.isnan(matrix).any():
        raise AnalysisInputError(
            f"{measure} is missing for some pairs of languages in layer {layer}; choose languages "
            "that share passages, or another measure"
        )
    return matrix, languages
