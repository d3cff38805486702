"""The routing rule and the one function that selects experts by it."""

from moescope.kernels.route.edits import Edits
from moescope.kernels.route.reference import (
    routing_probabilities,
    select,
    selection_scores,
    shared_weights,
)
from moescope.kernels.route.rule import Groups, RoutingRule

__all__ = [
    "Edits",
    "Groups",
    "RoutingRule",
    "routing_probabilities",
    "select",
    "selection_scores",
    "shared_weights",
]
