"""The rows of tables that compare languages: one per router and pair of languages.

`divergence` says what the measures and the floors mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from moescope.probe.analysis.counts import (
    FloatArray,
    GroupedUsage,
    Quantity,
    RouterUsage,
)
from moescope.probe.analysis.languages.floor import (
    Comparisons,
    FloorResult,
    compare_all_tokens,
    compare_equal_samples,
)
from moescope.probe.analysis.languages.passages import (
    LanguagePair,
    Passages,
    pair_halves,
    pair_passages,
    pair_phrasings,
)
from moescope.probe.analysis.measures import entropy_normalized_jsd, jensen_shannon, normalize
from moescope.probe.analysis.selection import Router, Selection
from moescope.probe.analysis.statistics import bootstrap_weights, percentile_interval
from moescope.probe.errors import AnalysisInputError

Distribution = Literal["softmax", "topk", "counts"]
Floor = Literal["auto", "phrasings", "other_passages", "halves", "none"]

QUANTITIES: Mapping[str, Quantity] = {
    "softmax": "prob_sum",
    "topk": "weight_sum",
    "counts": "num_tokens",
}

_FLOORS = {
    "phrasings": "another phrasing of the same passage in the same language",
    "other_passages": "another passage of the same language, its neighbor in length",
    "halves": "the other half of the tokens of the same passage in the same language",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The parameters of a comparison of languages as resolved."""

    q: str
    pivot: str
    floor: str
    phrasing: str | None
    equal_samples: bool
    draws: int
    bootstrap: int
    seed: int

    @property
    def quantity(self) -> Quantity:
        """The column of usage that makes the distribution."""
        return QUANTITIES[self.q]


def resolve_settings(
    *,
    q: str,
    pivot: str,
    floor: str,
    phrasing: str | None,
    has_routing: bool,
    draws: int,
    bootstrap: int,
    seed: int,
) -> Settings:
    """The parameters as they hold for a run that has rows of routing or has none.

    Raises:
        AnalysisInputError: when a parameter does not exist, or the run lacks what it needs.
    """
    if floor == "auto":
        floor = "other_passages" if phrasing is None else "phrasings"
    settings = Settings(
        q=q,
        pivot=pivot,
        floor=floor,
        phrasing=phrasing,
        equal_samples=floor != "none" and q != "softmax" and has_routing,
        draws=draws,
        bootstrap=bootstrap,
        seed=seed,
    )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    for name, value, choices in (
        ("q", settings.q, get_args(Distribution)),
        ("floor", settings.floor, get_args(Floor)),
    ):
        if value not in choices:
            raise AnalysisInputError(f"{name} is {value!r}; it is one of {', '.join(choices)}")
    if settings.floor == "phrasings" and settings.phrasing is None:
        raise AnalysisInputError(
            "floor phrasings needs phrasing: the prompt field that tells phrasings apart"
        )
    if settings.floor == "halves" and not settings.equal_samples:
        raise AnalysisInputError(
            "floor halves needs the routing of single tokens, which q softmax and runs of level "
            "usage do not have; use floor other_passages"
        )
    for name, number in (("draws", settings.draws), ("bootstrap", settings.bootstrap)):
        if number < 1:
            raise AnalysisInputError(f"{name} is {number}; it is a whole number from 1")


def floor_note(settings: Settings) -> str:
    """What the floor of the table is, in a sentence."""
    if settings.floor == "none":
        return "No floor: part of every divergence is noise, more where there are fewer tokens."
    lengths = (
        "on equal numbers of tokens"
        if settings.equal_samples
        else "on all tokens: equal numbers need routing rows and q topk or counts"
    )
    return f"Floor: {_FLOORS[settings.floor]}, {lengths}."


def compare_languages(
    selection: Selection, passages: Passages, usage: GroupedUsage, settings: Settings
) -> list[dict[str, Any]]:
    """One row per router and pair of languages, columns as in `languages.columns`."""
    compared = _comparisons(passages, usage, settings)
    rows = []
    for router_usage in usage.routers:
        results = _compare(selection, passages, router_usage, compared, settings)
        texts = _texts(passages, router_usage, usage, settings.quantity)
        for index, (pair, result) in enumerate(zip(passages.pairs, results, strict=True)):
            rng = np.random.default_rng([settings.seed, index])
            rows.append(_row(pair, texts, result, router_usage.router, settings.bootstrap, rng))
    return rows


