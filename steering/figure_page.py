"""Figures of plans and sweeps as one page, as `--figure FILE.html` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import plotly.graph_objects as go

from moescope.probe.errors import InputError
from moescope.probe.figures.style import EXPORT_CONFIG, escaped

_STYLE: Final = (
    "body{font-family:sans-serif;margin:1rem auto;max-width:1200px;padding:0 1rem;"
    "background:#fff;color:#1c2430}"
)


def check_figure_target(path: Path) -> None:
    """Refuse a name that is no page, before anything is computed.

    Raises:
        InputError: for another suffix.
    """
    if path.suffix.lower() != ".html":
        raise InputError(f"{path}: figures are written as a page; its name must end in .html")


def write_figure_page(
    path: Path, title: str, figures: Sequence[go.Figure], notes: Sequence[str] = ()
) -> None:
    """Write figures as a page that needs nothing from outside, whole or not at all.

    Raises:
        InputError: for another suffix, or a place that cannot be written.
    """
    from moescope.probe.analysis.export import write_whole

    check_figure_target(path)
    parts = [
        figure.to_html(
            full_html=False,
            include_plotlyjs=at == 0,
            config={**EXPORT_CONFIG, "responsive": True},
        )
        for at, figure in enumerate(figures)
    ]
    said = "".join(f"<p>{escaped(note)}</p>" for note in notes)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(parts)}{said}</body></html>\n"
    )
    write_whole(path, page.encode())
