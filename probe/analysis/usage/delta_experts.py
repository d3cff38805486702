"""Experts that a language or a task uses more often than a reference, by more than a threshold.

Bandarkar et al. (arXiv 2510.04694): for every sequence the share of its tokens that select an
expert; the mean over the sequences of a group minus the mean over those of a reference is delta.
An expert with delta above tau is an expert of that task, or of that language. Every sequence counts
alike, unlike in a pooled risk difference. Their thresholds were 0.25 to 0.5.

Whether an expert is above tau says nothing about noise, so every delta has an interval over units.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moescope.probe.analysis.columns import (
    EXPERT,
    KIND,
    LAYER,
    expert_index,
    stack_parts,
    value_column,
)
from moescope.probe.analysis.counts import FloatArray, RouterUsage, read_counts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.measures import divide
from moescope.probe.analysis.selection import (
    IntArray,
    group_by_value,
    missing_value_notes,
    select,
    unit_labels,
)
from moescope.probe.analysis.statistics import BoolArray, bootstrap_weights, percentile_interval
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

_PAPER = "Bandarkar et al., arXiv 2510.04694"
COLUMNS = (
    LAYER,
    KIND,
    EXPERT,
    Column(
        name="rate",
        unit="share of tokens",
        range="[0, 1]",
        definition="Share of a prompt's counted tokens that select the expert, mean over the "
        "prompts of this value.",
        source=_PAPER,
    ),
    Column(
        name="rate_reference",
        unit="share of tokens",
        range="[0, 1]",
        definition="The same over the prompts of the reference.",
        source=_PAPER,
    ),
    Column(
        name="delta",
        unit="share of tokens",
        range="[-1, 1]",
        definition="rate minus rate_reference.",
        source=_PAPER,
    ),
    Column(
        name="low",
        unit="share of tokens",
        range="[-1, 1]; missing with fewer than 2 units",
        definition="2.5th percentile of delta over resampled units.",
    ),
    Column(
        name="high",
        unit="share of tokens",
        range="[-1, 1]; missing with fewer than 2 units",
        definition="97.5th percentile of delta over resampled units.",
    ),
    Column(
        name="above",
        unit="",
        range="yes or no",
        definition="Whether delta is above tau: an expert of this value.",
        source=_PAPER,
    ),
    Column(
        name="surely_above",
        unit="",
        range="yes or no",
        definition="Whether the whole interval is above tau.",
    ),
    Column(
        name="chance",
        unit="share of tokens",
        range="K/E",
        definition="rate if all experts were used alike; delta is then 0.",
    ),
    Column(
        name="num_tokens",
        unit="tokens",
        range="1 or more",
        definition="Counted tokens of this value.",
    ),
    Column(
        name="num_prompts",
        unit="prompts",
        range="1 or more",
        definition="Prompts of this value with a counted token.",
    ),
    Column(
        name="num_units",
        unit="units",
        range="1 or more",
        definition="Units of resampling in this value or the reference.",
    ),
)


def delta_experts(
    store: Store,
    run_id: str,
    *,
    by: str = "lang",
    reference: str,
    tau: float = 0.25,
    filters: Filters | None = None,
    unit: str = "pair_id",
    bootstrap: int = 500,
    seed: int = 0,
) -> AnalysisTable:
    """Difference of per-prompt rates between each value of a field and a reference value.

    Args:
        store: where the run lies.
        run_id: the run.
        by: the prompt field: `lang` for language experts, `domain` or `set_name` for task experts.
        reference: the value that the others are compared with.
        tau: the threshold.
        filters: which prompts, tokens and routers count.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own. A unit in both groups is drawn for both at once.
        bootstrap: draws for the 95 % intervals; 0 leaves them missing.
        seed: of the draws.

    Raises:
        AnalysisInputError: for an unknown field or value, or when nothing is left to count.
    """
    if bootstrap < 0:
        raise AnalysisInputError(f"bootstrap is {bootstrap}; it is 0 (no intervals) or more")
    selection = select(store, run_id, filters or Filters(), fields=[by, unit])
    values, value_P = group_by_value(selection, by)
    if reference not in values or len(values) < 2:
        raise AnalysisInputError(
            f"reference {reference!r} must be one of at least two values of {by} in run "
            f"{run_id!r}; it has {', '.join(values)}"
        )
    kept_P = np.flatnonzero(value_P >= 0)
    group_P = np.full(len(value_P), -1, dtype=np.int64)
    group_P[kept_P] = np.arange(len(kept_P))
    usage = read_counts(selection, group_P, dtype=np.float32)
    unit_P = unit_labels(selection.prompts, unit)[kept_P]
    groups = [value_P[kept_P] == index for index in range(len(values))]
    parts = []
    for index, value in enumerate(values):
        if value == reference:
            continue
        rng = np.random.default_rng([seed, index])
        two = (groups[index], groups[values.index(reference)])
        parts += [
            _part(one, value, two, unit_P, tau, bootstrap, rng.spawn(1)[0]) for one in usage.routers
        ]
    columns = (value_column(by), *COLUMNS)
    parameters = {
        "by": by, "reference": reference, "tau": tau, "unit": unit, "bootstrap": bootstrap,
        "seed": seed,
    }  # fmt: skip
    frame = stack_parts(parts, columns)
    return AnalysisTable(
        name="delta-experts",
        title=f"Experts of each {by} by their rate above that of {reference}",
        frame=frame.sort_values("delta", ascending=False, kind="stable", ignore_index=True),
        columns=columns,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters=parameters
        ),
        notes=(*selection.notes, *missing_value_notes(selection, by)),
        summary={f"above tau in {value}": int(n) for value, n in _num_above(frame).items()},
    )


def _num_above(frame: Any) -> dict[str, int]:
    return dict(frame.groupby("value", sort=True)["above"].sum())


def _part(
    usage: RouterUsage,
    value: str,
    members: tuple[BoolArray, BoolArray],
    unit_P: IntArray,
    tau: float,
    bootstrap: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The rows of one value at one router; `members` are its prompts and the reference's."""
    chosen = [np.flatnonzero(member_P & (usage.tokens > 0)) for member_P in members]
    rates = [divide(usage.counts[rows], usage.tokens[rows][:, None]) for rows in chosen]
    rate_E, reference_E = (_mean(rate_PE) for rate_PE in rates)
    delta_E = rate_E - reference_E
    units, of_row = np.unique(unit_P[np.concatenate(chosen)], return_inverse=True)
    low_E = high_E = np.full(usage.router.num_experts, np.nan)
    if bootstrap and len(units) >= 2:
        weights_DR = bootstrap_weights(len(units), bootstrap, rng)[:, of_row]
        parts = np.split(weights_DR, [len(chosen[0])], axis=1)
        drawn = [
            divide(weights @ rate_PE, weights.sum(axis=1, keepdims=True))
            for weights, rate_PE in zip(parts, rates, strict=True)
        ]
        low_E, high_E = percentile_interval(drawn[0] - drawn[1])
    of_value = {
        "chance": usage.router.chance,
        "num_tokens": int(usage.tokens[chosen[0]].sum()),
        "num_prompts": len(chosen[0]),
        "num_units": len(units),
    }
    return (
        expert_index(usage.router, [value])
        | {"rate": rate_E, "rate_reference": reference_E, "delta": delta_E}
        | {"low": low_E, "high": high_E, "above": delta_E > tau, "surely_above": low_E > tau}
        | {name: np.full(len(delta_E), number) for name, number in of_value.items()}
    )


def _mean(rate_PE: FloatArray) -> FloatArray:
    """Mean over prompts; missing where there is none."""
    return divide(rate_PE.sum(axis=0), len(rate_PE))
