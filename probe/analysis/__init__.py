"""Questions asked of a recorded run, each answered by one table.

An analysis is a function from a store, a run, filters and parameters to an `AnalysisTable`, whose
columns are described objects. `ANALYSES` lists them all, by the name that `moescope analyze` uses.
Nothing here imports torch, transformers or streamlit.
"""

from __future__ import annotations

from moescope.probe.analysis.contrast import expert_contrast
from moescope.probe.analysis.delta_experts import delta_experts
from moescope.probe.analysis.export import table_as_json, write_table
from moescope.probe.analysis.filters import Filters, parse_conditions
from moescope.probe.analysis.frame import Analysis, AnalysisTable, Column, Context, Parameter
from moescope.probe.analysis.language_pairs import language_pairs
from moescope.probe.analysis.language_scores import language_scores
from moescope.probe.analysis.languages import language_divergence
from moescope.probe.analysis.load import expert_load, load_balance
from moescope.probe.analysis.prompt_view import prompt_list, prompt_routing, token_routing
from moescope.probe.analysis.registry import ANALYSES, find_analysis
from moescope.probe.analysis.selection import field_values, known_fields
from moescope.probe.analysis.specialization import expert_specialization

__all__ = [
    "ANALYSES",
    "Analysis",
    "AnalysisTable",
    "Column",
    "Context",
    "Filters",
    "Parameter",
    "delta_experts",
    "expert_contrast",
    "expert_load",
    "expert_specialization",
    "field_values",
    "find_analysis",
    "known_fields",
    "language_divergence",
    "language_pairs",
    "language_scores",
    "load_balance",
    "parse_conditions",
    "prompt_list",
    "prompt_routing",
    "table_as_json",
    "token_routing",
    "write_table",
]
