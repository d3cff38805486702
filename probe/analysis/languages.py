"""At which layers, and how strongly, a language uses other experts than the pivot language.

Bandarkar et al., "Multilingual Routing in Mixture-of-Experts", arXiv 2510.04694: for every
passage that exists in both languages (same `pair_id`) the mean routing distribution over experts
is compared between the two, and the divergences are averaged over passages. They count all tokens
of the templated prompt; by default we count the content tokens of the prompt.

Two things mislead. The normalized divergence is dominated by noise where both distributions are
nearly uniform, so the raw one always stands beside it. And divergences of small samples are biased
upward, more for the language with fewer tokens. So both stand against a *floor*: the divergence
that the same language shows with itself, measured as the two languages are compared with it, and
the excess over it is reported with an interval. What is taken for "itself":

- `phrasings`: another phrasing of the same passage, where a prompt field tells phrasings apart.
  The best floor; few prompt sets have one.
- `other_passages`: another passage of the same language. Passages are taken two by two, neighbors
  in length; floor and comparison both go across the two, so that content differs in both alike.
- `halves`: the other half of the same passage's tokens. Fair for long texts. In short ones the
  halves hold different words, and the floor is too high (the excess of a language routed exactly
  like the pivot is then below 0).

All samples of a comparison have the same number of tokens, as many as the shortest, drawn without
replacement and averaged over several draws, where the run holds routing rows and q is `topk` or
`counts`. Otherwise single tokens are not known, and all tokens are compared.
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
    Comparisons,
    FloorResult,
    compare_all_tokens,
    compare_equal_samples,
)
from moescope.probe.analysis.language_passages import (
    LanguagePair,
    Passages,
    find_passages,
    pair_halves,
    pair_passages,
    pair_phrasings,
)
from moescope.probe.analysis.measures import entropy_normalized_jsd, jensen_shannon, normalize
from moescope.probe.analysis.selection import Router, Selection, select
from moescope.probe.analysis.statistics import bootstrap_weights, percentile_interval
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

Distribution = Literal["softmax", "topk", "counts"]
Floor = Literal["auto", "phrasings", "other_passages", "halves", "none"]

QUANTITIES: Mapping[str, Quantity] = {
    "softmax": "prob_sum",
    "topk": "weight_sum",
    "counts": "num_tokens",
}

PROMPT_TOKENS = Filters(tokens="prompt")

_FLOORS = {
    "phrasings": "another phrasing of the same passage in the same language",
    "other_passages": "another passage of the same language, its neighbor in length",
    "halves": "the other half of the tokens of the same passage in the same language",
}


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The parameters of `language_divergence` as resolved."""

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


def language_divergence(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    q: Distribution = "topk",
    pivot: str = "en",
    floor: Floor = "auto",
    phrasing: str | None = None,
    draws: int = 10,
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
        floor: what the same language is compared with (see the module), or `none`; `auto` is
            phrasings where `phrasing` is given, else other_passages.
        phrasing: the prompt field that tells phrasings of a passage apart.
        draws: samples of equal size averaged per comparison.
        bootstrap: draws over passages (comparisons, for the excess) for the 95 % intervals.
        seed: of samples and bootstrap.

    Raises:
        AnalysisInputError: when a parameter does not exist, there is no passage in the pivot and
            another language, or the run lacks what q or floor needs.
    """
    if floor == "auto":
        floor = "other_passages" if phrasing is None else "phrasings"
    settings = _Settings(
        q=q,
        pivot=pivot,
        floor=floor,
        phrasing=phrasing,
        equal_samples=floor != "none" and q != "softmax" and store.has_routing(run_id),
        draws=draws,
        bootstrap=bootstrap,
        seed=seed,
    )
    _check(settings)
    fields = ["lang", "pair_id", *([phrasing] if phrasing else [])]
    selection = select(store, run_id, filters or PROMPT_TOKENS, fields=fields)
    passages = find_passages(selection, pivot, phrasing if floor == "phrasings" else None)
    usage = read_counts(
        selection,
        passages.groups,
        quantities=list({"num_tokens", settings.quantity}),
        dtype=np.float32,
    )
    rows = _rows(selection, passages, usage, settings)
    return AnalysisTable(
        name="languages",
        title=f"Routing divergence from {pivot} by layer",
        frame=stack_parts(rows, COLUMNS).sort_values(["kind", "lang", "layer"], ignore_index=True),
        columns=COLUMNS,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters=vars(settings)
        ),
        notes=(*selection.notes, *passages.notes, _floor_note(settings)),
    )


def _floor_note(settings: _Settings) -> str:
    if settings.floor == "none":
        return "No floor: part of every divergence is noise, more where there are fewer tokens."
    lengths = (
        "on equal numbers of tokens"
        if settings.equal_samples
        else "on all tokens: equal numbers need routing rows and q topk or counts"
    )
    return f"Floor: {_FLOORS[settings.floor]}, {lengths}."


def _check(settings: _Settings) -> None:
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


def _rows(
    selection: Selection, passages: Passages, usage: GroupedUsage, settings: _Settings
) -> list[dict[str, Any]]:
    """One row per router and language."""
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
    passages: Passages, usage: GroupedUsage, settings: _Settings
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
    settings: _Settings,
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
