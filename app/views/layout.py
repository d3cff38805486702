"""What every page is made of: headings, figures, tables with downloads, errors as sentences."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import streamlit as st

from moescope.app.views.look import ICON, LOGO, STYLE
from moescope.probe.errors import MoescopeError, StoreBusyError

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from streamlit.delta_generator import DeltaGenerator

    from moescope.probe.analysis import AnalysisTable, Column

_LOG: Final = logging.getLogger(__name__)
_FIGURE_CONFIG: Final = {"displaylogo": False, "showSendToCloud": False, "responsive": True}
_FORMATS: Final = {
    "csv": "text/csv",
    "json": "application/json",
    "parquet": "application/x-parquet",
}
_FRAME: Final = "#D55E00"
_ROW_HEIGHT: Final = 35
_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]()<>#+!|$~:])")


def escaped(text: str) -> str:
    """Text of a store or an error as it is, where Streamlit would read Markdown."""
    return _MARKDOWN.sub(r"\\\1", text)


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Show what moescope stops for on purpose as one sentence where it happened.

    What it did not expect is a sentence too; its traceback goes to the terminal of the server.
    """
    try:
        yield
    except StoreBusyError as error:
        st.warning(escaped(str(error)), icon=":material/hourglass_top:")
    except MoescopeError as error:
        st.error(escaped(str(error)), icon=":material/error:")
    except Exception as error:
        _LOG.exception("a page of the dashboard stopped")
        st.error(
            f"This page stopped on an unexpected {type(error).__name__}: "
            f"{escaped(' '.join(str(error).split())[:300])}. The terminal in which the dashboard "
            "was started has the details.",
            icon=":material/bug_report:",
        )


def open_page() -> None:
    """What comes first on every page: its icon and width, the logo, our few rules of style."""
    st.set_page_config(page_title="moescope", page_icon=ICON, layout="wide")
    st.html(f"<style>{STYLE}</style>")
    st.logo(LOGO, size="medium", icon_image=ICON)


def side_by_side(weights: Sequence[int]) -> list[DeltaGenerator]:
    """Columns for figures and tables, one below another where the window is narrow."""
    with st.container(key="side_by_side"):
        return st.columns(weights)


def heading(title: str, question: str) -> None:
    """The title of a page and the question that it answers."""
    st.title(title, anchor=False)
    st.caption(question)


def show_figure(figure: Figure, *, key: str, alt: str) -> None:
    """Draw a figure that is only looked at."""
    st.plotly_chart(figure, key=key, alt=alt, config=dict(_FIGURE_CONFIG))


def show_clickable(
    figure: Figure, *, key: str, alt: str, on_click: Callable[[Mapping[str, Any]], None]
) -> None:
    """Draw a figure whose points answer clicks.

    Args:
        figure: has points or bars; a map needs `with_click_layer`, for maps report no clicks.
        key: unique on the page.
        alt: what is to be seen, for those who cannot.
        on_click: told the clicked point (`x`, `y`, `customdata`) before the page is drawn again.
    """
    figure.update_layout(clickmode="event+select", dragmode="zoom")
    if any(trace.type != "bar" for trace in figure.data):
        # A click within any cell, however wide, belongs to the point in its middle.
        figure.update_layout(hoverdistance=-1)
    # What was not clicked stays as it was; invisible points stay invisible.
    figure.update_traces(unselected={"marker": {"opacity": 1}}, selector={"type": "scatter"})
    last = f"_{key}_last"

    def clicked() -> None:
        points = st.session_state[key]["selection"]["points"]
        if points:
            st.session_state[last] = _plain_point(points[0])
        # A second click on the same point takes the selection back; it is a click all the same.
        if st.session_state.get(last) is not None:
            on_click(st.session_state[last])

    st.plotly_chart(
        figure,
        key=key,
        alt=alt,
        config=dict(_FIGURE_CONFIG),
        on_select=clicked,
        selection_mode="points",
    )


