"""The routing rule and the one function that selects experts by it."""

from moescope.kernels.route.reference import Edits, select, selection_scores
from moescope.kernels.route.rule import RoutingRule

__all__ = ["Edits", "RoutingRule", "select", "selection_scores"]
