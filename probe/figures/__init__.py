"""Figures of analysis tables: one function per kind, table in, `plotly` figure out.

No SQL and no arithmetic on routing happens here, and no streamlit: a figure shows columns that a
table defines. Every figure says in its subtitle which model and run, how many prompts and tokens,
and which tokens were counted. Backgrounds are transparent and text has no fixed color, so that
figures follow a light or a dark page.
"""

from __future__ import annotations

from moescope.probe.figures.balance_loss import balance_loss_curves
from moescope.probe.figures.coactivation import coactivation_heatmap, partner_overview
from moescope.probe.figures.contrast import contrast_forest, contrast_map
from moescope.probe.figures.delta_experts import delta_expert_counts
from moescope.probe.figures.drawings import DRAWINGS, Drawing, drawings_of, figure_page
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

__all__ = [
    "DRAWINGS",
    "EXPORT_CONFIG",
    "Drawing",
    "balance_curves",
    "balance_loss_curves",
    "coactivation_heatmap",
    "contrast_forest",
    "contrast_map",
    "delta_expert_counts",
    "drawings_of",
    "drift_forest",
    "drift_map",
    "expert_words",
    "figure_page",
    "information_curves",
    "information_map",
    "language_curves",
    "language_tree",
    "load_heatmap",
    "partner_overview",
    "prompt_heatmap",
    "saturation_curves",
    "score_curves",
    "specialization_by_value",
    "specialization_leaders",
    "specialization_map",
    "token_bars",
    "transition_heatmap",
    "transition_paths",
    "transition_strength_curves",
    "vocabulary_curves",
]