def _plain_point(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point as the browser reports it, with `customdata` as a list in any case."""
    data = point.get("customdata")
    if isinstance(data, Mapping):  # an array with two dimensions arrives as {"0": ..., "1": ...}
        data = [data[place] for place in sorted(data, key=int)]
    return {**point, "customdata": data if isinstance(data, list) else [data]}


def with_click_layer(figure: Figure, *, chosen: tuple[int, int | None]) -> Figure:
    """Put invisible points over the cells of a map, which itself reports no clicks.

    Each point's `customdata` is the value of its cell. The points take the map's hover text.

    Args:
        figure: has one map.
        chosen: the place across and down of the cell that is framed; without the second, a column.
    """
    import numpy as np
    import plotly.graph_objects as go

    cells = next(trace for trace in figure.data if trace.type == "heatmap")
    columns, rows = np.meshgrid(np.asarray(cells.x), np.asarray(cells.y, dtype=object))
    figure.add_trace(
        go.Scattergl(
            x=columns.ravel(),
            y=rows.ravel(),
            mode="markers",
            marker={"symbol": "square", "size": 12, "opacity": 0},
            customdata=np.asarray(cells.z).ravel(),
            text=None if cells.text is None else np.asarray(cells.text).ravel(),
            hovertemplate=cells.hovertemplate.replace("%{z", "%{customdata"),
            showlegend=False,
        )
    )
    # The axes end with the cells; points alone would push them outward.
    figure.update_xaxes(range=_edges(cells.x))
    figure.update_yaxes(range=_edges(cells.y), autorange=False)
    cells.hovertemplate, cells.hoverinfo = None, "skip"
    bottom, top = sorted(_edges(cells.y)) if chosen[1] is None else _edges([chosen[1]])
    frame_cells(figure, (chosen[0] - 0.5, chosen[0] + 0.5), (bottom, top))
    return figure


def frame_cells(figure: Figure, across: tuple[float, float], down: tuple[float, float]) -> None:
    """Draw a frame around cells of a map, from edge to edge."""
    figure.add_shape(
        type="rect", x0=across[0], x1=across[1], y0=down[0], y1=down[1],
        line={"color": _FRAME, "width": 2.5}, fillcolor="rgba(0,0,0,0)",
    )  # fmt: skip


def _edges(places: Sequence[Any]) -> list[float]:
    """The outer edges of cells: numbered ones ascend, named ones stand from top to bottom."""
    if isinstance(places[0], str):
        return [len(places) - 0.5, -0.5]
    return [float(min(places)) - 0.5, float(max(places)) + 0.5]


def show_table(
    table: AnalysisTable, *, key: str, rows: pd.DataFrame | None = None, height: int = 320
) -> None:
    """A table with what each column means, its notes, and its download.

    Args:
        table: the whole table, which is what the download holds.
        key: unique on the page.
        rows: the rows to show, where they are fewer than the whole.
        height: in pixels.
    """
    shown = table.frame if rows is None else rows
    columns = [column for column in table.columns if not _says_nothing(column, table.frame)]
    st.dataframe(
        shown,
        key=f"{key}_rows",
        hide_index=True,
        height=_height(shown, height),
        column_order=[column.name for column in columns],
        column_config={column.name: _column(column, shown) for column in columns},
        placeholder="–",
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        name = f"{table.context.run_id}-{table.name}"
        downloads(name, lambda suffix: table_bytes(table, suffix), key=key)
        counted = f"{len(shown):,} {'row' if len(shown) == 1 else 'rows'}"
        if len(shown) != len(table.frame):
            counted += f" of {len(table.frame):,}; the download holds all"
        st.caption(counted)
    for note in table.notes:
        st.caption(f":material/info: {escaped(note)}")


def show_frame(
    frame: pd.DataFrame,
    *,
    key: str,
    name: str,
    height: int = 320,
    column_config: dict[str, Any] | None = None,
    beside: Callable[[], None] | None = None,
) -> None:
    """A plain frame with its download; `beside` draws more buttons next to that."""
    shown = {str(name): _number() for name in frame if frame[name].dtype.kind == "f"}
    st.dataframe(
        frame,
        key=f"{key}_rows",
        hide_index=True,
        height=_height(frame, height),
        column_config={**shown, **(column_config or {})},
        placeholder="–",
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        downloads(name, lambda suffix: frame_bytes(frame, suffix), key=key)
        if beside is not None:
            beside()


def downloads(name: str, content: Callable[[str], bytes], *, key: str) -> None:
    """Buttons that hand a table out as a file; the file is made when it is asked for.

    Args:
        name: of the file, without suffix.
        content: suffix without dot -> bytes.
        key: unique on the page.
    """
    stem = re.sub(r"[^\w.-]+", "_", name)
    with st.popover("Download", icon=":material/download:", key=f"{key}_download"):
        for suffix, kind in _FORMATS.items():
            st.download_button(
                suffix.upper() if suffix != "parquet" else "Parquet",
                data=partial(content, suffix),
                file_name=f"{stem}.{suffix}",
                mime=kind,
                key=f"{key}_{suffix}",
                on_click="ignore",
                width="stretch",
            )


def table_bytes(table: AnalysisTable, suffix: str) -> bytes:
    """A table as the file that `moescope analyze --out` writes."""
    from moescope.probe.analysis import write_table

    with tempfile.TemporaryDirectory(prefix="moescope-") as folder:
        return write_table(table, Path(folder, f"table.{suffix}")).read_bytes()


def frame_bytes(frame: pd.DataFrame, suffix: str) -> bytes:
    """A plain frame as CSV, JSON or Parquet."""
    if suffix == "csv":
        return frame.to_csv(index=False, lineterminator="\n").encode()
    if suffix == "json":
        text: str = frame.to_json(orient="records", date_format="iso", force_ascii=False, indent=1)
        return text.encode()
    return frame.to_parquet(index=False)


def _height(frame: pd.DataFrame, most: int) -> int | Literal["content"]:
    """As high as its rows, up to a limit in pixels."""
    return most if len(frame) * _ROW_HEIGHT > most else "content"


def _says_nothing(column: Column, frame: pd.DataFrame) -> bool:
    """Whether a column is shown only where it tells rows apart: there is one kind of router."""
    return column.name == "kind" and frame["kind"].nunique() == 1


def _column(column: Column, frame: pd.DataFrame) -> Any:
    about = f"{column.definition} Range: {column.range}."
    if column.unit:
        about = f"Unit: {column.unit}. {about}"
    if column.source != "moescope":
        about += f" Source: {column.source}."
    kind = frame[column.name].dtype.kind
    if kind == "f":
        return _number(column.name, help=escaped(about))
    return st.column_config.Column(column.name, help=escaped(about))


def _number(label: str | None = None, *, help: str | None = None) -> Any:
    return st.column_config.NumberColumn(label, help=help, format="%.3g")
