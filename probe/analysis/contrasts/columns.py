"""The columns of a contrast table, which plans are made from."""

from __future__ import annotations

from moescope.probe.analysis.columns import CHANCE, EXPERT, KIND, LAYER
from moescope.probe.analysis.contrasts.methods import Method
from moescope.probe.analysis.frame import Column

_STEERMOE = "SteerMoE, arXiv 2509.09660"
_RANKING = "the discovery half (all units without a split)"


def contrast_columns(method: Method) -> tuple[Column, ...]:
    """The columns of a table of this method: they differ in what the score is."""
    return (LAYER, KIND, EXPERT, method.score, *_COLUMNS)


_COLUMNS = (
    Column(
        name="score_chance",
        unit="as score",
        range="0 for methods that compare",
        definition="The score if no expert were preferred.",
    ),
    Column(
        name="risk_difference",
        unit="share of tokens",
        range="[-1, 1]",
        definition="Share of a's tokens that selected the expert minus share of b's, on "
        f"{_RANKING}: pooled over tokens, or the difference of the means over units. Missing "
        "without a b.",
        source=_STEERMOE,
    ),
    Column(
        name="candidate",
        unit="",
        range="true or false",
        definition="Whether the method chose the expert, to be tested: it is among the n "
        "strongest, or (ESFT, SAFEx) meets the method's own rule.",
    ),
    Column(
        name="effect",
        unit="as score (SAFEx: share of tokens)",
        range="missing for experts that were not chosen",
        definition="The score, measured on the confirmation half; of SAFEx the rate difference, "
        "or the rate of one group. Without a split, and for one group, on all units; without a "
        "split it is optimistic.",
    ),
    Column(
        name="low",
        unit="as effect",
        range="missing for experts that were not chosen",
        definition="2.5th percentile of the effect over resampled units.",
    ),
    Column(
        name="high",
        unit="as effect",
        range="missing for experts that were not chosen",
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
        "ranking had; of one group: whether each half of the units chooses the expert too.",
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
        range="0 or more",
        definition="Prompts of a with a counted token, both halves.",
    ),
    Column(
        name="num_prompts_b",
        unit="prompts",
        range="0 or more",
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
        range="0 or more",
        definition="Counted tokens of b, both halves.",
    ),
)
