"""The words of an expert: the token ids that go to it far more often than others do.

Ids are ranked by Dunning's log-likelihood of the id's share against the expert's rate over all
tokens, the statistic of keyword analysis: it grows with the number of occurrences, so an id that
was seen a few times and went to the expert by accident does not lead. It only ranks; tokens of one
text are not independent, so what is sure is said by the interval over units.

Letters: V labels, E routed experts, W words (rows: an id and an expert), N tokens, U units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import xlogy

from moescope.probe.analysis.columns import (
    EXPERT,
    KIND,
    LAYER,
    NUM_PROMPTS,
    NUM_TOKENS,
    stack_parts,
)
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.intervals import ratio_interval
from moescope.probe.analysis.measures import FloatArray, divide
from moescope.probe.analysis.selection import IntArray
from moescope.probe.analysis.tokens.label_counts import (
    Arrangement,
    BoolArray,
    PerPassing,
    RouterSlots,
    arrange,
    count_table,
    label_ranges,
    over_routers,
)
from moescope.probe.analysis.tokens.labelled_tokens import (
    LabelledTokens,
    SlotChoice,
    TokenLabel,
    check_choices,
    read_labelled,
)
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

COLUMNS = (
    LAYER,
    KIND,
    EXPERT,
    Column(
        name="rank", unit="", range="1 to top", definition="Place among the words of the expert."
    ),
    Column(name="token_id", unit="", range="0 or more", definition="Id of the label."),
    Column(name="token", unit="", range="text", definition="Its text, as the tokenizer gives it."),
    Column(
        name="share",
        unit="share of occurrences",
        range="(0, 1]",
        definition="Occurrences of the id that use the expert, over all its occurrences: "
        "n[x,e] / N_x.",
        source="vocabulary specialization: OLMoE, arXiv 2409.02060, section 5",
    ),
    Column(
        name="low",
        unit="share of occurrences",
        range="[0, 1]; missing for an id of a single unit",
        definition="Lower end of the 95 % interval of the share over units (linearized ratio).",
        source="Cochran, Sampling Techniques, 6.4",
    ),
    Column(
        name="high",
        unit="share of occurrences",
        range="[0, 1]; missing for an id of a single unit",
        definition="Upper end of the same interval.",
        source="Cochran, Sampling Techniques, 6.4",
    ),
    Column(
        name="expert_rate",
        unit="share of tokens",
        range="(0, 1)",
        definition="Chance: share of all counted tokens that use the expert.",
    ),
    Column(name="lift", unit="ratio", range="above 1", definition="share / expert_rate."),
    Column(
        name="log_likelihood",
        unit="nats",
        range="above 0",
        definition="What the rank goes by: N_x times the Kullback-Leibler divergence of share from "
        "expert_rate. It ranks, it is no test: tokens of a text are not independent.",
        source="Dunning, Computational Linguistics 19(1), 1993 (half of his -2 log lambda)",
    ),
    Column(
        name="expert_share",
        unit="share of the expert's use",
        range="(0, 1]",
        definition="Of the counted tokens that use the expert, the share that has this id.",
    ),
    Column(
        name="num_slots",
        unit="tokens",
        range="1 or more",
        definition="Occurrences of the id that use the expert.",
    ),
    Column(
        name="count",
        unit="tokens",
        range="min_count or more",
        definition="Occurrences of the id.",
    ),
    NUM_TOKENS,
    NUM_PROMPTS,
    Column(
        name="num_units",
        unit="units",
        range="1 or more",
        definition="Units of resampling in which the id occurs.",
    ),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Labels:
    """Tokens by label, of the frequent ids only; every counted token; the unit of each token."""

    frequent: Arrangement
    everything: Arrangement
    units: IntArray
    num_prompts: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Words:
    """Rows of a router: expert, label, occurrences that use the expert, rank statistic, [W]."""

    experts: IntArray
    labels: IntArray
    slots: IntArray
    scores: FloatArray

    def best(self, top: int) -> _Words:
        """The `top` rows of each expert by score, the lower label first where equal."""
        order = np.lexsort((self.labels, -self.scores, self.experts))
        experts = self.experts[order]
        place = np.arange(len(order)) - np.searchsorted(experts, experts)
        return self.rows(order[place < top])

    def rows(self, kept: IntArray) -> _Words:
        """Some of the rows."""
        return _Words(
            experts=self.experts[kept],
            labels=self.labels[kept],
            slots=self.slots[kept],
            scores=self.scores[kept],
        )

    def joined(self, other: _Words) -> _Words:
        """The rows of both."""
        return _Words(
            experts=np.concatenate([self.experts, other.experts]),
            labels=np.concatenate([self.labels, other.labels]),
            slots=np.concatenate([self.slots, other.slots]),
            scores=np.concatenate([self.scores, other.scores]),
        )


def expert_tokens(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    label: TokenLabel = "input",
    slots: SlotChoice = "topk",
    min_count: int = 10,
    top: int = 20,
    unit: str = "pair_id",
) -> AnalysisTable:
    """The token ids that are most characteristic of each expert.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        label: whose id: `input`, `next` or `predicted`, as in `vocabulary_specialization`.
        slots: whether an expert is used as the first-ranked one (`top1`) or as any (`topk`).
        min_count: occurrences that an id needs.
        top: words per expert, at most; only ids that use it more than all tokens do are listed.
        unit: the prompt field that joins prompts into units; a prompt without it is one alone.

    Raises:
        AnalysisInputError: when the run has no ranks for `top1`, no predictions for `predicted`,
            or no id occurs often enough.
    """
    check_choices(slots, min_count=min_count, top=top)
    found = read_labelled(store, run_id, filters, label, unit)
    size_V = np.bincount(found.codes)
    if size_V.max() < min_count:
        raise AnalysisInputError(
            f"no id occurs {min_count} times in run {run_id!r}, the most frequent one "
            f"{size_V.max()} times; give a smaller min_count or widen the filters"
        )
    labels_of = PerPassing(lambda passed: _labels(found, passed, min_count))
    parts = over_routers(
        found.selection,
        found.tokens,
        lambda one: _part(one, labels_of(one.passed), top),
        top1=slots == "top1",
        ranked="slots top1" if slots == "top1" else None,
    )
    text_V = _texts(found)
    for part in parts:
        part["token_id"], part["token"] = found.ids[part["label"]], text_V[part["label"]]
    frame = stack_parts(parts, COLUMNS)
    parameters = {
        "label": label, "slots": slots, "min_count": min_count, "top": top, "unit": unit
    }  # fmt: skip
    return AnalysisTable(
        name="expert-tokens",
        title="Words of the experts",
        frame=frame,
        columns=COLUMNS,
        context=found.selection.context(
            num_prompts=found.tokens.num_prompts,
            num_tokens=len(found.tokens),
            parameters=parameters,
        ),
        notes=found.notes,
    )


def _labels(found: LabelledTokens, passed_T: BoolArray | None, min_count: int) -> _Labels:
    """The labels of the tokens that passed a router."""
    passed_T = np.ones(len(found.codes), dtype=bool) if passed_T is None else passed_T
    code_T = np.where(passed_T, found.codes, -1)
    size_V = np.bincount(found.codes[passed_T], minlength=len(found.ids))
    is_frequent_T = passed_T & (size_V[found.codes] >= min_count)
    return _Labels(
        frequent=arrange(np.where(is_frequent_T, code_T, -1), len(found.ids)),
        everything=arrange(np.where(passed_T, 0, -1), 1),
        units=found.units[found.tokens.prompts],
        num_prompts=len(np.unique(found.tokens.prompts[passed_T])),
    )


def _texts(found: LabelledTokens) -> Any:
    """The text of each label, an object array."""
    rows = found.selection.store.query(
        "SELECT token_id, min(token) AS token FROM tokens WHERE run_id = ? GROUP BY token_id",
        [found.selection.run_id],
    )
    texts = pd.Series(rows["token"].to_numpy(dtype=object), index=rows["token_id"].to_numpy())
    return texts.reindex(found.ids).to_numpy(dtype=object)


def _part(slots: RouterSlots, labels: _Labels, top: int) -> dict[str, Any]:
    """The rows of one router."""
    num_tokens = len(labels.everything.order)
    uses_E = count_table(slots, labels.everything, 0, 1)[0]
    rate_E = divide(uses_E, num_tokens)
    words = _best_words(slots, labels.frequent, rate_E, top)
    size_W, rate_W = labels.frequent.sizes[words.labels], rate_E[words.experts]
    low_W, high_W, units_W = _intervals(slots, labels, words)
    share_W = divide(words.slots, size_W)
    number = len(size_W)
    return {
        "layer": np.full(number, slots.router.layer),
        "kind": [slots.router.kind] * number,
        "expert": words.experts,
        "rank": np.arange(number) - np.searchsorted(words.experts, words.experts) + 1,
        "label": words.labels,
        "share": share_W,
        "low": low_W,
        "high": high_W,
        "expert_rate": rate_W,
        "lift": divide(share_W, rate_W),
        "log_likelihood": words.scores,
        "expert_share": divide(words.slots, uses_E[words.experts]),
        "num_slots": words.slots,
        "count": size_W,
        "num_tokens": np.full(number, num_tokens),
        "num_prompts": np.full(number, labels.num_prompts),
        "num_units": units_W,
    }


def _best_words(slots: RouterSlots, tokens: Arrangement, rate_E: FloatArray, top: int) -> _Words:
    """The best rows of each expert, a few labels at a time."""
    num_experts = len(rate_E)
    none = np.zeros(0, dtype=np.int64)
    best = _Words(experts=none, labels=none, slots=none, scores=np.zeros(0))
    least_E = np.zeros(num_experts)
    sizes_V = tokens.sizes
    own = np.flatnonzero(sizes_V)
    dense = replace(
        tokens,
        labels=np.searchsorted(own, tokens.labels),
        starts=np.r_[tokens.starts[own], len(tokens.order)],
    )
    for first, last in label_ranges(np.arange(len(own) + 1), num_experts):
        counts_VE = count_table(slots, dense, first, last)
        scores_VE = _log_likelihood(counts_VE, dense.sizes[first:last][:, None], rate_E)
        # Rows below the last kept one of their expert can be dropped at once.
        label, expert = np.nonzero(scores_VE > least_E)
        found = _Words(
            experts=expert,
            labels=own[first + label],
            slots=counts_VE[label, expert],
            scores=scores_VE[label, expert],
        )
        best = best.joined(found).best(top)
        full = np.bincount(best.experts, minlength=num_experts) == top
        lowest_E = np.full(num_experts, np.inf)
        np.minimum.at(lowest_E, best.experts, best.scores)
        least_E = np.where(full, lowest_E, 0)
    return best


def _log_likelihood(counts_VE: IntArray, size_V1: IntArray, rate_E: FloatArray) -> FloatArray:
    """N_x KL(share || rate) where the share is above the rate, else 0, [V, E]."""
    expected_VE = size_V1 * rate_E
    rest_VE = size_V1 - counts_VE
    with np.errstate(divide="ignore", invalid="ignore"):
        scores_VE = xlogy(counts_VE, counts_VE / expected_VE) + xlogy(
            rest_VE, rest_VE / (size_V1 - expected_VE)
        )
    return np.where(counts_VE > expected_VE * (1 + 1e-12), scores_VE, 0.0)


def _intervals(
    slots: RouterSlots, labels: _Labels, words: _Words
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Interval of the share of each row, and the units in which its label occurs, [W] each."""
    num_units, number = int(labels.units.max()) + 1, len(words.labels)
    own, label_W = np.unique(words.labels, return_inverse=True)
    tokens = labels.frequent
    chosen = np.flatnonzero(np.isin(tokens.labels, own))
    label_N = np.searchsorted(own, tokens.labels[chosen])
    unit_N = labels.units[tokens.order[chosen]]
    pair_N = label_N * num_units + unit_N
    pairs, size_Q = np.unique(pair_N, return_counts=True)
    squared_V = np.bincount(pairs // num_units, size_Q.astype(float) ** 2, minlength=len(own))
    units_V = np.bincount(pairs // num_units, minlength=len(own))
    # Which row each slot belongs to, if any.
    row_VE = np.full((len(own), slots.router.num_experts + 1), -1, dtype=np.int64)
    row_VE[label_W, words.experts] = np.arange(number)
    row_NK = row_VE[label_N[:, None], slots.of(tokens.order[chosen])]
    row_S, unit_S = row_NK.ravel(), np.repeat(unit_N, row_NK.shape[1])
    kept = row_S >= 0
    found, uses_D = np.unique(row_S[kept] * num_units + unit_S[kept], return_counts=True)
    row_D, unit_D = np.divmod(found, num_units)
    size_D = size_Q[np.searchsorted(pairs, label_W[row_D] * num_units + unit_D)]
    low_W, high_W = ratio_interval(
        words.slots,
        tokens.sizes[words.labels],
        squares=np.bincount(row_D, uses_D.astype(float) ** 2, minlength=number),
        crosses=np.bincount(row_D, (uses_D * size_D).astype(float), minlength=number),
        squared_denominators=squared_V[label_W],
        num_units=units_V[label_W],
    )
    return low_W, high_W, units_V[label_W]
