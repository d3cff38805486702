"""Which experts differ between two groups of prompts: found on one half, confirmed on another.

The groups are conditions on prompt fields; on observed outcomes (a: outcome=refused, b:
outcome=correct) this is the refusal contrast. The effect is SteerMoE's risk difference
(arXiv 2509.09660): the share of a's tokens that select the expert minus the share of b's, pooled
over tokens, or averaged over units (Bandarkar et al., arXiv 2510.04694).

All experts are ranked on the discovery half; the n strongest are tested on the confirmation half
(permutation of labels over units, Benjamini-Hochberg over the n). Without a split the same data
rank and test (step-down max-T over all experts), and the effects of the strongest are too large:
they were chosen for being large. A confirmed expert goes with the difference; whether it causes it
is another question, answered by removing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moescope.probe.analysis.contrast_columns import COLUMNS
from moescope.probe.analysis.counts import GroupedUsage, read_counts
from moescope.probe.analysis.discovery import (
    Average,
    ContrastResult,
    check_settings,
    contrast_parts,
)
from moescope.probe.analysis.filters import Filters, describe_conditions
from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.selection import (
    IntArray,
    Selection,
    matching_prompts,
    select,
    unit_labels,
)
from moescope.probe.analysis.statistics import BoolArray, Parts
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

Conditions = Mapping[str, Sequence[str]]


def expert_contrast(
    store: Store,
    run_id: str,
    *,
    a: Conditions,
    b: Conditions,
    filters: Filters | None = None,
    average: Average = "pooled",
    unit: str = "pair_id",
    split: bool = True,
    candidates: int = 50,
    q: float = 0.05,
    bootstrap: int = 1_000,
    permutations: int | None = None,
    seed: int = 0,
) -> AnalysisTable:
    """Rank all experts by how differently two groups use them, and confirm the strongest.

    Args:
        store: where the run lies.
        run_id: the run.
        a: prompt field -> values; all fields must hold. The first group.
        b: the second group. No prompt may be in both.
        filters: which prompts (beside a and b), tokens and routers count.
        average: `pooled` over tokens (long prompts weigh more) or the mean over `unit`s.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.
        split: rank on one half of the units and test on the other; else max-T on all.
        candidates: how many experts are tested.
        q: the level of the false discovery rate (without a split: of any false finding).
        bootstrap: draws for the 95 % intervals.
        permutations: of the labels; at least, and by default, 20 * candidates / q (without a
            split 2,000, at least 20 / q).
        seed: of halves, permutations and bootstrap.

    Raises:
        AnalysisInputError: when a group is empty or has fewer than 2 units in what tests it, when
            groups overlap, or a parameter is out of range.
    """
    settings = check_settings(average, split, candidates, q, bootstrap, permutations, seed)
    fields = dict.fromkeys([*a, *b, unit, "lang"])
    selection = select(store, run_id, filters or Filters(), fields=list(fields))
    in_a, in_b = _groups(selection, a, b)
    unit_P = unit_labels(selection.prompts, unit)
    usage, parts = _read_parts(selection, unit_P, in_a, in_b)
    strata = _strata(selection.prompts["lang"], unit_P, in_a, in_b)
    result = contrast_parts(parts, strata, settings)
    parameters = {
        "a": {name: list(values) for name, values in a.items()},
        "b": {name: list(values) for name, values in b.items()},
        "unit": unit,
        **vars(settings),
    }
    return AnalysisTable(
        name="contrast",
        title=f"Experts: {_describe(a)} against {_describe(b)}",
        frame=_frame(selection, usage, result, in_a, in_b),
        columns=COLUMNS,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters=parameters
        ),
        notes=(*selection.notes, *result.notes),
        summary=result.summary,
    )


def _groups(selection: Selection, a: Conditions, b: Conditions) -> tuple[BoolArray, BoolArray]:
    """Which selected prompts are in a, and in b."""
    groups = []
    for name, conditions in (("a", a), ("b", b)):
        if not conditions:
            raise AnalysisInputError(f"group {name} has no condition; write FIELD=VALUE")
        kept = matching_prompts(
            selection.prompts, {field: tuple(values) for field, values in conditions.items()}
        )
        if not kept.any():
            held = "; ".join(_held_values(selection, field) for field in conditions)
            raise AnalysisInputError(
                f"group {name} ({_describe(conditions)}) holds no prompt; {held}"
            )
        groups.append(kept)
    both = int((groups[0] & groups[1]).sum())
    if both:
        raise AnalysisInputError(
            f"{both} prompts are in both groups; a and b must exclude each other"
        )
    return groups[0], groups[1]


def _held_values(selection: Selection, field: str) -> str:
    values = sorted(selection.prompts[field].dropna().unique())
    shown = ", ".join(values[:8]) + (", …" if len(values) > 8 else "")
    return f"{field} holds {shown or 'nothing'}"


def _describe(conditions: Conditions) -> str:
    return describe_conditions({field: tuple(values) for field, values in conditions.items()})


def _read_parts(
    selection: Selection, unit_P: IntArray, in_a: BoolArray, in_b: BoolArray
) -> tuple[GroupedUsage, Parts]:
    """Counts of each unit in each group, all routers side by side."""
    group_P = np.full(len(unit_P), -1, dtype=np.int64)
    kept = in_a | in_b
    keys, group_P[kept] = np.unique(2 * unit_P[kept] + in_a[kept], return_inverse=True)
    usage = read_counts(selection, group_P, dtype=np.float32)
    tokens = np.stack([router_usage.tokens for router_usage in usage.routers])
    if (tokens != tokens[0]).any():
        kinds = ", ".join(sorted({router.kind for router in selection.routers}))
        raise AnalysisInputError(
            f"the routers of run {selection.run_id!r} did not see the same tokens ({kinds}); "
            "contrast the routers of one kind, or fewer layers"
        )
    parts = Parts(
        counts=np.concatenate([usage.counts for usage in usage.routers], axis=1),
        tokens=tokens[0],
        units=keys // 2,
        is_a=keys % 2 == 1,
    )
    return usage, parts.rows(tokens[0] > 0)


def _strata(lang: pd.Series, unit_P: IntArray, in_a: BoolArray, in_b: BoolArray) -> IntArray:
    """Stratum of each unit: a only, both, b only; within these the languages of the unit.

    Units with both labels lie between the others, so that dealing out units in turn halves each
    group as a whole to within one unit.
    """
    prompts = pd.DataFrame({"unit": unit_P, "lang": lang.fillna(""), "a": in_a, "b": in_b})
    units = (
        prompts[in_a | in_b]
        .groupby("unit")
        .agg(
            a=("a", "any"),
            b=("b", "any"),
            langs=("lang", lambda langs: "\n".join(sorted(set(langs)))),
        )
    )
    label = np.where(units["a"], np.where(units["b"], 1, 0), 2)
    languages, _ = pd.factorize(units["langs"], sort=True)
    stratum_U = np.zeros(int(unit_P.max()) + 1, dtype=np.int64)
    stratum_U[units.index.to_numpy()] = label * (len(units) + 1) + languages + 1
    return stratum_U


def _frame(
    selection: Selection,
    usage: GroupedUsage,
    result: ContrastResult,
    in_a: BoolArray,
    in_b: BoolArray,
) -> pd.DataFrame:
    """All experts, strongest difference first."""
    ranking, size = result.ranking, len(result.difference)
    tokens_a = ranking.tokens[ranking.is_a].sum()
    tokens_b = ranking.tokens[~ranking.is_a].sum()
    active_a = ranking.counts[ranking.is_a].sum(axis=0, dtype=np.float64)
    active_b = ranking.counts[~ranking.is_a].sum(axis=0, dtype=np.float64)
    experts = [router.num_experts for router in selection.routers]
    tested: dict[str, Any] = {}
    for name in ("effect", "low", "high", "p", "q"):
        tested[name] = np.full(size, np.nan)
        tested[name][result.candidates] = getattr(result, name)
    is_candidate, is_confirmed = np.zeros((2, size), dtype=bool)
    is_candidate[result.candidates] = True
    is_confirmed[result.candidates] = result.confirmed
    has_tokens = usage.prompt_tokens > 0
    frame = pd.DataFrame(
        {
            "layer": np.repeat([router.layer for router in selection.routers], experts),
            "kind": np.repeat([router.kind for router in selection.routers], experts),
            "expert": np.concatenate([np.arange(number) for number in experts]),
            "risk_difference": result.difference,
            "candidate": is_candidate,
            **tested,
            "confirmed": is_confirmed,
            "a1": active_a.astype(np.int64),
            "d1": (tokens_a - active_a).astype(np.int64),
            "a2": active_b.astype(np.int64),
            "d2": (tokens_b - active_b).astype(np.int64),
            "rate_a": active_a / tokens_a,
            "rate_b": active_b / tokens_b,
            "chance": np.repeat([router.chance for router in selection.routers], experts),
            "num_prompts_a": int((has_tokens & in_a).sum()),
            "num_prompts_b": int((has_tokens & in_b).sum()),
            "num_tokens_a": int(usage.prompt_tokens[in_a].sum()),
            "num_tokens_b": int(usage.prompt_tokens[in_b].sum()),
        }
    )
    order = np.argsort(-np.abs(result.difference), kind="stable")
    return frame.iloc[order].reset_index(drop=True)[[column.name for column in COLUMNS]]
