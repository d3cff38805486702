"""The contrast, as `registry` lists it."""

from __future__ import annotations

from moescope.probe.analysis.contrasts.contrast import expert_contrast
from moescope.probe.analysis.contrasts.methods import ALL_MEASURES, METHODS
from moescope.probe.analysis.frame import Analysis, Parameter
from moescope.probe.analysis.parameters import SEED, UNIT

_AVERAGES = tuple(dict.fromkeys(name for one in METHODS.values() for name in one.averages))

CONTRAST = Analysis(
    name="contrast",
    title="Experts that differ between two groups",
    question="Which experts go with a behavior, discovered on one half and confirmed on the other?",
    function=expert_contrast,
    parameters=(
        Parameter(
            name="a",
            type="conditions",
            default=None,
            help="FIELD=VALUE of the first group; several must all hold",
        ),
        Parameter(
            name="b",
            type="conditions",
            default=None,
            help="FIELD=VALUE of the second group; several must all hold",
        ),
        Parameter(
            name="method",
            type="choice",
            default="risk_difference",
            help=f"what ranks the experts: {', '.join(METHODS)}",
            choices=tuple(METHODS),
        ),
        Parameter(
            name="measure",
            type="choice",
            default=None,
            help="what is averaged: selections, routing weights, or router scores; by default what "
            "the method's paper takes",
            choices=ALL_MEASURES,
        ),
        Parameter(
            name="average",
            type="choice",
            default=None,
            help="pooled over tokens, or the mean over units or prompts; by default as the "
            "method's paper",
            choices=_AVERAGES,
        ),
        UNIT,
        Parameter(
            name="split",
            type="flag",
            default=True,
            help="rank on one half and test on the other; else max-T on all, optimistic",
        ),
        Parameter(name="candidates", type="integer", default=50, help="experts that are tested"),
        Parameter(name="q", type="number", default=0.05, help="level of the false discovery rate"),
        Parameter(name="bootstrap", type="integer", default=1_000, help="draws for the intervals"),
        Parameter(
            name="permutations",
            type="integer",
            default=None,
            help="of the labels; by default the fewest that suffice, 20 * candidates / q",
        ),
        Parameter(
            name="mass",
            type="number",
            default=None,
            help="esft: share of a router's score that its chosen experts reach; else 0.2",
        ),
        Parameter(
            name="stability",
            type="number",
            default=None,
            help="safex: share of resamples that choose an expert; else 0.8",
        ),
        Parameter(
            name="markers",
            type="texts",
            default=(),
            help="npmi: TOKEN or TOKEN=COEFFICIENT, may be given several times",
        ),
        SEED,
    ),
)
