"""At which layers, and how strongly, a language uses other experts than the pivot language.

Bandarkar et al., "Multilingual Routing in Mixture-of-Experts", arXiv 2510.04694: for every
passage that exists in both languages (same `pair_id`) the mean routing distribution over experts
is compared between the two, and the divergences are averaged over passages. They count all tokens
of the templated prompt; by default we count the content tokens of the prompt.

Two things mislead. The normalized divergence is dominated by noise where both distributions are
nearly uniform, so the raw one always stands beside it. And divergences of small samples are biased
upward, more for the language with fewer tokens. Both call for a *floor*: the divergence that the
same language shows with itself. Ideally that is the same content in another phrasing; prompt sets
rarely have one, so there are two stand-ins (`floor`):

- `halves`: both sides of a passage are subsampled, without replacement, to the same number of
  tokens m, half of the shorter side; the floor compares two disjoint samples of m tokens of the
  *same* side (mean of both sides), the comparison two samples of m tokens of the two sides.
  Both share count and passage, so their difference is free of the small-sample bias. It is
  a low floor: same words, only other tokens of them. Needs routing rows, and q `topk` or `counts`.
- `other_passages`: the floor compares each passage with the passage of the same language whose
  token count is nearest. A high floor: it holds what differs in content, too. Needs usage only;
  token counts of the two languages are not made equal.

Letters: G groups (passage, language), N passages of one pair of languages, E experts, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from moescope.probe.analysis.columns import stack_parts
from moescope.probe.analysis.counts import (
    FloatArray,
    GroupedUsage,
    Quantity,
    RouterUsage,
    read_counts,
)
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.language_columns import COLUMNS
from moescope.probe.analysis.language_floor import (
    Divergence,
    LanguagePair,
    compare_halves,
    compare_other_passages,
)
from moescope.probe.analysis.measures import normalize
from moescope.probe.analysis.selection import IntArray, Selection, select
from moescope.probe.analysis.statistics import bootstrap_weights, percentile_interval
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

Distribution = Literal["softmax", "topk", "counts"]
Floor = Literal["auto", "halves", "other_passages", "none"]

QUANTITIES: Mapping[str, Quantity] = {
    "softmax": "prob_sum",
    "topk": "weight_sum",
    "counts": "num_tokens",
}

PROMPT_TOKENS = Filters(tokens="prompt")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Passages:
    """Which prompts make which group, and which groups are passages of two languages.

    Attributes:
        groups: group of each prompt, -1 for prompts outside.
        pairs: one per language beside the pivot.
        notes: what was left out.
    """

    groups: IntArray
    pairs: tuple[LanguagePair, ...]
    notes: tuple[str, ...]


def language_divergence(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    q: Distribution = "topk",
    pivot: str = "en",
    floor: Floor = "auto",
    halves_draws: int = 10,
    bootstrap: int = 1_000,
    seed: int = 0,
) -> AnalysisTable:
    """Divergence of every language from the pivot language, by layer.

    Args:
        store: where the run lies.
        run_id: the run; its prompts need `lang` and `pair_id`.
        filters: which prompts, tokens and routers count; by default content tokens of the prompt.
        q: the distribution over experts: `softmax`, all router scores (the paper); `topk`, the
            routing weights of the selected experts (the authors' later code; they renormalize
            each token, we the sum, which is the same for routers whose weights sum to 1);
            `counts`, selections.
        pivot: the language that the others are compared with.
        floor: `halves`, `other_passages` (see the module), `none`, or `auto`: halves where the run
            and q allow it, else other_passages.
        halves_draws: samples of tokens averaged per passage, for `halves`.
        bootstrap: draws over passages for the 95 % intervals.
        seed: of samples and bootstrap.

    Raises:
        AnalysisInputError: when a parameter does not exist, there is no passage in the pivot and
            another language, or the run lacks what q or floor needs.
    """
    _check(q, floor, halves_draws, bootstrap)
    selection = select(store, run_id, filters or PROMPT_TOKENS, fields=["lang", "pair_id"])
    passages = _passages(selection, pivot)
    floor = _resolve_floor(selection, q, floor)
    quantity = QUANTITIES[q]
    usage = read_counts(
        selection, passages.groups, quantities=list({"num_tokens", quantity}), dtype=np.float32
    )
    rows = []
    for router_usage in usage.routers:
        compared = _compare(selection, passages, router_usage, quantity, floor, halves_draws, seed)
        for index, (pair, divergence) in enumerate(zip(passages.pairs, compared, strict=True)):
            rng = np.random.default_rng([seed, index])
            rows.append(_row(pair, divergence, router_usage, usage, bootstrap, rng))
    parameters = {
        "q": q,
        "pivot": pivot,
        "floor": floor,
        "halves_draws": halves_draws if floor == "halves" else None,
        "bootstrap": bootstrap,
        "seed": seed,
    }
    frame = stack_parts(rows, COLUMNS)
    return AnalysisTable(
        name="languages",
        title=f"Routing divergence from {pivot} by layer",
        frame=frame.sort_values(["kind", "lang", "layer"], ignore_index=True),
        columns=COLUMNS,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters=parameters
        ),
        notes=(*selection.notes, *passages.notes, _FLOOR_NOTES[floor]),
    )


_FLOOR_NOTES: Mapping[str, str] = {
    "halves": "Floor: disjoint random samples of tokens of the same passage in the same language, "
    "with as many tokens as the samples of the two languages that it is compared with.",
    "other_passages": "Floor: each passage against the passage of the same language that is "
    "nearest in length; it holds differences in content, and lengths are not made equal.",
    "none": "No floor: part of every divergence is noise, more where there are fewer tokens.",
}


def _check(q: str, floor: str, halves_draws: int, bootstrap: int) -> None:
    for name, value, choices in (
        ("q", q, get_args(Distribution)),
        ("floor", floor, get_args(Floor)),
    ):
        if value not in choices:
            raise AnalysisInputError(f"{name} is {value!r}; it is one of {', '.join(choices)}")
    for name, number in (("halves_draws", halves_draws), ("bootstrap", bootstrap)):
        if number < 1:
            raise AnalysisInputError(f"{name} is {number}; it is a whole number from 1")


def _resolve_floor(selection: Selection, q: str, floor: Floor) -> Floor:
    if floor == "auto":
        tokenwise = q != "softmax" and selection.store.has_routing(selection.run_id)
        return "halves" if tokenwise else "other_passages"
    if floor == "halves" and q == "softmax":
        raise AnalysisInputError(
            "floor halves needs the distribution of every token, which is not recorded for q "
            "softmax; use q topk or counts, or floor other_passages"
        )
    if floor == "halves":
        selection.require_routing("floor halves")
    return floor


def _passages(selection: Selection, pivot: str) -> _Passages:
    """Find the passages that the pivot shares with each other language."""
    prompts = selection.prompts
    usable = (prompts["lang"].notna() & prompts["pair_id"].notna()).to_numpy()
    languages = sorted(prompts.loc[usable, "lang"].unique())
    if pivot not in languages:
        raise AnalysisInputError(
            f"run {selection.run_id!r} has no prompt with a pair_id in the pivot language "
            f"{pivot!r}; it has {', '.join(languages) or 'none in any language'}"
        )
    keys = prompts.loc[usable, ["lang", "pair_id"]]
    groups = keys.drop_duplicates().reset_index(drop=True)
    groups["group"] = np.arange(len(groups))
    group_P = np.full(len(prompts), -1, dtype=np.int64)
    group_P[usable] = keys.merge(groups, on=["lang", "pair_id"], how="left")["group"].to_numpy()
    of_pivot = groups[groups["lang"] == pivot]
    pairs, alone = [], []
    for language in languages:
        shared = of_pivot.merge(groups[groups["lang"] == language], on="pair_id")
        if language == pivot:
            continue
        if shared.empty:
            alone.append(language)
            continue
        first, second = shared["group_x"].to_numpy(), shared["group_y"].to_numpy()
        pairs.append(LanguagePair(lang=language, pivot=first, other=second))
    if not pairs:
        raise AnalysisInputError(
            f"run {selection.run_id!r} has no two prompts with the same pair_id, one in {pivot!r} "
            "and one in another language"
        )
    used = np.unique(np.concatenate([np.r_[pair.pivot, pair.other] for pair in pairs]))
    group_P[~np.isin(group_P, used)] = -1
    return _Passages(
        groups=group_P, pairs=tuple(pairs), notes=_passage_notes(group_P, usable, alone, pivot)
    )


def _passage_notes(group_P: IntArray, usable: Any, alone: list[str], pivot: str) -> tuple[str, ...]:
    notes = []
    if not usable.all():
        notes.append(f"Prompts without lang or pair_id, left out: {int((~usable).sum())}.")
    if alone:
        notes.append(f"Languages that share no pair_id with {pivot}: {', '.join(alone)}.")
    pooled = int((np.bincount(group_P[group_P >= 0]) > 1).sum())
    if pooled:
        notes.append(f"Passages with several prompts in one language, pooled: {pooled}.")
    return tuple(notes)


def _compare(
    selection: Selection,
    passages: _Passages,
    usage: RouterUsage,
    quantity: Quantity,
    floor: Floor,
    halves_draws: int,
    seed: int,
) -> list[Divergence]:
    """Divergences of every pair of languages at one router, with their floors."""
    q_GE = normalize(usage.sums[quantity].astype(np.float64))
    if floor == "halves":
        return compare_halves(
            selection, passages.groups, passages.pairs, usage, quantity, q_GE, halves_draws, seed
        )
    with_floor = floor == "other_passages"
    return [
        compare_other_passages(pair, q_GE, usage.tokens, with_floor=with_floor)
        for pair in passages.pairs
    ]


def _row(
    pair: LanguagePair,
    divergence: Divergence,
    router_usage: RouterUsage,
    usage: GroupedUsage,
    bootstrap: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """One row: means over passages, and intervals from passages drawn with replacement."""
    tokens_G, router = router_usage.tokens, router_usage.router
    weights_DN = bootstrap_weights(len(pair.pivot), bootstrap, rng)
    excess_N = divergence.jsd_compared - divergence.jsd_floor
    jsd_low, jsd_high = _interval(divergence.jsd, weights_DN)
    d_low, d_high = _interval(divergence.d, weights_DN)
    excess_low, excess_high = _interval(excess_N, weights_DN)
    return {
        "lang": [pair.lang],
        "layer": [router.layer],
        "kind": [router.kind],
        "jsd": _mean(divergence.jsd),
        "jsd_low": jsd_low,
        "jsd_high": jsd_high,
        "d_hjs": _mean(divergence.d),
        "d_low": d_low,
        "d_high": d_high,
        "jsd_compared": _mean(divergence.jsd_compared),
        "jsd_floor": _mean(divergence.jsd_floor),
        "jsd_excess": _mean(excess_N),
        "excess_low": excess_low,
        "excess_high": excess_high,
        "d_compared": _mean(divergence.d_compared),
        "d_floor": _mean(divergence.d_floor),
        "tokens_compared": _mean(divergence.tokens),
        "num_passages": int((~np.isnan(divergence.jsd)).sum()),
        "num_tokens": int(tokens_G[pair.other].sum()),
        "num_tokens_pivot": int(tokens_G[pair.pivot].sum()),
        "num_prompts": int(usage.group_prompts[np.r_[pair.other, pair.pivot]].sum()),
    }


def _mean(values_N: FloatArray) -> float:
    """Mean over the passages where it is defined; NaN where it is nowhere."""
    defined = values_N[~np.isnan(values_N)]
    return float(defined.mean()) if len(defined) else np.nan


def _interval(values_N: FloatArray, weights_DN: FloatArray) -> tuple[float, float]:
    """95 % interval of the mean; missing with fewer than 2 passages."""
    defined = ~np.isnan(values_N)
    if defined.sum() < 2:
        return np.nan, np.nan
    kept_DN = weights_DN[:, defined]
    drawn = kept_DN.sum(axis=1) > 0
    means_D = (kept_DN[drawn] @ values_N[defined]) / kept_DN[drawn].sum(axis=1)
    low, high = percentile_interval(means_D[:, None])
    return float(low[0]), float(high[0])
