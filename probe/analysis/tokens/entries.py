"""The analyses of vocabulary and information, as `registry` lists them."""

from __future__ import annotations

from moescope.probe.analysis.frame import Analysis, Parameter
from moescope.probe.analysis.parameters import SEED, UNIT
from moescope.probe.analysis.tokens.expert_tokens import expert_tokens
from moescope.probe.analysis.tokens.information import routing_information
from moescope.probe.analysis.tokens.vocabulary import vocabulary_specialization

_LABEL = Parameter(
    name="label",
    type="choice",
    default="input",
    help="whose id: the token's own, the next token's, the predicted one's",
    choices=("input", "next", "predicted"),
)


def _slots(default: str) -> Parameter:
    return Parameter(
        name="slots",
        type="choice",
        default=default,
        help="experts that rank first, or all that a token uses",
        choices=("top1", "topk"),
    )


def _min_count(what: str) -> Parameter:
    return Parameter(name="min_count", type="integer", default=10, help=what)


VOCABULARY_ANALYSES = (
    Analysis(
        name="vocabulary",
        title="Vocabulary specialization",
        question="Does a token always go to the same expert, whatever the context?",
        function=vocabulary_specialization,
        parameters=(
            _LABEL,
            _slots("top1"),
            _min_count("occurrences that an id needs for the second reading"),
            Parameter(name="shuffles", type="integer", default=1, help="of the labels, for chance"),
            UNIT,
            SEED,
        ),
    ),
    Analysis(
        name="expert-tokens",
        title="Words of the experts",
        question="Which tokens are characteristic of an expert?",
        function=expert_tokens,
        parameters=(
            _LABEL,
            _slots("topk"),
            _min_count("occurrences that an id needs"),
            Parameter(name="top", type="integer", default=20, help="words per expert, at most"),
            UNIT,
        ),
    ),
    Analysis(
        name="information",
        title="What the routing tells about each factor",
        question="Does the routing go by the token, the one before it, its position, or the "
        "language, domain or label of the prompt?",
        function=routing_information,
        parameters=(
            Parameter(
                name="factor",
                type="text",
                default=None,
                help="token, previous_token, position, phase, segment or prompt fields, with "
                "commas; by default all that there are",
            ),
            Parameter(
                name="given",
                type="choice",
                default="none",
                help="token: what is left to tell once the token is known",
                choices=("none", "token"),
            ),
            Parameter(
                name="per_expert",
                type="flag",
                default=False,
                help="one row per expert, of whether a token selects it",
            ),
            Parameter(name="shuffles", type="integer", default=10, help="of each factor"),
            _min_count("occurrences that a token needs where it is given"),
            UNIT,
            SEED,
        ),
    ),
)
