"""Which experts a kind of text uses: by language, domain, label or any other prompt field.

Token share is OLMoE's domain specialization: the share of a value's tokens that select the expert,
to be read against chance K/E. Composition is the reverse: of the expert's use, how much comes from
each value. The two differ, and neither says that an expert is needed (for that it has to be
removed). Intervals resample whole units (items with all their translations), never tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from moescope.probe.analysis.counts import FloatArray, GroupedUsage, RouterUsage, read_counts
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
from moescope.probe.analysis.token_fields import TOKEN_FIELDS, token_field
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
        by: the field of prompts or tokens whose values are compared.
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
    fields = [unit] if by in TOKEN_FIELDS else [by, unit]
    selection = select(store, run_id, filters or Filters(), fields=fields)
    usage, units = _read_units(selection, by, unit)
    rng = np.random.default_rng(seed)
    weights = {
        value: bootstrap_weights(int(number), bootstrap, rng)
        for value, number in enumerate(units.num_units)
        if bootstrap and number >= 2
    }
    columns = (value_column(by), *COLUMNS)
    parts = [_part(router_usage, units, weights) for router_usage in usage.routers]
    parameters = {"by": by, "unit": unit, "bootstrap": bootstrap, "seed": seed}
    return AnalysisTable(
        name="specialization",
        title=f"Specialization by {by}",
        frame=stack_parts(parts, columns),
        columns=columns,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters=parameters
        ),
        notes=selection.notes
        if by in TOKEN_FIELDS
        else (*selection.notes, *missing_value_notes(selection, by)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Units:
    """The groups that usage was read for, one per (value, unit) with counted tokens.

    Attributes:
        values: the values that have counted tokens.
        groups: rows of the usage that belong to them, in order of value.
        value_of: index of the value of each of these rows.
        num_units, num_prompts: of each value.
    """

    values: list[str]
    groups: IntArray
    value_of: IntArray
    num_units: IntArray
    num_prompts: IntArray


def _read_units(selection: Selection, by: str, unit: str) -> tuple[GroupedUsage, _Units]:
    """Usage by (value, unit)."""
    unit_P = unit_labels(selection.prompts, unit)
    if by in TOKEN_FIELDS:
        field = token_field(selection, by)
        values: Sequence[str] = field.labels
        usage = read_counts(selection, unit_P, field=field)
        groups = np.flatnonzero(usage.group_prompts)
        groups = groups[np.argsort(groups % len(values), kind="stable")]
        value_G = groups % len(values)
    else:
        values, value_P = group_by_value(selection, by)
        num_units = int(unit_P.max()) + 1
        valued_P = value_P >= 0
        group_P = np.full(len(value_P), -1, dtype=np.int64)
        pairs, group_P[valued_P] = np.unique(
            value_P[valued_P] * num_units + unit_P[valued_P], return_inverse=True
        )
        usage = read_counts(selection, group_P)
        groups = np.flatnonzero(usage.group_prompts)
        value_G = pairs[groups] // num_units
    present, value_of = np.unique(value_G, return_inverse=True)
    prompts_V = np.bincount(value_of, weights=usage.group_prompts[groups])
    return usage, _Units(
        values=[values[index] for index in present],
        groups=groups,
        value_of=value_of,
        num_units=np.bincount(value_of),
        num_prompts=prompts_V.astype(np.int64),
    )


def _part(usage: RouterUsage, units: _Units, weights: Mapping[int, FloatArray]) -> dict[str, Any]:
    """The rows of one router; `weights` are the bootstrap weights [draws, units] by value."""
    router, num_values = usage.router, len(units.values)
    counts_UE, tokens_U = usage.counts[units.groups], usage.tokens[units.groups]
    starts = np.searchsorted(units.value_of, np.arange(num_values))
    counts_VE = np.add.reduceat(counts_UE, starts, axis=0)
    tokens_V = np.add.reduceat(tokens_U, starts)
    share_VE = divide(counts_VE, tokens_V[:, None])
    low_VE, high_VE = np.full((2, *share_VE.shape), np.nan)
    for value, weights_DU in weights.items():
        own = units.value_of == value
        draws_DE = divide(weights_DU @ counts_UE[own], (weights_DU @ tokens_U[own])[:, None])
        low_VE[value], high_VE[value] = percentile_interval(draws_DE)
    per_value = {
        "num_tokens": tokens_V.astype(np.int64),
        "num_prompts": units.num_prompts,
        "num_units": units.num_units,
    }
    return (
        expert_index(router, units.values)
        | {
            "token_share": share_VE.ravel(),
            "low": low_VE.ravel(),
            "high": high_VE.ravel(),
            "chance": np.full(share_VE.size, router.chance),
            "composition": normalize(share_VE.T).T.ravel(),
            "composition_chance": np.full(share_VE.size, 1 / num_values),
            "lift": _lift(share_VE).ravel(),
            "num_slots": counts_VE.ravel().astype(np.int64),
        }
        | {name: np.repeat(numbers, router.num_experts) for name, numbers in per_value.items()}
    )


def _lift(share_VE: FloatArray) -> FloatArray:
    """Each value's share over the mean share of the other values; missing for a single value."""
    num_values = len(share_VE)
    if num_values == 1:
        return np.full_like(share_VE, np.nan)
    others_VE = share_VE.sum(axis=0, keepdims=True) - share_VE
    # A sum minus its own term leaves rounding noise where the others are exactly zero.
    others_VE[others_VE < 1e-12] = 0.0
    return divide(share_VE, others_VE / (num_values - 1))
