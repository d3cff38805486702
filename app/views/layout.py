"""What every page is made of: headings, figures, tables with downloads, errors as sentences."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.probe.errors import MoescopeError, StoreBusyError

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from moescope.probe.analysis import AnalysisTable, Column

ICON: Final = (
    '<svg viewBox="0 0 16 16"><g fill="#2f5fb3"><rect x="1" y="1" width="4" height="4" rx="1"/>'
    '<rect x="6" y="6" width="4" height="4" rx="1"/><rect x="11" y="1" width="4" height="4" '
    'rx="1"/><rect x="1" y="11" width="4" height="4" rx="1"/></g><g fill="#9db8e0">'
    '<rect x="6" y="1" width="4" height="4" rx="1"/><rect x="1" y="6" width="4" height="4" '
    'rx="1"/><rect x="11" y="6" width="4" height="4" rx="1"/><rect x="6" y="11" width="4" '
    'height="4" rx="1"/><rect x="11" y="11" width="4" height="4" rx="1"/></g></svg>'
)

_FIGURE_CONFIG: Final = {"displaylogo": False, "showSendToCloud": False, "responsive": True}
_FORMATS: Final = {"csv": "text/csv", "json": "application/json", "parquet": "application/x-parquet"}
_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]()<>#+!|$~:])")


def escaped(text: str) -> str:
    """Text of a store or an error as it is, where Streamlit would read Markdown."""
    return _MARKDOWN.sub(r"\\\1", text)


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Show what moescope stops for on purpose as one sentence where it happened."""
    try:
        yield
    except StoreBusyError as error:
        st.warning(escaped(str(error)), icon=":material/hourglass_top:")
    except MoescopeError as error:
        st.error(escaped(str(error)), icon=":material/error:")


def heading(title: str, question: str) -> None:
    """The title of a page and the question that it answers."""
    st.title(title, anchor=False)
    st.caption(question)


def show_figure(
    figure: Figure,
    *,
    key: str,
    alt: str,
    on_select: Callable[[], None] | None = None,
) -> None:
    """Draw a figure; `on_select` is called after a click on one of its points.

    The selection lies in `st.session_state[key]`; `selected_point` reads it.
    """
    if on_select is None:
        st.plotly_chart(figure, key=key, alt=alt, config=dict(_FIGURE_CONFIG))
        return
    st.plotly_chart(
        figure,
        key=key,
        alt=alt,
        config=dict(_FIGURE_CONFIG),
        on_select=on_select,
        selection_mode="points",
    )


def selected_point(key: str) -> Sequence[Any] | None:
    """The `customdata` of the point that was clicked in a figure, if one was."""
    points = st.session_state.get(key, {}).get("selection", {}).get("points", [])
    if not points or "customdata" not in points[0]:
        return None
    data = points[0]["customdata"]
    return data if isinstance(data, Sequence) and not isinstance(data, str) else [data]


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
    st.dataframe(
        shown,
        key=f"{key}_rows",
        hide_index=True,
        height=min(height, 38 + 35 * max(len(shown), 1)),
        column_config={column.name: _column(column, shown) for column in table.columns},
        placeholder="–",
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        name = f"{table.context.run_id}-{table.name}"
        downloads(name, lambda suffix: table_bytes(table, suffix), key=key)
        counted = f"{len(shown):,} rows"
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
) -> None:
    """A plain frame of the store with its download."""
    st.dataframe(
        frame,
        key=f"{key}_rows",
        hide_index=True,
        height=min(height, 38 + 35 * max(len(frame), 1)),
        column_config=column_config,
        placeholder="–",
    )
    downloads(name, lambda suffix: frame_bytes(frame, suffix), key=key)


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
                data=lambda suffix=suffix: content(suffix),
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


def _column(column: Column, frame: pd.DataFrame) -> Any:
    about = f"{column.definition} Range: {column.range}."
    if column.unit:
        about = f"Unit: {column.unit}. {about}"
    if column.source != "moescope":
        about += f" Source: {column.source}."
    kind = frame[column.name].dtype.kind
    if kind == "f":
        return st.column_config.NumberColumn(column.name, help=escaped(about), format="%.4g")
    return st.column_config.Column(column.name, help=escaped(about))
