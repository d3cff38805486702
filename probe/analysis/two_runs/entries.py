"""The analyses of a run against another one, as `registry` lists them."""

from __future__ import annotations

from moescope.probe.analysis.frame import Analysis, Parameter
from moescope.probe.analysis.parameters import SEED, UNIT
from moescope.probe.analysis.two_runs.drift import expert_drift
from moescope.probe.analysis.two_runs.saturation import router_saturation

_AGAINST = Parameter(
    name="against",
    type="run",
    default=None,
    help="the reference run in the same store: final checkpoint, base model, unsteered run",
    required=True,
)

TWO_RUN_ANALYSES = (
    Analysis(
        name="saturation",
        title="Saturation of the routers",
        question="How much of each token's routing is already that of a reference run, such as the "
        "final checkpoint?",
        function=router_saturation,
        parameters=(_AGAINST, UNIT),
    ),
    Analysis(
        name="drift",
        title="Drift of the experts",
        question="Which experts does tuning, training or steering make the model use more, or "
        "less?",
        function=expert_drift,
        parameters=(
            _AGAINST,
            UNIT,
            Parameter(
                name="level",
                type="number",
                default=0.05,
                help="chance of any false finding among all experts",
            ),
            Parameter(
                name="permutations",
                type="integer",
                default=2_000,
                help="swaps of the two runs within units, at least 20 / level",
            ),
            SEED,
        ),
    ),
)
