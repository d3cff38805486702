"""The columns of a contrast table, which plans are made from."""

from __future__ import annotations

from moescope.probe.analysis.columns import CHANCE, EXPERT, KIND, LAYER
from moescope.probe.analysis.frame import Column

_STEERMOE = "SteerMoE, arXiv 2509.09660"
_RANKING = "the discovery half (all units without a split)"

COLUMNS = (
    LAYER,
    KIND,
    EXPERT,
    Column(
        name="risk_difference",
        unit="share of tokens",
        range="[-1, 1]",
        definition="Share of a's tokens that selected the expert minus share of b's, on "
        f"{_RANKING}: what ranks the experts. Pooled over tokens, or the difference of the means "
        "over units.",
        source=_STEERMOE,
    ),
    Column(
        name="candidate",
        unit="",
        range="true or false",
        definition="Whether the expert is among the n strongest and was tested.",
    ),
    Column(
        name="effect",
        unit="share of tokens",
        range="[-1, 1]; missing for experts that were not tested",
        definition="The same difference on the confirmation half. Without a split it equals "
        "risk_difference and is optimistic.",
    ),
    Column(
        name="low",
        unit="share of tokens",
        range="[-1, 1]; missing for experts that were not tested",
        definition="2.5th percentile of the effect over resampled units.",
    ),
    Column(
        name="high",
        unit="share of tokens",
        range="[-1, 1]; missing for experts that were not tested",
        definition="97.5th percentile of the effect over resampled units.",
    ),
    Column(
        name="p",
        unit="probability",
        range="(0, 1]; missing for experts that were not tested",
        definition="(b + 1) / (B + 1) of the studentized difference with labels permuted over "
        "units, two-sided; without a split step-down max-T over all experts.",
    ),
    Column(
        name="q",
        unit="probability",
        range="(0, 1]; missing for experts that were not tested, and without a split",
        definition="Benjamini-Hochberg adjusted p over the candidates.",
        source="Benjamini and Hochberg 1995",
    ),
    Column(
        name="confirmed",
        unit="",
        range="true or false",
        definition="Whether q (without a split: p) is at most the level, with the sign that the "
        "ranking had.",
    ),
    Column(
        name="a1",
        unit="tokens",
        range="0 or more",
        definition=f"Tokens of a that selected the expert, on {_RANKING}.",
        source=_STEERMOE,
    ),
    Column(
        name="d1",
        unit="tokens",
        range="0 or more",
        definition=f"Tokens of a that did not, on {_RANKING}.",
        source=_STEERMOE,
    ),
    Column(
        name="a2",
        unit="tokens",
        range="0 or more",
        definition=f"Tokens of b that selected the expert, on {_RANKING}.",
        source=_STEERMOE,
    ),
    Column(
        name="d2",
        unit="tokens",
        range="0 or more",
        definition=f"Tokens of b that did not, on {_RANKING}.",
        source=_STEERMOE,
    ),
    Column(
        name="rate_a",
        unit="share of tokens",
        range="[0, 1]",
        definition="a1 / (a1 + d1): pooled, also where the difference is averaged over units.",
    ),
    Column(
        name="rate_b",
        unit="share of tokens",
        range="[0, 1]",
        definition="a2 / (a2 + d2): pooled, also where the difference is averaged over units.",
    ),
    CHANCE,
    Column(
        name="num_prompts_a",
        unit="prompts",
        range="2 or more",
        definition="Prompts of a with a counted token, both halves.",
    ),
    Column(
        name="num_prompts_b",
        unit="prompts",
        range="2 or more",
        definition="Prompts of b with a counted token, both halves.",
    ),
    Column(
        name="num_tokens_a",
        unit="tokens",
        range="1 or more",
        definition="Counted tokens of a, both halves.",
    ),
    Column(
        name="num_tokens_b",
        unit="tokens",
        range="1 or more",
        definition="Counted tokens of b, both halves.",
    ),
)
