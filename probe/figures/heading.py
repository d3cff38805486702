"""Titles and subtitles that break into lines, so that a narrow page cuts nothing off."""

from __future__ import annotations

import textwrap
from typing import Final

import plotly.graph_objects as go

from moescope.probe.figures.style import CLEAR, GRID, escaped

# What a figure of 380 pixels has room for, the width on a phone.
_TITLE_WIDTH: Final = 44
_SUBTITLE_WIDTH: Final = 60
_BETWEEN: Final = " · "
_TITLE_LINE: Final = 22
_SUBTITLE_LINE: Final = 16


def set_heading(figure: go.Figure, title: str, subtitle: str, *, plot_height: int) -> None:
    """Give a figure title, subtitle, transparent background, grid and a legend at the bottom.

    Args:
        figure: what to dress.
        title: what is shown.
        subtitle: of which model, plan and prompts.
        plot_height: pixels for what is under the heading; its lines come on top.
    """
    titles, subtitles = _lines(title, _TITLE_WIDTH), _lines(subtitle, _SUBTITLE_WIDTH)
    top = 38 + _TITLE_LINE * len(titles) + _SUBTITLE_LINE * len(subtitles)
    figure.update_layout(
        title={
            "text": "<br>".join(map(escaped, titles)),
            "subtitle": {"text": "<br>".join(map(escaped, subtitles))},
            "x": 0, "xref": "container", "xanchor": "left",
            "y": 1, "yref": "container", "yanchor": "top", "pad": {"l": 12, "t": 14},
        },
        height=plot_height + top,
        margin={"l": 60, "r": 20, "t": top, "b": 60},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        # From the lower edge up: its rows push the plot, and never run over it.
        legend={
            "bgcolor": CLEAR, "orientation": "h", "x": 0,
            "y": 0, "yref": "container", "yanchor": "bottom",
        },
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID)


def _lines(text: str, width: int) -> list[str]:
    """The lines of a text: broken between its parts, or within one that has no room on a line."""
    lines: list[str] = []
    for part in text.split(_BETWEEN):
        joined = f"{lines[-1]}{_BETWEEN}{part}" if lines else part
        if lines and len(joined) <= width:
            lines[-1] = joined
        else:
            lines += textwrap.wrap(part, width, break_long_words=False, break_on_hyphens=False)
    return lines or [""]
