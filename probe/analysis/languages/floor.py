"""How far two languages are apart, against how far each is from itself (the floor).

The module `divergence` says what the floors mean; here they are computed. Every floor has the same
form. A *comparison* has four samples: two of the pivot language (P1, P2) and two of the other (O1,
O2), where 1 and 2 stand for two passages, two phrasings, or two halves of one passage.

    floor    = (JSD(P1, P2) + JSD(O1, O2)) / 2        same language
    compared = (JSD(P1, O2) + JSD(O1, P2)) / 2        two languages

Whatever separates 1 from 2 is in both lines; if language made no difference, both would have the
same expectation. Averaging over both languages also cancels, to first order, that the language
with fewer tokens is the noisier one; where single tokens are known the samples are made equal.

Letters: G groups (passage, language, phrasing), M comparisons, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from moescope.probe.analysis.counts import FloatArray, Quantity
from moescope.probe.analysis.measures import entropy_normalized_jsd, jensen_shannon, normalize
from moescope.probe.analysis.selection import IntArray, Router, Selection
from moescope.probe.analysis.token_slots import read_slots, read_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparisons:
    """Which samples one pair of languages compares.

    Attributes:
        groups: the groups of P1, P2, O1, O2, [4, M].
        is_halved: whether P1, P2 and O1, O2 are disjoint samples of one group.
    """

    groups: IntArray
    is_halved: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class FloorResult:
    """What the comparisons gave, [M] each; NaN where it is undefined.

    Attributes:
        jsd, d: compared, raw and entropy-normalized.
        jsd_floor, d_floor: the same language with itself.
        tokens: tokens of a sample, mean of the four.
    """

    jsd: FloatArray
    d: FloatArray
    jsd_floor: FloatArray
    d_floor: FloatArray
    tokens: FloatArray


def compare_all_tokens(
    comparisons: Comparisons, q_GE: FloatArray, tokens_G: FloatArray
) -> FloorResult:
    """Compare the distributions of whole groups: lengths stay as they are."""
    q_4ME = q_GE[comparisons.groups]
    return _result(_divergences(q_4ME), tokens_G[comparisons.groups].mean(axis=0))


def compare_equal_samples(
    selection: Selection,
    group_P: IntArray,
    pairs: Sequence[Comparisons],
    router: Router,
    quantity: Quantity,
    num_draws: int,
    seed: int,
) -> list[FloorResult]:
    """Compare samples with the same number of tokens, drawn without replacement.

    Each comparison uses as many tokens as its smallest group has (halved: half of it), and is
    averaged over `num_draws` samples. Every router draws from the same seed, so that where routers
    see the same tokens the curve over layers compares the same samples.
    """
    used_TE, group_T = token_matrix(selection, group_P, router, quantity)
    tokens_G = np.bincount(group_T, minlength=int(group_P.max()) + 1)
    rng = np.random.default_rng(seed)
    sizes = [
        tokens_G[pair.groups].min(axis=0, initial=len(group_T)) // (2 if pair.is_halved else 1)
        for pair in pairs
    ]
    totals = [np.zeros((4, pair.groups.shape[1])) for pair in pairs]
    for _ in range(num_draws):
        rank_T = _shuffled_ranks(group_T, rng)
        for pair, size_M, total in zip(pairs, sizes, totals, strict=True):
            q_4ME = _sampled(pair, used_TE, group_T, rank_T, size_M)
            total += np.stack(_divergences(q_4ME))
    return [
        _result(total / num_draws, size_M.astype(np.float64))
        for total, size_M in zip(totals, sizes, strict=True)
    ]


def neighbors_in_length(tokens_N: FloatArray) -> IntArray:
    """Passages two by two, neighbors in length, [2, N // 2]; an odd one is left out."""
    order = np.argsort(tokens_N, kind="stable")
    number = len(order) // 2
    return order[: 2 * number].reshape(number, 2).T


def token_matrix(
    selection: Selection, group_P: IntArray, router: Router, quantity: Quantity
) -> tuple[sparse.csr_array, IntArray]:
    """What each counted token used at one router, [T, E], and the group of each token."""
    kept_P = np.flatnonzero(group_P >= 0)
    prompts = selection.prompts.iloc[kept_P].reset_index(drop=True)
    own = replace(selection, routers=(router,), prompts=prompts)
    tokens = read_tokens(own)
    parts, passed = [], []
    for block in read_slots(own, tokens, weights=quantity == "weight_sum"):
        experts_TK = block.experts[router]
        row_S, slot_S = np.nonzero(experts_TK < router.num_experts)
        values_S = block.weights[router][row_S, slot_S] if block.weights else np.ones(len(row_S))
        cells = (row_S, experts_TK[row_S, slot_S].astype(np.int64))
        shape = (len(experts_TK), router.num_experts)
        parts.append(sparse.csr_array((values_S.astype(np.float64), cells), shape=shape))
        passed.append((experts_TK < router.num_experts).any(axis=1))
    passed_T = np.concatenate(passed)
    used_TE = sparse.csr_array(sparse.vstack(parts, format="csr"))[passed_T]
    return used_TE, group_P[kept_P][tokens.prompts[passed_T]]


def _shuffled_ranks(group_T: IntArray, rng: np.random.Generator) -> IntArray:
    """A random order of the tokens within each group: 0, 1, … in every group."""
    order = np.lexsort((rng.random(len(group_T)), group_T))
    lengths = np.bincount(group_T)
    starts = np.cumsum(lengths) - lengths
    rank_T = np.empty(len(group_T), dtype=np.int64)
    rank_T[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    return rank_T


def _sampled(
    pair: Comparisons,
    used_TE: sparse.csr_array,
    group_T: IntArray,
    rank_T: IntArray,
    size_M: IntArray,
) -> FloatArray:
    """The distributions of one draw of samples, [4, M, E]; NaN for samples without tokens."""
    num_groups = int(max(group_T.max(initial=0), pair.groups.max(initial=0))) + 1
    number = len(size_M)
    samples = []
    for role, groups_M in enumerate(pair.groups):
        row_G, size_G = np.zeros((2, num_groups), dtype=np.int64)
        row_G[groups_M], size_G[groups_M] = np.arange(number), size_M
        size_T = size_G[group_T]
        # P2 and O2 of a halved group take the tokens after those of P1 and O1.
        first_T = size_T if pair.is_halved and role in (1, 3) else np.zeros_like(size_T)
        tokens = np.flatnonzero((rank_T >= first_T) & (rank_T < first_T + size_T))
        cells = (row_G[group_T[tokens]], tokens)
        shape = (number, len(group_T))
        indicator = sparse.csr_array((np.ones(len(tokens)), cells), shape=shape)
        samples.append(normalize((indicator @ used_TE).toarray()))
    return np.stack(samples)


def _divergences(q_4ME: FloatArray) -> list[FloatArray]:
    """Raw and normalized: compared, then floor; [M] each."""
    pivot_1, pivot_2, other_1, other_2 = q_4ME
    return [
        (measure(pivot_1, second) + measure(other_1, fourth)) / 2
        for second, fourth in ((other_2, pivot_2), (pivot_2, other_2))
        for measure in (jensen_shannon, entropy_normalized_jsd)
    ]


def _result(values: Sequence[FloatArray] | FloatArray, tokens_M: FloatArray) -> FloorResult:
    jsd, d, jsd_floor, d_floor = values
    return FloorResult(jsd=jsd, d=d, jsd_floor=jsd_floor, d_floor=d_floor, tokens=tokens_M)
