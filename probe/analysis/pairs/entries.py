"""The analyses of pairs of experts, as `registry` lists them."""

from __future__ import annotations

from moescope.probe.analysis.frame import Analysis, Parameter
from moescope.probe.analysis.pairs.coactivation import expert_coactivation
from moescope.probe.analysis.pairs.partners import expert_partners
from moescope.probe.analysis.pairs.transition_strength import transition_strength
from moescope.probe.analysis.pairs.transitions import expert_transitions
from moescope.probe.analysis.parameters import SEED, UNIT

_DISTANCE = Parameter(
    name="distance",
    type="integer",
    default=1,
    help="how many routed layers of the same kind further the later layer is",
)

PAIR_ANALYSES = (
    Analysis(
        name="coactivation",
        title="Experts selected together",
        question="Which experts of a layer do the same tokens select, more than by load alone?",
        function=expert_coactivation,
        parameters=(
            Parameter(
                name="pairs",
                type="choice",
                default="all",
                help="all pairs of a token's experts, or adjacent ones in rank order as OLMoE's "
                "released code counts",
                choices=("all", "adjacent"),
            ),
            UNIT,
        ),
    ),
    Analysis(
        name="partners",
        title="Partners of the experts",
        question="Does an expert keep fixed partners in its layer, or cooperate with all?",
        function=expert_partners,
        parameters=(UNIT, SEED),
    ),
    Analysis(
        name="transitions",
        title="Transitions between experts of consecutive layers",
        question="Given the expert that a token uses in one layer, which one follows in the next?",
        function=expert_transitions,
        parameters=(
            Parameter(
                name="slots",
                type="choice",
                default="top1",
                help="the expert of rank 0 in both layers, or all of a token's slots",
                choices=("top1", "topk"),
            ),
            _DISTANCE,
            UNIT,
        ),
    ),
    Analysis(
        name="transition-strength",
        title="How far a layer's expert tells the next one",
        question="Between which layers can the next expert be predicted, and how much better than "
        "by guessing the busiest?",
        function=transition_strength,
        parameters=(
            _DISTANCE,
            UNIT,
            Parameter(
                name="shuffles",
                type="integer",
                default=10,
                help="permutations of tokens whose mean is the chance level",
            ),
            SEED,
        ),
    ),
)
