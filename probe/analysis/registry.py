"""All analyses, by the name that `moescope analyze` uses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moescope.probe.analysis.contrasts.entries import CONTRAST
from moescope.probe.analysis.frame import Analysis, Parameter
from moescope.probe.analysis.languages.entries import LANGUAGE_ANALYSES
from moescope.probe.analysis.pairs.entries import PAIR_ANALYSES
from moescope.probe.analysis.parameters import SEED, UNIT
from moescope.probe.analysis.prompt_view import prompt_list, prompt_routing, token_routing
from moescope.probe.analysis.token_fields import TOKEN_FIELDS
from moescope.probe.analysis.tokens.entries import VOCABULARY_ANALYSES
from moescope.probe.analysis.two_runs.entries import TWO_RUN_ANALYSES
from moescope.probe.analysis.usage.balance_loss import balance_loss
from moescope.probe.analysis.usage.load import expert_load, load_balance
from moescope.probe.analysis.usage.specialization import expert_specialization
from moescope.probe.errors import AnalysisInputError

_SPLIT_BY = Parameter(
    name="by",
    type="text",
    default=None,
    help=f"a field of prompts, or of tokens ({', '.join(TOKEN_FIELDS)}); rows per value",
)
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
        name="balance-loss",
        title="Load-balancing loss at three levels",
        question="How far does each sequence favor experts, while all of them together balance?",
        function=balance_loss,
        parameters=(
            _SPLIT_BY,
            Parameter(name="batch_size", type="integer", default=16, help="prompts of a batch"),
            UNIT,
            Parameter(
                name="bootstrap",
                type="integer",
                default=500,
                help="draws for the interval of the gap, 0 for none",
            ),
            SEED,
        ),
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
                help="the field whose values are compared: of prompts, or of tokens "
                f"({', '.join(TOKEN_FIELDS)})",
                required=True,
            ),
            UNIT,
            Parameter(
                name="bootstrap",
                type="integer",
                default=500,
                help="draws for the intervals, 0 for none",
            ),
            SEED,
        ),
    ),
    *VOCABULARY_ANALYSES,
    *PAIR_ANALYSES,
    *LANGUAGE_ANALYSES,
    CONTRAST,
    *TWO_RUN_ANALYSES,
    Analysis(
        name="prompts",
        title="Prompts and answers",
        question="What was asked, what did the model write, and how was it judged?",
        function=prompt_list,
        stored=False,
    ),
    Analysis(
        name="prompt",
        title="Routing of one prompt",
        question="Which expert does each token of a prompt go to, at every layer?",
        function=prompt_routing,
        stored=False,
        parameters=(_PROMPT_ID,),
    ),
    Analysis(
        name="token",
        title="Experts of one token",
        question="Which experts does a token use, with which weights?",
        function=token_routing,
        stored=False,
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
