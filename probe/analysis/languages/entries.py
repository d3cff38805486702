"""The analyses of multilingual routing, as `registry` lists them."""

from __future__ import annotations

from moescope.probe.analysis.frame import Analysis, Parameter
from moescope.probe.analysis.languages.divergence import PROMPT_TOKENS, language_divergence
from moescope.probe.analysis.languages.pairs import language_pairs
from moescope.probe.analysis.languages.scores import CORRECT, language_scores
from moescope.probe.analysis.parameters import SEED, UNIT
from moescope.probe.analysis.usage.delta_experts import delta_experts

_DISTRIBUTION = Parameter(
    name="q",
    type="choice",
    default="topk",
    help="distribution over experts: all router scores, routing weights, selections",
    choices=("softmax", "topk", "counts"),
)
_PIVOT = Parameter(
    name="pivot", type="text", default="en", help="language the others are compared to"
)
_FLOOR = Parameter(
    name="floor",
    type="choice",
    default="auto",
    help="what the same language is compared with",
    choices=("auto", "other_passages", "halves", "none"),
)
_DRAWS = Parameter(
    name="draws", type="integer", default=10, help="samples of equal size averaged per comparison"
)
_BOOTSTRAP = Parameter(
    name="bootstrap", type="integer", default=1_000, help="draws for the intervals"
)

LANGUAGE_ANALYSES = (
    Analysis(
        name="languages",
        title="Routing divergence of languages by layer",
        question="At which layers does a language use other experts than the pivot language?",
        function=language_divergence,
        filters=PROMPT_TOKENS,
        parameters=(
            _DISTRIBUTION,
            _PIVOT,
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
            _DRAWS,
            _BOOTSTRAP,
            SEED,
        ),
    ),
    Analysis(
        name="language-pairs",
        title="Routing divergence of every two languages by layer",
        question="Which languages are routed alike, and which apart, at each layer?",
        function=language_pairs,
        filters=PROMPT_TOKENS,
        parameters=(_DISTRIBUTION, _FLOOR, _DRAWS, _BOOTSTRAP, SEED),
    ),
    Analysis(
        name="language-scores",
        title="Divergence from the pivot against a score, over languages",
        question="Do languages that are routed unlike the pivot also do worse?",
        function=language_scores,
        filters=PROMPT_TOKENS,
        parameters=(
            Parameter(
                name="score",
                type="conditions",
                default=CORRECT,
                help="a language's score is its share of prompts with FIELD=VALUE",
            ),
            Parameter(
                name="among",
                type="conditions",
                default=None,
                help="FIELD=VALUE of the prompts that the share is of; else all of the language",
            ),
            Parameter(
                name="scores",
                type="file",
                default=None,
                help="a CSV file with lang and score, instead of a share of prompts",
            ),
            Parameter(
                name="measure",
                type="choice",
                default="jsd_excess",
                help="divergence above the floor, raw, or entropy-normalized",
                choices=("jsd_excess", "jsd", "d_hjs"),
            ),
            _DISTRIBUTION,
            _PIVOT,
            _FLOOR,
            _DRAWS,
            SEED,
        ),
    ),
    Analysis(
        name="delta-experts",
        title="Experts that a language or task uses above a reference",
        question="Which experts does a language or a task use more often than a reference, by more "
        "than tau?",
        function=delta_experts,
        parameters=(
            Parameter(
                name="by",
                type="text",
                default="lang",
                help="prompt field: lang for language experts, domain for task experts",
            ),
            Parameter(
                name="reference",
                type="text",
                default=None,
                help="the value that the others are compared with",
                required=True,
            ),
            Parameter(
                name="tau", type="number", default=0.25, help="difference that makes an expert one"
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
)
