"""Which experts of a layer are selected together: OLMoE's co-activation, with its chance level.

OLMoE (arXiv 2409.02060, section 5) gives the share of an expert's tokens that also select another
expert: asymmetric, and large for every pair with a busy expert. So each share stands beside the
share that the other expert's load alone would give, and their ratio.

Letters: E experts of a router, twice where pairs are meant.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from moescope.probe.analysis.columns import KIND, LAYER, NUM_PROMPTS, NUM_TOKENS, stack_parts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.intervals import jackknife_groups
from moescope.probe.analysis.measures import FloatArray, divide
from moescope.probe.analysis.pairs.pair_counts import PairCounts, check_rows, count_pairs
from moescope.probe.analysis.selection import Selection, select, unit_labels
from moescope.probe.analysis.token_slots import Tokens, read_tokens
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

Pairs = Literal["all", "adjacent"]

OLMOE = "OLMoE, arXiv 2409.02060, section 5"
SHARE_LOW = Column(
    name="low",
    unit="share of tokens",
    range="[0, 1]; missing with fewer than 2 units",
    definition="Lower end of the 95 % interval of share over units.",
)
SHARE_HIGH = Column(
    name="high",
    unit="share of tokens",
    range="[0, 1]; missing with fewer than 2 units",
    definition="Upper end of the 95 % interval of share over units.",
)
NUM_SLOTS = Column(
    name="num_slots",
    unit="slots",
    range="0 or more",
    definition="N_i: tokens that select the expert.",
)
NUM_UNITS = Column(
    name="num_units",
    unit="units",
    range="0 or more",
    definition="Units of resampling with a token that selects the expert.",
)
COLUMNS = (
    LAYER,
    KIND,
    Column(name="expert", unit="", range="[0, E-1]", definition="Routed expert i."),
    Column(name="other", unit="", range="[0, E-1] but i", definition="Routed expert j, not i."),
    Column(
        name="num_both",
        unit="tokens",
        range="0 or more",
        definition="N_ij: tokens that select both; with pairs adjacent, only those in which the "
        "two are neighbors in rank order.",
        source=OLMOE,
    ),
    Column(
        name="share",
        unit="share of tokens",
        range="[0, 1]; sums to K-1 over j; missing where no token selects i",
        definition="N_ij / N_i: tokens that select both, over tokens that select i. (With pairs "
        "adjacent it sums to 2(K-1)/K over j, on average over the slots.",
        source=OLMOE,
    ),
    SHARE_LOW,
    SHARE_HIGH,
    Column(
        name="expected",
        unit="share of tokens",
        range="[0, 1]; sums to K-1 over j",
        definition="Chance level of share: the other K-1 slots of i's tokens filled by load alone. "
        "With b = N_j / N the share of all tokens that select j, and K the mean slots of a token, "
        "the experts but i hold K - b_i of the K slots, so each of these slots is j's with "
        "probability b_j / (K - b_i): expected = (K-1) b_j / (K - b_i). With pairs adjacent a slot "
        "has 2(K-1)/K neighbors on average, which then stands for K-1.",
    ),
    Column(
        name="lift",
        unit="ratio",
        range="0 or more; 1 by chance; missing where share or chance is undefined or 0",
        definition="share / expected.",
    ),
    NUM_SLOTS,
    NUM_TOKENS,
    NUM_PROMPTS,
    NUM_UNITS,
)
_TITLES = {
    "all": "Experts selected together",
    "adjacent": "Experts selected together as neighbors in rank order",
}
_ADJACENT_NOTE = (
    "Pairs are neighbors in rank order, K-1 of the K(K-1)/2 pairs of a token, as the code released "
    "with OLMoE counts; its paper defines all pairs."
)


def expert_coactivation(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    pairs: Pairs = "all",
    unit: str = "pair_id",
) -> AnalysisTable:
    """Share of each expert's tokens that also select each other expert of its router.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        pairs: `all` pairs of a token's experts (the paper's formula), or `adjacent` ones in rank
            order (what the released code counts).
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.

    Raises:
        AnalysisInputError: for unknown pairs or fields, when the run holds no routing or (for
            `adjacent`) no ranks, no token has two slots, or the table would be too long.
    """
    if pairs not in _TITLES:
        raise AnalysisInputError(f"pairs is {pairs!r}; it is one of {', '.join(_TITLES)}")
    selection = select(store, run_id, filters or Filters(), fields=[unit])
    check_rows(
        sum(router.num_experts * (router.num_experts - 1) for router in selection.routers),
        "pairs of experts",
    )
    tokens, counts, notes = count_together(selection, unit, pairs=pairs)
    if pairs == "adjacent":
        notes = (*notes, _ADJACENT_NOTE)
    return AnalysisTable(
        name="coactivation",
        title=_TITLES[pairs],
        frame=stack_parts([_part(one, pairs) for one in counts], COLUMNS),
        columns=COLUMNS,
        context=selection.context(
            num_prompts=tokens.num_prompts,
            num_tokens=len(tokens),
            parameters={"pairs": pairs, "unit": unit},
        ),
        notes=(*selection.notes, *notes),
    )


def count_together(
    selection: Selection,
    unit: str,
    *,
    pairs: Pairs = "all",
    rng: np.random.Generator | None = None,
) -> tuple[Tokens, list[PairCounts], tuple[str, ...]]:
    """Pairs of experts within each router that gives some token two slots.

    Args:
        selection: with the field `unit`.
        unit: the prompt field that joins prompts into units.
        pairs: which pairs of a token count.
        rng: deals units into groups for a jackknife; without it there are none.

    Returns:
        The counted tokens, the counts of each router (the diagonal holds no pairs), and notes on
        routers that were left out.

    Raises:
        AnalysisInputError: when the run lacks what is asked, or no token has two slots.
    """
    tokens = read_tokens(selection)
    unit_P = unit_labels(selection.prompts, unit)
    adjacent = pairs == "adjacent"
    counted = count_pairs(
        selection,
        tokens,
        [(router, router) for router in selection.routers],
        unit_P,
        form=pairs,
        group_P=None if rng is None else jackknife_groups(unit_P, rng)[0],
        ranked="pairs adjacent" if adjacent else None,
    )
    for one in counted:
        # An expert paired with itself: no pair.
        for cells_EE in (one.pairs, one.squares, one.crosses, *one.group_pairs):
            np.fill_diagonal(cells_EE, 0)
    kept = [one for one in counted if one.pairs.any()]
    if not kept:
        raise AnalysisInputError(
            f"no counted token of run {selection.run_id!r} has two experts in one layer, so none "
            "are selected together; top-1 routers have transitions between layers only"
        )
    left_out = [one.first.layer for one in counted if not one.pairs.any()]
    if not left_out:
        return tokens, kept, ()
    listed = ", ".join(str(layer) for layer in left_out)
    return tokens, kept, (f"Layers in which no token has two experts, left out: {listed}.",)


def expected_share(counts: PairCounts, pairs: Pairs = "all") -> FloatArray:
    """The share of i's tokens that would select j by load alone, [E, E]; the diagonal is NaN.

    (K-1) b_j / (K - b_i) with b the share of tokens that select an expert and K their sum; of
    adjacent pairs 2(K-1)/K in place of K-1. NaN where all slots are i's.
    """
    base_E = counts.users / counts.num_tokens
    slots = base_E.sum()
    neighbors = 2 * (slots - 1) / slots if pairs == "adjacent" else slots - 1
    expected_EE = divide(neighbors * base_E[None, :], slots - base_E[:, None])
    np.fill_diagonal(expected_EE, np.nan)
    return expected_EE


def _part(counts: PairCounts, pairs: Pairs) -> dict[str, Any]:
    """The rows of one router."""
    router = counts.first
    expert, other = np.nonzero(~np.eye(router.num_experts, dtype=bool))
    share_EE, expected_EE = counts.share, expected_share(counts, pairs)
    low_EE, high_EE = counts.share_interval()
    cells = {
        "num_both": counts.pairs.astype(np.int64),
        "share": share_EE,
        "low": low_EE,
        "high": high_EE,
        "expected": expected_EE,
        "lift": divide(share_EE, expected_EE),
    }
    per_expert = {"num_slots": counts.users.astype(np.int64), "num_units": counts.user_units}
    return (
        {
            "layer": np.full(len(expert), router.layer),
            "kind": [router.kind] * len(expert),
            "expert": expert,
            "other": other,
        }
        | {name: values_EE[expert, other] for name, values_EE in cells.items()}
        | {name: values_E[expert] for name, values_E in per_expert.items()}
        | {
            "num_tokens": np.full(len(expert), counts.num_tokens),
            "num_prompts": np.full(len(expert), counts.num_prompts),
        }
    )
