"""Entropies of experts given a label, with everything an interval and a shuffle need.

With f(n) = n ln n, the slots of label v that went to expert e counted as n[v,e] and their sum over
experts as n[v], the term of a label is

    sum over e of f(n[v,e]) - f(n[v])  =  -n[v] H(e | v),

and for one expert, whether a token selects it (M) among the N[v] tokens of the label,

    f(n[v,e]) + f(N[v] - n[v,e]) - f(N[v])  =  -N[v] H(M | v).

Information is a difference of such sums: I(e; v) = H(e) - H(e | v). Sums without a group of units
need no second pass: tokens are counted by label and group, and each group is taken off in turn.

Letters: V labels, C pairs (label, group) that occur, G groups of units, E routed experts, X what is
estimated (1, or E with one value per expert), T tokens, B shuffles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import sparse
from scipy.special import xlogy

from moescope.probe.analysis.measures import FloatArray
from moescope.probe.analysis.selection import IntArray
from moescope.probe.analysis.tokens.label_counts import (
    Arrangement,
    RouterSlots,
    arrange,
    compact,
    count_table,
    label_ranges,
)

# n ln n of the counts that are looked up; larger ones are computed.
_LOOKED_UP: Final = xlogy(np.arange(1 << 16), np.arange(1 << 16))


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelGroups:
    """Tokens by label and group of units.

    Attributes:
        pairs: tokens arranged by the pairs (label, group) that occur, by label and then group.
        groups: the group of each pair, [C].
        starts: where the pairs of each label begin, and the end; each label has one, [V + 1].
        num_groups: G.
    """

    pairs: Arrangement
    groups: IntArray
    starts: IntArray
    num_groups: int


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedTerms:
    """Sums of the terms of all labels: of all tokens [X], and without each group [G, X]."""

    total: FloatArray
    without: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """All that information is made of, at one router.

    Attributes:
        label: of the factor's values (given a token: of values and tokens together).
        given: of what is given: of one label for all, or of the tokens.
        marginal: of one label for all.
        size: slots (per expert: tokens), total [1] and without each group [G, 1].
        shuffled: as `label.total` with shuffled labels, [B, X].
    """

    label: GroupedTerms
    given: GroupedTerms
    marginal: GroupedTerms
    size: GroupedTerms
    shuffled: FloatArray


def x_log_x(counts: IntArray, most: int) -> FloatArray:
    """Elementwise n ln n, 0 for 0; no count is larger than `most`."""
    found: FloatArray = _LOOKED_UP.take(counts, mode="clip")
    if most >= len(_LOOKED_UP):
        large = counts >= len(_LOOKED_UP)
        found[large] = xlogy(counts[large], counts[large])
    return found


def label_terms(counts_VE: IntArray, tokens_V: IntArray, *, per_expert: bool) -> FloatArray:
    """The term of each label, [V, X].

    Args:
        counts_VE: tokens of the label that use each expert.
        tokens_V: tokens of the label.
        per_expert: one value per expert, of whether a token selects it.
    """
    most = int(tokens_V.max(initial=0))
    if per_expert:
        rest_VE = tokens_V[:, None] - counts_VE
        terms_VE = x_log_x(counts_VE, most) + x_log_x(rest_VE, most)
        return terms_VE - x_log_x(tokens_V, most)[:, None]
    slots_V = counts_VE.sum(axis=1)
    terms_V = x_log_x(counts_VE, most).sum(axis=1) - xlogy(slots_V, slots_V)
    return np.asarray(terms_V[:, None])


def summed_terms(slots: RouterSlots, tokens: Arrangement, *, per_expert: bool) -> FloatArray:
    """Sum of the terms of all labels, [X]."""
    num_experts = slots.router.num_experts
    total_X = np.zeros(num_experts if per_expert else 1)
    sizes_V = tokens.sizes
    for first, last in label_ranges(np.arange(len(tokens.starts)), num_experts):
        counts_VE = count_table(slots, tokens, first, last)
        total_X += label_terms(counts_VE, sizes_V[first:last], per_expert=per_expert).sum(axis=0)
    return total_X


def group_labels(label_T: IntArray, group_T: IntArray, num_groups: int) -> LabelGroups:
    """Arrange tokens by label and group.

    Args:
        label_T: label of each token, from 0 without gaps; -1 leaves the token out.
        group_T: group of units of each token.
        num_groups: G.
    """
    code_T, key_C = compact(np.where(label_T >= 0, label_T * num_groups + group_T, -1))
    label_C = key_C // num_groups
    return LabelGroups(
        pairs=arrange(code_T),
        groups=key_C % num_groups,
        starts=np.searchsorted(label_C, np.arange(int(label_C.max(initial=-1)) + 2)),
        num_groups=num_groups,
    )


def grouped_terms(slots: RouterSlots, tokens: LabelGroups, *, per_expert: bool) -> GroupedTerms:
    """Sum of the terms of all labels, and the same without each group."""
    num_experts = slots.router.num_experts
    is_dense = per_expert or len(tokens.groups) * num_experts <= slots.experts.size
    rows = tokens.starts if is_dense else np.arange(len(tokens.starts))
    width = num_experts if per_expert else 1
    total_X, lost_GX = np.zeros(width), np.zeros((tokens.num_groups, width))
    for first, last in label_ranges(rows, num_experts):
        if is_dense:
            terms_X, lost = _by_pairs(slots, tokens, first, last, per_expert=per_expert)
        else:
            terms_X, lost = _by_slots(slots, tokens, first, last)
        total_X += terms_X
        lost_GX += lost
    return GroupedTerms(total=total_X, without=total_X - lost_GX)


def _by_pairs(
    slots: RouterSlots, tokens: LabelGroups, first: int, last: int, *, per_expert: bool
) -> tuple[FloatArray, FloatArray]:
    """Terms of some labels [X], and what they lose without each group [G, X].

    From a table of all pairs and experts: best where many tokens share a pair.
    """
    begin, end = int(tokens.starts[first]), int(tokens.starts[last])
    counts_CE, of_C = count_table(slots, tokens.pairs, begin, end), tokens.pairs.sizes[begin:end]
    starts_V = tokens.starts[first:last] - begin
    counts_VE, of_V = np.add.reduceat(counts_CE, starts_V), np.add.reduceat(of_C, starts_V)
    terms_VX = label_terms(counts_VE, of_V, per_expert=per_expert)
    label_C = np.repeat(np.arange(last - first), np.diff(tokens.starts[first : last + 1]))
    left_CX = label_terms(
        counts_VE[label_C] - counts_CE, of_V[label_C] - of_C, per_expert=per_expert
    )
    lost_GX = _sums_by(tokens.groups[begin:end], terms_VX[label_C] - left_CX, tokens.num_groups)
    return terms_VX.sum(axis=0), lost_GX


def _by_slots(
    slots: RouterSlots, tokens: LabelGroups, first: int, last: int
) -> tuple[FloatArray, FloatArray]:
    """The same, not per expert, from the cells that occur: few where a pair has one token."""
    num_experts, num_groups = slots.router.num_experts, tokens.num_groups
    begin, end = int(tokens.starts[first]), int(tokens.starts[last])
    rows = slice(int(tokens.pairs.starts[begin]), int(tokens.pairs.starts[end]))
    label_C = np.repeat(np.arange(last - first), np.diff(tokens.starts[first : last + 1]))
    pair_C = label_C * num_experts * num_groups + tokens.groups[begin:end]
    # One number per slot (label, expert, group); a table is small enough for 32 bits.
    pair_N = pair_C.astype(np.uint32)[tokens.pairs.labels[rows] - begin]
    experts_NK = slots.of(tokens.pairs.order[rows]).astype(np.uint32)
    key_S = (pair_N[:, None] + experts_NK * np.uint32(num_groups)).ravel()
    if not slots.is_even:
        key_S = key_S[experts_NK.ravel() < num_experts]
    key_S.sort()
    starts = np.flatnonzero(np.r_[True, key_S[1:] != key_S[:-1]][: len(key_S)])
    count_D = np.diff(starts, append=len(key_S))
    key_D = key_S[starts]
    cell_D = key_D // np.uint32(num_groups)
    group_D = key_D - cell_D * np.uint32(num_groups)
    size = (last - first) * num_experts
    counts_S = np.bincount(cell_D, count_D, minlength=size).astype(np.int64)
    row_D = cell_D // np.uint32(num_experts) * np.uint32(num_groups) + group_D
    slots_VG = np.bincount(row_D, count_D, minlength=(last - first) * num_groups)
    slots_VG = slots_VG.reshape(last - first, num_groups)
    slots_V = slots_VG.sum(axis=1)
    most, left_VG = int(counts_S.max(initial=0)), slots_V[:, None] - slots_VG
    whole_D = counts_S[cell_D]
    lost_D = x_log_x(whole_D, most) - x_log_x(whole_D - count_D, most)
    lost_G = np.bincount(group_D, lost_D, minlength=num_groups)
    lost_G -= (xlogy(slots_V, slots_V)[:, None] - xlogy(left_VG, left_VG)).sum(axis=0)
    total = x_log_x(counts_S, most).sum() - xlogy(slots_V, slots_V).sum()
    return np.array([total]), np.asarray(lost_G[:, None], dtype=np.float64)


def table_terms(counts_GVE: IntArray, tokens_GV: IntArray, *, per_expert: bool) -> GroupedTerms:
    """The same from counts by group and label that are there already."""
    counts_VE, tokens_V = counts_GVE.sum(axis=0), tokens_GV.sum(axis=0)
    without = [
        label_terms(counts_VE - own_VE, tokens_V - own_V, per_expert=per_expert).sum(axis=0)
        for own_VE, own_V in zip(counts_GVE, tokens_GV, strict=True)
    ]
    total_X = label_terms(counts_VE, tokens_V, per_expert=per_expert).sum(axis=0)
    return GroupedTerms(total=total_X, without=np.stack(without))


def size_terms(counts_GE: IntArray, tokens_G: IntArray, *, per_expert: bool) -> GroupedTerms:
    """Slots, or tokens per expert: all of them, and without each group."""
    size_G = (tokens_G if per_expert else counts_GE.sum(axis=1)).astype(np.float64)
    return GroupedTerms(total=size_G.sum(keepdims=True), without=(size_G.sum() - size_G)[:, None])


def _sums_by(group_C: IntArray, values_CX: FloatArray, num_groups: int) -> FloatArray:
    """Sums of rows by group, [G, X]."""
    cells = (np.ones(len(group_C)), (group_C, np.arange(len(group_C))))
    indicator = sparse.csr_array(cells, shape=(num_groups, len(group_C)))
    return np.asarray(indicator @ values_CX)
