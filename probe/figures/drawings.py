"""Every table and the figures that draw it, for whoever does not know the table beforehand.

A drawing may need to be told which part of the table to draw (a layer, a value, an expert); without
being told it takes the first, and of layers the middle one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import plotly.graph_objects as go

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.figures.balance_loss import balance_loss_curves
from moescope.probe.figures.coactivation import coactivation_heatmap, partner_overview
from moescope.probe.figures.contrast import contrast_forest, contrast_map
from moescope.probe.figures.delta_experts import delta_expert_counts
from moescope.probe.figures.information import information_curves, information_map
from moescope.probe.figures.language_pairs import language_tree
from moescope.probe.figures.languages import language_curves, score_curves
from moescope.probe.figures.load import balance_curves, load_heatmap
from moescope.probe.figures.prompt import prompt_heatmap, token_bars
from moescope.probe.figures.specialization import (
    specialization_by_value,
    specialization_leaders,
    specialization_map,
)
from moescope.probe.figures.style import EXPORT_CONFIG
from moescope.probe.figures.transitions import (
    transition_heatmap,
    transition_paths,
    transition_strength_curves,
)
from moescope.probe.figures.two_runs import drift_forest, drift_map, saturation_curves
from moescope.probe.figures.vocabulary import expert_words, vocabulary_curves


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One way to draw a table.

    Attributes:
        label: what it shows, in a few words.
        draw: from the table, and the choices by name, to the figure.
        choices: columns of the table of which one value has to be chosen.
        needs: a column that the table must have; None when every such table can be drawn so.
        unless: a column that the table must not have.
    """

    label: str
    draw: Callable[..., go.Figure]
    choices: tuple[str, ...] = ()
    needs: str | None = None
    unless: str | None = None

    def fits(self, table: AnalysisTable) -> bool:
        """Whether the table can be drawn so."""
        return (self.needs is None or self.needs in table.frame) and (
            self.unless is None or self.unless not in table.frame
        )

    def options(self, table: AnalysisTable, chosen: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The values of each choice, given those that were chosen before it."""
        frame, found = table.frame, {}
        for name in self.choices:
            found[name] = sorted(frame[name].dropna().unique().tolist())
            value = chosen.get(name, _first(name, found[name]))
            frame = frame[frame[name] == value]
        return found

    def __call__(self, table: AnalysisTable, **chosen: Any) -> go.Figure:
        """The figure; what is not chosen is the first value, of layers the middle one."""
        picked = dict(chosen)
        for name in self.choices:
            options = self.options(table, picked)[name]
            if picked.get(name) not in options:
                picked[name] = _first(name, options)
        return self.draw(table, **{name: picked[name] for name in self.choices})


def _first(name: str, options: list[Any]) -> Any:
    return options[len(options) // 2 if name == "layer" else 0] if options else None


def _one(
    label: str,
    draw: Callable[..., go.Figure],
    *choices: str,
    needs: str | None = None,
    unless: str | None = None,
) -> Drawing:
    return Drawing(label=label, draw=draw, choices=choices, needs=needs, unless=unless)


DRAWINGS: Final[Mapping[str, tuple[Drawing, ...]]] = MappingProxyType(
    {
        "load": (
            _one("All experts", load_heatmap, unless="value"),
            _one("All experts", load_heatmap, "value", needs="value"),
        ),
        "balance": (_one("By layer", balance_curves),),
        "balance-loss": (
            _one("By layer", balance_loss_curves, unless="value"),
            _one("By layer", balance_loss_curves, "value", needs="value"),
        ),
        "specialization": (
            _one("One layer", specialization_by_value, "layer"),
            _one("One value", specialization_map, "value"),
            _one("All experts", specialization_leaders),
        ),
        "vocabulary": (_one("By layer", vocabulary_curves),),
        "expert-tokens": (_one("One expert", expert_words, "layer", "expert"),),
        "information": (
            _one("By layer", information_curves, unless="expert"),
            _one("All experts", information_map, "factor", needs="expert"),
        ),
        "coactivation": (_one("One layer", coactivation_heatmap, "layer"),),
        "partners": (_one("By layer", partner_overview),),
        "transitions": (
            _one("Strongest transitions", transition_paths),
            _one("One layer", transition_heatmap, "layer"),
        ),
        "transition-strength": (_one("By layer", transition_strength_curves),),
        "languages": (_one("By layer", language_curves),),
        "language-pairs": (_one("One layer", language_tree, "layer"),),
        "language-scores": (_one("By layer", score_curves),),
        "delta-experts": (_one("By layer", delta_expert_counts),),
        "contrast": (
            _one("All experts", contrast_map),
            _one("With intervals", contrast_forest),
        ),
        "saturation": (_one("By layer", saturation_curves),),
        "drift": (
            _one("All experts", drift_map),
            _one("With intervals", drift_forest),
        ),
        "prompt": (_one("Tokens by layers", prompt_heatmap),),
        "token": (_one("By layer", token_bars),),
    }
)
"""Name of an analysis -> its drawings, the first one first looked at."""


def drawings_of(table: AnalysisTable) -> tuple[Drawing, ...]:
    """The drawings that fit a table; empty for one that is only read."""
    return tuple(drawing for drawing in DRAWINGS.get(table.name, ()) if drawing.fits(table))


def figure_page(table: AnalysisTable) -> str:
    """All drawings of a table as one page that needs nothing from outside.

    Returns:
        HTML with plotly's code in it.
    """
    parts = [
        drawing(table).to_html(
            full_html=False,
            include_plotlyjs=index == 0,
            config={**EXPORT_CONFIG, "responsive": True},
        )
        for index, drawing in enumerate(drawings_of(table))
    ]
    title = table.title.replace("&", "&amp;").replace("<", "&lt;")
    notes = "".join(f"<p>{note.replace('&', '&amp;').replace('<', '&lt;')}</p>"
                    for note in table.notes)  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_PAGE_STYLE}</style></head><body>"
        f"{''.join(parts)}{notes}</body></html>\n"
    )


_PAGE_STYLE: Final = (
    "body{font-family:sans-serif;margin:1rem auto;max-width:1200px;padding:0 1rem;"
    "background:#fff;color:#1c2430}"
)
