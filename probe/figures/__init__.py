"""Figures of analysis tables: one function per kind, table in, `plotly` figure out.

No SQL and no arithmetic on routing happens here, and no streamlit: a figure shows columns that a
table defines. Every figure says in its subtitle which model and run, how many prompts and tokens,
and which tokens were counted. Backgrounds are transparent and text has no fixed color, so that
figures follow a light or a dark page.
"""

from __future__ import annotations

from moescope.probe.figures.contrast import contrast_forest, contrast_map
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

__all__ = [
    "EXPORT_CONFIG",
    "balance_curves",
    "contrast_forest",
    "contrast_map",
    "language_curves",
    "language_tree",
    "load_heatmap",
    "prompt_heatmap",
    "score_curves",
    "specialization_by_value",
    "specialization_leaders",
    "specialization_map",
    "token_bars",
]
