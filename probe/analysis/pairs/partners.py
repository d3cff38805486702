"""Whom each expert works with: its strongest partner, and how many partners it has in effect.

Dynamic-DINO (Lu et al., arXiv 2507.17436) reports that experts of deep layers keep two or three
fixed partners while those of shallow layers cooperate with many. Their formula is not at hand, so
the measures here are our own definition of that finding, each beside what the load alone gives.

Letters: E experts of a router, twice where pairs are meant, G groups of units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.probe.analysis.columns import (
    EXPERT,
    KIND,
    LAYER,
    NUM_PROMPTS,
    NUM_TOKENS,
    expert_index,
    stack_parts,
)
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.intervals import jackknife_interval
from moescope.probe.analysis.measures import FloatArray, divide, entropy_nats, normalize
from moescope.probe.analysis.pairs.coactivation import (
    NUM_SLOTS,
    NUM_UNITS,
    SHARE_HIGH,
    SHARE_LOW,
    count_together,
    expected_share,
)
from moescope.probe.analysis.pairs.pair_counts import PairCounts
from moescope.probe.analysis.selection import select
from moescope.probe.storage.store import Store

_SOURCE = "moescope, after Dynamic-DINO, arXiv 2507.17436"
_UNDEFINED = "missing where the expert is never selected with another"
TOP = 3

COLUMNS = (
    LAYER,
    KIND,
    EXPERT,
    Column(
        name="partner",
        unit="",
        range=f"expert id; the lowest of equals; {_UNDEFINED}",
        definition="The expert that most of this expert's tokens also select.",
        source=_SOURCE,
    ),
    Column(
        name="share",
        unit="share of tokens",
        range=f"[0, 1]; {_UNDEFINED}",
        definition="Tokens that select both, over tokens that select the expert. As the largest of "
        "E-1 shares it is too high for an expert with few tokens.",
        source=_SOURCE,
    ),
    SHARE_LOW,
    SHARE_HIGH,
    Column(
        name="expected",
        unit="share of tokens",
        range="[0, 1]",
        definition="Chance level of share: what the partner's load alone gives, (K-1) b_j / "
        "(K - b_i) as in the analysis coactivation.",
    ),
    Column(
        name="lift", unit="ratio", range="0 or more; 1 by chance", definition="share / expected."
    ),
    Column(
        name="mutual",
        unit="",
        range=f"yes or no; {_UNDEFINED}",
        definition="Whether the expert is also its partner's partner.",
        source=_SOURCE,
    ),
    Column(
        name="effective_partners",
        unit="experts",
        range=f"[1, E-1]; {_UNDEFINED}",
        definition="exp(H(q)), q_j = N_ij / sum over j of N_ij: the number of partners, all used "
        "alike, that would have the same entropy. Few tokens make it too low.",
        source=_SOURCE,
    ),
    Column(
        name="effective_low",
        unit="experts",
        range="[1, E-1]; missing with fewer than 2 groups of units",
        definition="Lower end of its 95 % interval over units (delete-a-group jackknife).",
    ),
    Column(
        name="effective_high",
        unit="experts",
        range="[1, E-1]; missing with fewer than 2 groups of units",
        definition="Upper end of its 95 % interval over units (delete-a-group jackknife).",
    ),
    Column(
        name="effective_partners_chance",
        unit="experts",
        range="[1, E-1]",
        definition="The same of the expected shares: partners in effect if load alone decided.",
    ),
    Column(
        name="top3_share",
        unit="share of co-selections",
        range=f"[0, 1]; {_UNDEFINED}",
        definition="The three largest q_j together.",
        source=_SOURCE,
    ),
    Column(
        name="top3_share_chance",
        unit="share of co-selections",
        range="[0, 1]",
        definition="The same of the expected shares.",
    ),
    NUM_SLOTS,
    NUM_TOKENS,
    NUM_PROMPTS,
    NUM_UNITS,
)


def expert_partners(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    unit: str = "pair_id",
    seed: int = 0,
) -> AnalysisTable:
    """The strongest partner of each expert, and its number of partners in effect.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.
        seed: of the groups of units that the jackknife leaves out.

    Raises:
        AnalysisInputError: for an unknown field, when the run holds no routing, or when no token
            has two slots.
    """
    selection = select(store, run_id, filters or Filters(), fields=[unit])
    rng = np.random.default_rng(seed)
    tokens, counts, notes = count_together(selection, unit, rng=rng)
    frame = stack_parts([_part(one) for one in counts], COLUMNS)
    return AnalysisTable(
        name="partners",
        title="Partners of the experts",
        frame=frame,
        columns=COLUMNS,
        context=selection.context(
            num_prompts=tokens.num_prompts,
            num_tokens=len(tokens),
            parameters={"unit": unit, "seed": seed},
        ),
        notes=(*selection.notes, *notes),
        summary=_summary(frame),
    )


def _part(counts: PairCounts) -> dict[str, Any]:
    """The rows of one router."""
    size = counts.first.num_experts
    experts = np.arange(size)
    expected_EE = expected_share(counts)
    low_EE, high_EE = counts.share_interval()
    has_partner: NDArray[np.bool_] = np.asarray(counts.pairs.any(axis=1))
    partner_E = counts.pairs.argmax(axis=1)

    def of_partner(values_EE: FloatArray) -> FloatArray:
        return np.where(has_partner, values_EE[experts, partner_E], np.nan)

    # Chance of an expert that could have no partner is undefined, as its partners are.
    chance_EE = normalize(np.nan_to_num(expected_EE))
    effective_E = _effective(counts.pairs)
    low_E, high_E = jackknife_interval(
        effective_E,
        _effective(counts.pairs - counts.group_pairs.astype(np.float64)),
        bounds=(1.0, max(1.0, size - 1.0)),
    )
    share_E, expected_E = of_partner(counts.share), of_partner(expected_EE)
    return expert_index(counts.first, None) | {
        "partner": pd.arrays.IntegerArray(partner_E, ~has_partner),
        "share": share_E,
        "low": of_partner(low_EE),
        "high": of_partner(high_EE),
        "expected": expected_E,
        "lift": divide(share_E, expected_E),
        "mutual": pd.arrays.BooleanArray(partner_E[partner_E] == experts, ~has_partner),
        "effective_partners": effective_E,
        "effective_low": low_E,
        "effective_high": high_E,
        "effective_partners_chance": np.exp(entropy_nats(chance_EE)),
        "top3_share": _top_share(normalize(counts.pairs)),
        "top3_share_chance": _top_share(chance_EE),
        "num_slots": counts.users.astype(np.int64),
        "num_tokens": np.full(size, counts.num_tokens),
        "num_prompts": np.full(size, counts.num_prompts),
        "num_units": counts.user_units,
    }


def _effective(pairs_EE: FloatArray) -> FloatArray:
    """Effective number of entries of each row, exp(H), [..., E, E] -> [..., E]; NaN for zeros."""
    return np.exp(entropy_nats(normalize(pairs_EE)))


def _top_share(distribution_EE: FloatArray) -> FloatArray:
    """The largest three of each row together, [E]."""
    return np.asarray(np.sort(distribution_EE, axis=1)[:, -TOP:].sum(axis=1))


def _summary(frame: pd.DataFrame) -> dict[str, Any]:
    """Single numbers over all experts that have a partner."""
    known = frame[frame["partner"].notna()]
    medians = ("effective_partners", "effective_partners_chance", "top3_share", "share", "lift")
    return {f"median_{name}": float(known[name].median()) for name in medians} | {
        "share_of_mutual_partners": float(known["mutual"].mean()),
        "experts_without_partner": int(frame["partner"].isna().sum()),
    }
