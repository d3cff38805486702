"""Which experts a kind of text uses: by language, domain, label or any other prompt field.

Token share is OLMoE's domain specialization: the share of a value's tokens that select the expert,
to be read against chance K/E. Composition is the reverse: of the expert's use, how much comes from
each value. The two differ, and neither says that an expert is needed (for that it has to be
removed). Intervals resample whole units (items with all their translations), never tokens.
"""

from __future__ import annotations

import numpy as np

from moescope.probe.analysis.columns import (
    CHANCE,
    EXPERT,
    KIND,
    LAYER,
    NUM_PROMPTS,
    NUM_TOKENS,
    expert_index,
    stack_parts,
    value_column,
)
from moescope.probe.analysis.counts import FloatArray, GroupedUsage, read_counts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.measures import divide, normalize
from moescope.probe.analysis.selection import (
    IntArray,
    Selection,
    group_by_value,
    missing_value_notes,
    select,
    unit_labels,
)
from moescope.probe.analysis.statistics import bootstrap_weights, percentile_interval
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

COLUMNS = (
    LAYER,
    KIND,
    EXPERT,
    Column(
        name="token_share",
        unit="share of tokens",
        range="[0, 1]; sums to K over the experts of a router",
        definition="Tokens of this value that selected the expert, over all tokens of the value.",
        source="domain specialization: OLMoE, arXiv 2409.02060, section 5",
    ),
    Column(
        name="low",
        unit="share of tokens",
        range="[0, 1]",
        definition="2.5th percentile of the token share over resampled units.",
    ),
    Column(
        name="high",
        unit="share of tokens",
        range="[0, 1]",
        definition="97.5th percentile of the token share over resampled units.",
    ),
    CHANCE,
    Column(
        name="composition",
        unit="share of the expert's use",
        range="[0, 1]; sums to 1 over values; missing for an expert that no value uses",
        definition="Token share of this value over the sum of the token shares of all values: each "
        "value counts as if it had the same number of tokens.",
    ),
    Column(
        name="composition_chance",
        unit="share of the expert's use",
        range="1 / number of values",
        definition="Composition if all values used the expert alike.",
    ),
    Column(
        name="lift",
        unit="ratio",
        range="0 or more; 1 when the other values use it as much; missing when they never do",
        definition="Token share of this value over the mean token share of the other values.",
    ),
    Column(
        name="num_slots",
        unit="slots",
        range="0 or more",
        definition="Tokens of this value that selected the expert.",
    ),
    NUM_TOKENS,
    NUM_PROMPTS,
    Column(
        name="num_units",
        unit="units",
        range="1 or more",
        definition="Units of resampling with a counted token of this value.",
    ),
)


def expert_specialization(
    store: Store,
    run_id: str,
    *,
    by: str,
    filters: Filters | None = None,
    unit: str = "pair_id",
    bootstrap: int = 500,
    seed: int = 0,
) -> AnalysisTable:
    """Share of each value's tokens that use each expert, and the reverse.

    Args:
        store: where the run lies.
        run_id: the run.
        by: the prompt field whose values are compared.
        filters: which prompts, tokens and routers count.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.
        bootstrap: draws for the 95 % intervals; 0 leaves them missing. They are also missing
            where a value has fewer than 2 units.
        seed: of the draws.

    Raises:
        AnalysisInputError: for an unknown field, or when nothing is left to count.
    """
    if bootstrap < 0:
        raise AnalysisInputError(f"bootstrap is {bootstrap}; it is 0 (no intervals) or more")
    selection = select(store, run_id, filters or Filters(), fields=[by, unit])
    values, value_P = group_by_value(selection, by)
    usage, pair_value, num_units_V = _read_units(selection, unit, value_P, len(values))
    rng = np.random.default_rng(seed)
    weights = {
        value: bootstrap_weights(int(num_units_V[value]), bootstrap, rng)
        for value in range(len(values))
        if bootstrap and num_units_V[value] >= 2
    }
    prompts_V = np.bincount(value_P[(usage.tokens_P > 0) & (value_P >= 0)], minlength=len(values))
    parts = []
    for router_usage in usage.routers:
        router = router_usage.router
        counts_UE, tokens_U = router_usage.counts_GE, router_usage.tokens_G
        counts_VE = _sum_by(counts_UE, pair_value, len(values))
        tokens_V = _sum_by(tokens_U[:, None], pair_value, len(values))[:, 0]
        share_VE = divide(counts_VE, tokens_V[:, None])
        low_VE, high_VE = np.full((2, *share_VE.shape), np.nan)
        for value, weights_BU in weights.items():
            own = pair_value == value
            draws_BE = divide(weights_BU @ counts_UE[own], (weights_BU @ tokens_U[own])[:, None])
            low_VE[value], high_VE[value] = percentile_interval(draws_BE)
        parts.append(
            expert_index(router, values)
            | {
                "token_share": share_VE.ravel(),
                "low": low_VE.ravel(),
                "high": high_VE.ravel(),
                "chance": np.full(share_VE.size, router.chance),
                "composition": normalize(share_VE.T).T.ravel(),
                "composition_chance": np.full(share_VE.size, 1 / len(values)),
                "lift": _lift(share_VE).ravel(),
                "num_slots": counts_VE.ravel().astype(np.int64),
                "num_tokens": np.repeat(tokens_V, router.num_experts).astype(np.int64),
                "num_prompts": np.repeat(prompts_V, router.num_experts),
                "num_units": np.repeat(num_units_V, router.num_experts),
            }
        )
    columns = (value_column(by), *COLUMNS)
    parameters = {"by": by, "unit": unit, "bootstrap": bootstrap, "seed": seed}
    return AnalysisTable(
        name="specialization",
        title=f"Specialization by {by}",
        frame=stack_parts(parts, columns),
        columns=columns,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters=parameters
        ),
        notes=(*selection.notes, *missing_value_notes(selection, by)),
    )


def _read_units(
    selection: Selection, unit: str, value_P: IntArray, num_values: int
) -> tuple[GroupedUsage, IntArray, IntArray]:
    """Usage by (value, unit), the value of each such pair, and the counted units of each value."""
    unit_P = unit_labels(selection.prompts, unit)
    valued_P = value_P >= 0
    group_P = np.full(len(value_P), -1, dtype=np.int64)
    num_units = int(unit_P.max()) + 1
    pairs, group_P[valued_P] = np.unique(
        value_P[valued_P] * num_units + unit_P[valued_P], return_inverse=True
    )
    usage = read_counts(selection, group_P)
    pair_value = pairs // num_units
    counted = usage.prompts_G > 0
    return usage, pair_value, np.bincount(pair_value[counted], minlength=num_values)


def _sum_by(rows: FloatArray, group: IntArray, num_groups: int) -> FloatArray:
    """Sum rows [R, E] over their groups: [num_groups, E]; group must be ascending."""
    total = np.zeros((num_groups, rows.shape[1]))
    present, starts = np.unique(group, return_index=True)
    total[present] = np.add.reduceat(rows, starts, axis=0)
    return total


def _lift(share_VE: FloatArray) -> FloatArray:
    """Each value's share over the mean share of the other values; missing for a single value."""
    num_values = len(share_VE)
    others_VE = share_VE.sum(axis=0, keepdims=True) - share_VE
    if num_values == 1:
        return np.full_like(share_VE, np.nan)
    # A sum minus its own term leaves rounding noise where the others are exactly zero.
    others_VE[others_VE < 1e-12] = 0.0
    return divide(share_VE, others_VE / (num_values - 1))
