"""The columns of the table of languages."""

from __future__ import annotations

from moescope.probe.analysis.columns import KIND, LAYER, NUM_PROMPTS
from moescope.probe.analysis.frame import Column

_PAPER = "Bandarkar et al., arXiv 2510.04694"
_JSD_RANGE = "[0, ln 2]"
_D_RANGE = "[0, 1]; missing where both distributions are uniform"

COLUMNS = (
    Column(name="lang", unit="", range="text", definition="The language beside the pivot."),
    LAYER,
    KIND,
    Column(
        name="jsd",
        unit="nats",
        range=_JSD_RANGE,
        definition="Jensen-Shannon divergence of the mean routing distributions of a passage in "
        "the two languages, averaged over passages.",
        source=_PAPER,
    ),
    Column(
        name="jsd_low",
        unit="nats",
        range=f"{_JSD_RANGE}; missing with fewer than 2 passages",
        definition="2.5th percentile of jsd over resampled passages.",
    ),
    Column(
        name="jsd_high",
        unit="nats",
        range=f"{_JSD_RANGE}; missing with fewer than 2 passages",
        definition="97.5th percentile of jsd over resampled passages.",
    ),
    Column(
        name="d_hjs",
        unit="",
        range=_D_RANGE,
        definition="The same divergence over ln E minus the mean entropy of the two distributions, "
        "averaged over passages. Dominated by noise where the distributions are nearly uniform.",
        source=_PAPER,
    ),
    Column(
        name="d_low",
        unit="",
        range=_D_RANGE,
        definition="2.5th percentile of d_hjs over resampled passages.",
    ),
    Column(
        name="d_high",
        unit="",
        range=_D_RANGE,
        definition="97.5th percentile of d_hjs over resampled passages.",
    ),
    Column(
        name="jsd_compared",
        unit="nats",
        range=_JSD_RANGE,
        definition="Divergence of the two languages as the floor is computed: across two "
        "passages, phrasings or halves, on equal numbers of tokens where single tokens are known.",
    ),
    Column(
        name="jsd_floor",
        unit="nats",
        range=f"{_JSD_RANGE}; missing without a floor",
        definition="Divergence of each language with itself across the same two, mean of both "
        "languages: what is expected if language makes no difference.",
    ),
    Column(
        name="jsd_excess",
        unit="nats",
        range="[-ln 2, ln 2]; missing without a floor",
        definition="jsd_compared minus jsd_floor, mean over the comparisons: what language adds.",
    ),
    Column(
        name="excess_low",
        unit="nats",
        range="[-ln 2, ln 2]; missing without a floor",
        definition="2.5th percentile of jsd_excess over resampled comparisons.",
    ),
    Column(
        name="excess_high",
        unit="nats",
        range="[-ln 2, ln 2]; missing without a floor",
        definition="97.5th percentile of jsd_excess over resampled comparisons.",
    ),
    Column(
        name="d_compared",
        unit="",
        range=_D_RANGE,
        definition="Entropy-normalized divergence of the two languages, as for jsd_compared.",
    ),
    Column(
        name="d_floor",
        unit="",
        range=f"{_D_RANGE}; missing without a floor",
        definition="Entropy-normalized divergence of the same language with itself.",
    ),
    Column(
        name="tokens_compared",
        unit="tokens",
        range="0 or more; missing without a floor",
        definition="Tokens of a sample in jsd_compared, mean over the comparisons.",
    ),
    Column(
        name="num_compared",
        unit="comparisons",
        range="0 or more",
        definition="Comparisons behind floor and excess: pairs of passages, or passages with two "
        "phrasings or halves.",
    ),
    Column(
        name="num_passages",
        unit="passages",
        range="1 or more",
        definition="Passages with counted tokens in both languages.",
    ),
    Column(
        name="num_tokens",
        unit="tokens",
        range="1 or more",
        definition="Counted tokens of the language in these passages.",
    ),
    Column(
        name="num_tokens_pivot",
        unit="tokens",
        range="1 or more",
        definition="Counted tokens of the pivot language in these passages.",
    ),
    NUM_PROMPTS,
)