def _comparisons(
    passages: Passages, usage: GroupedUsage, settings: Settings
) -> list[Comparisons] | None:
    """What each pair of languages compares for its floor; None without one."""
    keys, pairs = passages.keys, passages.pairs
    if settings.floor == "phrasings" and settings.phrasing is not None:
        return [pair_phrasings(pair, keys, settings.pivot, settings.phrasing) for pair in pairs]
    if settings.floor == "halves":
        return [pair_halves(pair, keys) for pair in pairs]
    if settings.floor == "none":
        return None
    kept = passages.groups >= 0
    tokens_G = np.zeros(len(keys))
    np.add.at(tokens_G, passages.groups[kept], usage.prompt_tokens[kept])
    return [pair_passages(pair, keys, tokens_G) for pair in pairs]


def _compare(
    selection: Selection,
    passages: Passages,
    usage: RouterUsage,
    compared: list[Comparisons] | None,
    settings: Settings,
) -> list[FloorResult]:
    """The comparisons of every pair of languages at one router."""
    if compared is None:
        nothing = np.empty(0)
        result = FloorResult(
            jsd=nothing, d=nothing, jsd_floor=nothing, d_floor=nothing, tokens=nothing
        )
        return [result] * len(passages.pairs)
    if settings.equal_samples:
        return compare_equal_samples(
            selection,
            passages.groups,
            compared,
            usage.router,
            settings.quantity,
            settings.draws,
            settings.seed,
        )
    q_GE = normalize(usage.sums[settings.quantity].astype(np.float64))
    return [compare_all_tokens(pair, q_GE, usage.tokens) for pair in compared]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Texts:
    """Passages in a language at one router: distribution [X, E], tokens and prompts [X]."""

    q: FloatArray
    tokens: FloatArray
    prompts: FloatArray


def _texts(
    passages: Passages, usage: RouterUsage, whole: GroupedUsage, quantity: Quantity
) -> _Texts:
    """Sum groups to texts: all phrasings of a passage in a language together."""
    text_G = passages.keys["text"].to_numpy()
    sums_XE = np.zeros((int(text_G.max()) + 1, usage.router.num_experts))
    np.add.at(sums_XE, text_G, usage.sums[quantity].astype(np.float64))
    return _Texts(
        q=normalize(sums_XE),
        tokens=np.bincount(text_G, weights=usage.tokens).astype(np.float64),
        prompts=np.bincount(text_G, weights=whole.group_prompts).astype(np.float64),
    )


def _row(
    pair: LanguagePair,
    texts: _Texts,
    result: FloorResult,
    router: Router,
    bootstrap: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """One row: means over passages, and intervals from passages drawn with replacement."""
    first, second = texts.q[pair.pivot], texts.q[pair.other]
    jsd_N, d_N = jensen_shannon(first, second), entropy_normalized_jsd(first, second)
    excess_M = result.jsd - result.jsd_floor
    jsd_low, jsd_high = _interval(jsd_N, bootstrap, rng)
    d_low, d_high = _interval(d_N, bootstrap, rng)
    excess_low, excess_high = _interval(excess_M, bootstrap, rng)
    return {
        "lang": [pair.lang],
        "layer": [router.layer],
        "kind": [router.kind],
        "jsd": _mean(jsd_N),
        "jsd_low": jsd_low,
        "jsd_high": jsd_high,
        "d_hjs": _mean(d_N),
        "d_low": d_low,
        "d_high": d_high,
        "jsd_compared": _mean(result.jsd),
        "jsd_floor": _mean(result.jsd_floor),
        "jsd_excess": _mean(excess_M),
        "excess_low": excess_low,
        "excess_high": excess_high,
        "d_compared": _mean(result.d),
        "d_floor": _mean(result.d_floor),
        "tokens_compared": _mean(result.tokens),
        "num_compared": int((~np.isnan(excess_M)).sum()),
        "num_passages": int((~np.isnan(jsd_N)).sum()),
        "num_tokens": int(texts.tokens[pair.other].sum()),
        "num_tokens_pivot": int(texts.tokens[pair.pivot].sum()),
        "num_prompts": int(texts.prompts[np.r_[pair.other, pair.pivot]].sum()),
    }


def _mean(values_N: FloatArray) -> float:
    """Mean over the passages where it is defined; NaN where it is nowhere."""
    defined = values_N[~np.isnan(values_N)]
    return float(defined.mean()) if len(defined) else np.nan


def _interval(values_N: FloatArray, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the mean over passages; missing with fewer than 2."""
    defined = values_N[~np.isnan(values_N)]
    if len(defined) < 2:
        return np.nan, np.nan
    means_D = bootstrap_weights(len(defined), draws, rng) @ defined / len(defined)
    low, high = percentile_interval(means_D[:, None])
    return float(low[0]), float(high[0])
