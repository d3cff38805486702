"""All analyses, by the name that `moescope analyze` uses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moescope.probe.analysis.contrast import expert_contrast
from moescope.probe.analysis.frame import Analysis, Parameter
from moescope.probe.analysis.languages import PROMPT_TOKENS, language_divergence
from moescope.probe.analysis.load import expert_load, load_balance
from moescope.probe.analysis.prompt_view import prompt_list, prompt_routing, token_routing
from moescope.probe.analysis.specialization import expert_specialization
from moescope.probe.errors import AnalysisInputError

_SPLIT_BY = Parameter(
    name="by", type="text", default=None, help="a prompt field; one set of rows per value"
)
_UNIT = Parameter(
    name="unit",
    type="text",
    default="pair_id",
    help="prompt field that joins prompts into units of resampling; else each prompt is one",
)
_SEED = Parameter(name="seed", type="integer", default=0, help="of everything drawn at random")
_PROMPT_ID = Parameter(
    name="prompt_id", type="integer", default=None, help="the prompt's number", required=True
)

_ALL = (
    Analysis(
        name="load",
        title="Load of the experts",
        question="How much is each expert used, and how much weight does it get?",
        function=expert_load,
        parameters=(_SPLIT_BY,),
    ),
    Analysis(
        name="balance",
        title="Balance of the routers",
        question="How evenly does each layer spread its tokens over its experts?",
        function=load_balance,
        parameters=(_SPLIT_BY,),
    ),
    Analysis(
        name="specialization",
        title="Specialization by a prompt field",
        question="Which experts does a kind of text use: a language, a domain, a label?",
        function=expert_specialization,
        parameters=(
            Parameter(
                name="by",
                type="text",
                default=None,
                help="the prompt field whose values are compared",
                required=True,
            ),
            _UNIT,
            Parameter(
                name="bootstrap",
                type="integer",
                default=500,
                help="draws for the intervals, 0 for none",
            ),
            _SEED,
        ),
    ),
    Analysis(
        name="languages",
        title="Routing divergence of languages by layer",
        question="At which layers does a language use other experts than the pivot language?",
        function=language_divergence,
        filters=PROMPT_TOKENS,
        parameters=(
            Parameter(
                name="q",
                type="choice",
                default="topk",
                help="distribution over experts: all router scores, routing weights, selections",
                choices=("softmax", "topk", "counts"),
            ),
            Parameter(
                name="pivot", type="text", default="en", help="language the others are compared to"
            ),
            Parameter(
                name="floor",
                type="choice",
                default="auto",
                help="what the same language is compared with",
                choices=("auto", "phrasings", "other_passages", "halves", "none"),
            ),
            Parameter(
                name="phrasing",
                type="text",
                default=None,
                help="prompt field that tells phrasings of a passage apart, for floor phrasings",
            ),
            Parameter(
                name="draws",
                type="integer",
                default=10,
                help="samples of equal size averaged per comparison",
            ),
            Parameter(
                name="bootstrap", type="integer", default=1_000, help="draws for the intervals"
            ),
            _SEED,
        ),
    ),
    Analysis(
        name="contrast",
        title="Experts that differ between two groups",
        question="Which experts go with a behavior, discovered on one half and confirmed on the "
        "other?",
        function=expert_contrast,
        parameters=(
            Parameter(
                name="a",
                type="conditions",
                default=None,
                help="FIELD=VALUE of the first group; several must all hold",
                required=True,
            ),
            Parameter(
                name="b",
                type="conditions",
                default=None,
                help="FIELD=VALUE of the second group; several must all hold",
                required=True,
            ),
            Parameter(
                name="average",
                type="choice",
                default="pooled",
                help="pooled over tokens, or the mean over units",
                choices=("pooled", "unit"),
            ),
            _UNIT,
            Parameter(
                name="split",
                type="flag",
                default=True,
                help="rank on one half and test on the other; else max-T on all, optimistic",
            ),
            Parameter(
                name="candidates", type="integer", default=50, help="experts that are tested"
            ),
            Parameter(
                name="q", type="number", default=0.05, help="level of the false discovery rate"
            ),
            Parameter(
                name="bootstrap", type="integer", default=1_000, help="draws for the intervals"
            ),
            Parameter(
                name="permutations",
                type="integer",
                default=None,
                help="of the labels; by default the fewest that suffice, 20 * candidates / q",
            ),
            _SEED,
        ),
    ),
    Analysis(
        name="prompts",
        title="Prompts and answers",
        question="What was asked, what did the model write, and how was it judged?",
        function=prompt_list,
    ),
    Analysis(
        name="prompt",
        title="Routing of one prompt",
        question="Which expert does each token of a prompt go to, at every layer?",
        function=prompt_routing,
        parameters=(_PROMPT_ID,),
    ),
    Analysis(
        name="token",
        title="Experts of one token",
        question="Which experts does a token use, with which weights?",
        function=token_routing,
        parameters=(
            _PROMPT_ID,
            Parameter(
                name="position",
                type="integer",
                default=None,
                help="the token, counted from 0 over prompt and answer",
                required=True,
            ),
        ),
    ),
)

ANALYSES: Mapping[str, Analysis] = MappingProxyType({analysis.name: analysis for analysis in _ALL})
"""Name -> analysis, in the order in which they are listed."""


def find_analysis(name: str) -> Analysis:
    """The analysis of a name.

    Raises:
        AnalysisInputError: when there is none; the message lists those there are.
    """
    if name not in ANALYSES:
        raise AnalysisInputError(f"there is no analysis {name!r}; there are {', '.join(ANALYSES)}")
    return ANALYSES[name]
