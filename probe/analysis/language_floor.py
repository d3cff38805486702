"""Divergence of one passage in two languages, and of a language with itself (the floor).

The module `languages` says what the two floors mean; here they are computed, per passage.

Letters: G groups (passage, language), N passages of one pair of languages, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from moescope.probe.analysis.counts import (
    FloatArray,
    Quantity,
    RouterUsage,
    chosen_tokens_sql,
    column_array,
    router_condition,
)
from moescope.probe.analysis.measures import entropy_normalized_jsd, jensen_shannon, normalize
from moescope.probe.analysis.selection import IntArray, Router, Selection


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguagePair:
    """The passages that a language shares with the pivot.

    Attributes:
        lang: the language beside the pivot.
        pivot: group of each passage in the pivot language.
        other: group of each passage in `lang`.
    """

    lang: str
    pivot: IntArray
    other: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergence:
    """Per passage: divergence of the two languages, and what it has to exceed. NaN = undefined.

    Attributes:
        jsd, d: raw and entropy-normalized, on all tokens.
        jsd_compared, d_compared: as the floor is computed: subsampled, or on all tokens.
        jsd_floor, d_floor: the same language with itself.
        tokens: tokens of a side in the comparison (the mean of both sides).
    """

    jsd: FloatArray
    d: FloatArray
    jsd_compared: FloatArray
    d_compared: FloatArray
    jsd_floor: FloatArray
    d_floor: FloatArray
    tokens: FloatArray


def compare_other_passages(
    pair: LanguagePair, q_GE: FloatArray, tokens_G: FloatArray, *, with_floor: bool
) -> Divergence:
    """Compare on all tokens; the floor is the nearest passage in length of the same language."""
    first, second = q_GE[pair.pivot], q_GE[pair.other]
    jsd_N, d_N = jensen_shannon(first, second), entropy_normalized_jsd(first, second)
    jsd_floor_N, d_floor_N = np.full((2, len(jsd_N)), np.nan)
    if with_floor and len(jsd_N) > 1:
        first_next = first[nearest_in_length(tokens_G[pair.pivot])]
        second_next = second[nearest_in_length(tokens_G[pair.other])]
        jsd_floor_N, d_floor_N = (
            (measure(first, first_next) + measure(second, second_next)) / 2
            for measure in (jensen_shannon, entropy_normalized_jsd)
        )
    return Divergence(
        jsd=jsd_N,
        d=d_N,
        jsd_compared=jsd_N,
        d_compared=d_N,
        jsd_floor=jsd_floor_N,
        d_floor=d_floor_N,
        tokens=(tokens_G[pair.pivot] + tokens_G[pair.other]) / 2,
    )


def nearest_in_length(tokens_N: FloatArray) -> IntArray:
    """For each passage the other one whose token count is nearest (of equals the next in order)."""
    order = np.argsort(tokens_N, kind="stable")
    ordered = tokens_N[order].astype(np.float64)
    gap_below = np.diff(ordered, prepend=-np.inf)
    gap_above = np.diff(ordered, append=np.inf)
    offset = np.where(gap_above <= gap_below, 1, -1)
    nearest = np.empty(len(order), dtype=np.int64)
    nearest[order] = order[np.arange(len(order)) + offset]
    return nearest


def compare_halves(
    selection: Selection,
    group_P: IntArray,
    pairs: Sequence[LanguagePair],
    usage: RouterUsage,
    quantity: Quantity,
    q_GE: FloatArray,
    num_draws: int,
    seed: int,
) -> list[Divergence]:
    """Compare samples of equal size; the floor is two disjoint samples of the same side.

    Every router draws from the same seed, so that where routers see the same tokens the curve over
    layers compares the same samples.
    """
    used_TE, group_T = _token_matrix(selection, group_P, usage.router, quantity)
    tokens_G = np.bincount(group_T, minlength=len(q_GE))
    rng = np.random.default_rng(seed)
    sums = [np.zeros((4, len(pair.pivot))) for pair in pairs]
    for _ in range(num_draws):
        rank_T = _shuffled_ranks(group_T, rng)
        for pair, total in zip(pairs, sums, strict=True):
            total += _sampled(pair, used_TE, group_T, rank_T, tokens_G)
    divergences = []
    for pair, total in zip(pairs, sums, strict=True):
        first, second = q_GE[pair.pivot], q_GE[pair.other]
        means = total / num_draws
        divergences.append(
            Divergence(
                jsd=jensen_shannon(first, second),
                d=entropy_normalized_jsd(first, second),
                jsd_compared=means[0],
                d_compared=means[1],
                jsd_floor=means[2],
                d_floor=means[3],
                tokens=_sample_size(pair, tokens_G).astype(np.float64),
            )
        )
    return divergences


def _token_matrix(
    selection: Selection, group_P: IntArray, router: Router, quantity: Quantity
) -> tuple[sparse.csr_array, IntArray]:
    """What each counted token used at one router, [T, E], and the group of each token."""
    kept_ids = selection.prompt_ids[group_P >= 0]
    slots = selection.store.arrow(
        f"WITH chosen AS ({chosen_tokens_sql(selection.filters)}) "
        "SELECT r.prompt_id, r.position, r.expert, r.weight FROM routing r "
        "JOIN chosen USING (prompt_id, position) WHERE r.run_id = ? AND "
        f"{router_condition([router], 'r.')} ORDER BY r.prompt_id, r.position, r.expert",
        [selection.run_id, int(kept_ids[0]), int(kept_ids[-1]), selection.run_id],
    )
    prompt_S = column_array(slots, "prompt_id")
    kept_S = np.isin(prompt_S, kept_ids)
    prompt_S, position_S = prompt_S[kept_S], column_array(slots, "position")[kept_S]
    starts_S = np.ones(len(prompt_S), dtype=bool)
    starts_S[1:] = (np.diff(prompt_S) != 0) | (np.diff(position_S) != 0)
    token_S = np.cumsum(starts_S) - 1
    group_T = group_P[np.searchsorted(selection.prompt_ids, prompt_S[starts_S])]
    if quantity == "weight_sum":
        values_S = column_array(slots, "weight")[kept_S].astype(np.float64)
    else:
        values_S = np.ones(len(prompt_S))
    cells = (token_S, column_array(slots, "expert")[kept_S].astype(np.int64))
    shape = (len(group_T), router.num_experts)
    return sparse.csr_array((values_S, cells), shape=shape), group_T


def _shuffled_ranks(group_T: IntArray, rng: np.random.Generator) -> IntArray:
    """A random order of the tokens within each group: 0, 1, … in every group."""
    order = np.lexsort((rng.random(len(group_T)), group_T))
    ordered = group_T[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else order
    lengths = np.diff(np.r_[starts, len(ordered)])
    rank_T = np.empty(len(group_T), dtype=np.int64)
    rank_T[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return rank_T


def _sample_size(pair: LanguagePair, tokens_G: IntArray) -> IntArray:
    """Tokens per sample: half of the shorter side, so that each side holds two samples."""
    return np.minimum(tokens_G[pair.pivot], tokens_G[pair.other]) // 2


def _sampled(
    pair: LanguagePair,
    used_TE: sparse.csr_array,
    group_T: IntArray,
    rank_T: IntArray,
    tokens_G: IntArray,
) -> FloatArray:
    """One draw: jsd and d between languages, jsd and d within (mean of both sides), [4, N]."""
    size_N = _sample_size(pair, tokens_G)
    sides = []
    for groups_N in (pair.pivot, pair.other):
        row_G = np.full(len(tokens_G), -1, dtype=np.int64)
        row_G[groups_N] = np.arange(len(groups_N))
        row_T = row_G[group_T]
        sample_T = np.where(row_T >= 0, rank_T // np.maximum(size_N[row_T], 1), 2)
        sample_T[size_N[row_T] == 0] = 2
        samples = []
        for number in (0, 1):
            tokens = np.flatnonzero(sample_T == number)
            shape = (len(groups_N), len(group_T))
            indicator = sparse.csr_array(
                (np.ones(len(tokens)), (row_T[tokens], tokens)), shape=shape
            )
            samples.append(normalize((indicator @ used_TE).toarray()))
        sides.append(samples)
    (first, first_again), (second, second_again) = sides
    return np.stack(
        [
            jensen_shannon(first, second),
            entropy_normalized_jsd(first, second),
            (jensen_shannon(first, first_again) + jensen_shannon(second, second_again)) / 2,
            (
                entropy_normalized_jsd(first, first_again)
                + entropy_normalized_jsd(second, second_again)
            )
            / 2,
        ]
    )
