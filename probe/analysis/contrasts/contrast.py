"""Which experts differ between two groups of prompts: found on one half, confirmed on another.

The groups are conditions on prompt fields; on observed outcomes (a: outcome=refused, b:
outcome=correct) this is the refusal contrast. The default effect is SteerMoE's risk difference
(arXiv 2509.09660): the share of a's tokens that select the expert minus the share of b's, pooled
over tokens, or averaged over units (Bandarkar et al., arXiv 2510.04694). `methods` lists
the other methods; all give the same columns, ready for plans.

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

from moescope.probe.analysis.cells import Cells, difference, two_classes
from moescope.probe.analysis.contrasts.columns import contrast_columns
from moescope.probe.analysis.contrasts.data import (
    ContrastData,
    read_markers,
    read_prompt_classes,
)
from moescope.probe.analysis.contrasts.discovery import ContrastResult, discover
from moescope.probe.analysis.contrasts.groups import (
    Conditions,
    Groups,
    describe,
    fields_of,
    prompt_groups,
    strata,
)
from moescope.probe.analysis.contrasts.methods import METHODS, leading_order
from moescope.probe.analysis.contrasts.rules import Rule, make_rule
from moescope.probe.analysis.contrasts.settings import ContrastSettings, check_settings
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.measures import divide
from moescope.probe.analysis.selection import IntArray, Router, Selection, select, unit_labels
from moescope.probe.storage.store import Store


def expert_contrast(
    store: Store,
    run_id: str,
    *,
    a: Conditions | None = None,
    b: Conditions | None = None,
    filters: Filters | None = None,
    unit: str = "pair_id",
    method: str = "risk_difference",
    measure: str | None = None,
    average: str | None = None,
    split: bool = True,
    candidates: int = 50,
    q: float = 0.05,
    bootstrap: int = 1_000,
    permutations: int | None = None,
    mass: float | None = None,
    stability: float | None = None,
    markers: Sequence[str] | Mapping[str, float] = (),
    seed: int = 0,
) -> AnalysisTable:
    """Rank all experts by how differently two groups use them, and confirm the strongest.

    Args:
        store: where the run lies.
        run_id: the run.
        a: prompt field -> values; all fields must hold. The first group. Methods that describe
            one group take all selected prompts without it.
        b: the second group. No prompt may be in both. With `ftri` the other classes of a's field;
            all of its other values by default.
        filters: which prompts (beside a and b), tokens and routers count.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.
        method: `risk_difference`, `log_odds`, `paired`, `ftri`, `npmi`, `safex`, `esft_token`,
            `esft_gate` or `seuf`; see `contrasts.methods`.
        measure: `selections`, routing `weights`, or `scores` of the router over all experts.
        average: `pooled` over tokens (long prompts weigh more), the mean over `unit`s or over
            `prompt`s, or (ftri) the `sum` a prompt; by default what the method's paper does.
        split: rank on one half of the units and test on the other; else max-T on all.
        candidates: how many experts are tested (safex: the n of its top-n).
        q: the level of the false discovery rate (without a split: of any false finding).
        bootstrap: draws for the 95 % intervals, and of safex.
        permutations: of the labels; at least, and by default, 20 * candidates / q (without a
            split 2,000, at least 20 / q).
        seed: of halves, permutations and bootstrap.
        mass: esft: the share of a router's score that its chosen experts reach; 0.2.
        stability: safex: the share of resamples in which a chosen expert is among the highest; 0.8.
        markers: npmi: tokens, each with a coefficient.

    Raises:
        AnalysisInputError: when a group is empty or has fewer than 2 units in what tests it, when
            groups overlap, or a parameter is out of range.
    """
    settings = check_settings(
        method=method, measure=measure, average=average, split=split, candidates=candidates, q=q,
        bootstrap=bootstrap, permutations=permutations, mass=mass, stability=stability,
        markers=markers, seed=seed,
    )  # fmt: skip
    fields = dict.fromkeys([*fields_of(a, b), unit, "lang"])
    selection = select(store, run_id, filters or Filters(), fields=list(fields))
    unit_P = unit_labels(selection.prompts, unit)
    groups = prompt_groups(
        selection, METHODS[method], a, b, unit_P=unit_P, fewest=4 if split else 2
    )
    if settings.markers:
        among = f", {describe(a)}" if a else ""
        groups, data = _at_markers(selection, groups, unit_P, settings, among)
    else:
        data = read_prompt_classes(
            selection, unit_P, groups.classes, settings.measure, settings.average
        )
    stratum_U = strata(selection.prompts["lang"], unit_P, groups.classes)
    rule = make_rule(settings, selection.routers, data.cells, groups.names)
    result = discover(data.cells, rule, stratum_U, settings)
    columns = contrast_columns(METHODS[method])
    used = {
        "a": None if a is None else {name: list(values) for name, values in a.items()},
        "b": None if b is None else {name: list(values) for name, values in b.items()},
        "unit": unit,
        **vars(settings),
        "markers": dict(settings.markers),
    }
    is_a_C, signed = _is_a(groups, settings), METHODS[method].signed
    frame = _frame(selection.routers, data, rule, result, is_a_C, signed=signed)
    return AnalysisTable(
        name="contrast",
        title=groups.title,
        frame=frame[[column.name for column in columns]],
        columns=columns,
        context=selection.context(
            num_prompts=data.num_prompts, num_tokens=data.num_tokens, parameters=used
        ),
        notes=(*selection.notes, *groups.notes, *result.notes),
        summary=result.summary,
    )


def _at_markers(
    selection: Selection,
    groups: Groups,
    unit_P: IntArray,
    settings: ContrastSettings,
    among: str,
) -> tuple[Groups, ContrastData]:
    """Tokens instead of prompts as classes, among the prompts of a."""
    kept = groups.classes == 0
    data = read_markers(selection, unit_P, kept, tuple(settings.markers))
    signs = ", ".join(
        token if value == 1 else f"{token} ({value:+g})"
        for token, value in settings.markers.items()
    )
    names = (*(f"marker {token!r}" for token in settings.markers), "the rest")
    found = Groups(classes=groups.classes, names=names, title=f"Experts at {signs}{among}")
    return found, data


def _is_a(groups: Groups, settings: ContrastSettings) -> IntArray:
    """Which classes the columns of a count: class 0, or the markers with positive coefficients."""
    if settings.markers:
        return np.flatnonzero(np.array([*settings.markers.values(), 0.0]) > 0)
    return np.zeros(1, dtype=np.int64)


def _frame(
    routers: Sequence[Router],
    data: ContrastData,
    rule: Rule,
    result: ContrastResult,
    is_a_C: IntArray,
    *,
    signed: bool,
) -> pd.DataFrame:
    """All experts, strongest score first."""
    size = len(result.score)
    experts = [router.num_experts for router in routers]
    tested: dict[str, Any] = {}
    for name in ("effect", "low", "high", "p", "q"):
        tested[name] = np.full(size, np.nan)
        tested[name][result.candidates] = getattr(result, name)
    is_candidate, is_confirmed = np.zeros((2, size), dtype=bool)
    is_candidate[result.candidates] = True
    is_confirmed[result.candidates] = result.confirmed
    own = two_classes(data.selected.rows(result.in_ranking), is_a_C)
    frame = pd.DataFrame(
        {
            "layer": np.repeat([router.layer for router in routers], experts),
            "kind": np.repeat([router.kind for router in routers], experts),
            "expert": np.concatenate([np.arange(number) for number in experts]),
            "score": result.score,
            "score_chance": rule.chance,
            "risk_difference": rule.prepared(own).scored(difference),
            "candidate": is_candidate,
            **tested,
            "confirmed": is_confirmed,
            **_counts(own),
            "chance": np.repeat([router.chance for router in routers], experts),
        }
    )
    for name, is_group in (("a", True), ("b", False)):
        prompts, tokens = data.size_of(is_a_C, is_group=is_group)
        frame[f"num_prompts_{name}"] = prompts
        frame[f"num_tokens_{name}"] = tokens
    return frame.iloc[leading_order(result.score, signed=signed)].reset_index(drop=True)


def _counts(own: Cells) -> dict[str, Any]:
    """Tokens that selected each expert or did not, in a and in b; missing without a b."""
    counts_CX, tokens_C = own.sums()
    found: dict[str, Any] = {}
    for number, name in enumerate(("1", "2")):
        active_X, tokens = counts_CX[number], tokens_C[number]
        known = bool(tokens)
        found[f"a{name}"] = active_X.astype(np.int64) if known else np.full(len(active_X), np.nan)
        found[f"d{name}"] = (
            (tokens - active_X).astype(np.int64) if known else np.full(len(active_X), np.nan)
        )
    rates_CX = divide(counts_CX, tokens_C[:, None])
    return found | {"rate_a": rates_CX[0], "rate_b": rates_CX[1]}
