"""Questions asked of a recorded run, each answered by one table.

An analysis is a function from a store, a run, filters and parameters to an `AnalysisTable`, whose
columns are described objects. `ANALYSES` lists them all, by the name that `moescope analyze` uses.
Nothing here imports torch, transformers or streamlit.
"""

from __future__ import annotations

from moescope.probe.analysis.contrasts.contrast import expert_contrast
from moescope.probe.analysis.export import table_as_json, write_table
from moescope.probe.analysis.filters import Filters, parse_conditions
from moescope.probe.analysis.frame import Analysis, AnalysisTable, Column, Context, Parameter
from moescope.probe.analysis.languages.divergence import language_divergence
from moescope.probe.analysis.languages.pairs import language_pairs
from moescope.probe.analysis.languages.scores import language_scores
from moescope.probe.analysis.pairs.coactivation import expert_coactivation
from moescope.probe.analysis.pairs.partners import expert_partners
from moescope.probe.analysis.pairs.transition_strength import transition_strength
from moescope.probe.analysis.pairs.transitions import expert_transitions
from moescope.probe.analysis.prompt_view import prompt_list, prompt_routing, token_routing
from moescope.probe.analysis.registry import ANALYSES, find_analysis
from moescope.probe.analysis.selection import field_values, known_fields
from moescope.probe.analysis.stored import Answer, answer
from moescope.probe.analysis.tokens.expert_tokens import expert_tokens
from moescope.probe.analysis.tokens.information import routing_information
from moescope.probe.analysis.tokens.vocabulary import vocabulary_specialization
from moescope.probe.analysis.two_runs.drift import expert_drift
from moescope.probe.analysis.two_runs.saturation import router_saturation
from moescope.probe.analysis.usage.balance_loss import balance_loss
from moescope.probe.analysis.usage.delta_experts import delta_experts
from moescope.probe.analysis.usage.load import expert_load, load_balance
from moescope.probe.analysis.usage.specialization import expert_specialization

__all__ = [
    "ANALYSES",
    "Analysis",
    "AnalysisTable",
    "Answer",
    "Column",
    "Context",
    "Filters",
    "Parameter",
    "answer",
    "balance_loss",
    "delta_experts",
    "expert_coactivation",
    "expert_contrast",
    "expert_drift",
    "expert_load",
    "expert_partners",
    "expert_specialization",
    "expert_tokens",
    "expert_transitions",
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
    "router_saturation",
    "routing_information",
    "table_as_json",
    "token_routing",
    "transition_strength",
    "vocabulary_specialization",
    "write_table",
]
