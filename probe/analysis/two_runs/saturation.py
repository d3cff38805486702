"""How much of a run's routing is already that of a reference run: router saturation.

OLMoE (arXiv 2409.02060, section 5) compares checkpoints with the last one: the share of a token's
selected experts that the last checkpoint selects for it too. The same numbers compare a tuned model
with its base, or a steered run with an unsteered one. Tokens count only where both runs read the
same text up to them (`moescope.probe.analysis.two_runs.matched_runs`).

Letters: P prompts, U units, N tokens of a block at a router, K slots of a token in the run, J in
the reference, E routed experts, Q quantities summed over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moescope.probe.analysis.columns import KIND, LAYER, router_index, stack_parts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.intervals import ratio_interval
from moescope.probe.analysis.measures import FloatArray, divide, jensen_shannon, normalize
from moescope.probe.analysis.two_runs.matched_runs import (
    MatchedRuns,
    PairedSlots,
    match_runs,
    read_pairs,
)
from moescope.probe.storage.store import Store

_OLMOE = "router saturation: OLMoE, arXiv 2409.02060, section 5"
_INTERVAL = "missing with fewer than 2 units"

COLUMNS = (
    LAYER,
    KIND,
    Column(
        name="saturation",
        unit="share of experts",
        range="[0, 1]; 1 when every token keeps all its experts",
        definition="Experts that a token selects in both runs, over those it selects in the "
        "reference; mean over tokens. Selected counts, also with weight 0.",
        source=_OLMOE,
    ),
    Column(
        name="low",
        unit="share of experts",
        range=f"[0, 1]; {_INTERVAL}",
        definition="Lower end of the 95 % interval of saturation over units.",
    ),
    Column(
        name="high",
        unit="share of experts",
        range=f"[0, 1]; {_INTERVAL}",
        definition="Upper end of the 95 % interval of saturation over units.",
    ),
    Column(
        name="chance",
        unit="share of experts",
        range="K/E",
        definition="Saturation expected when the run selects its K experts uniformly.",
        source=_OLMOE,
    ),
    Column(
        name="chance_by_load",
        unit="share of experts",
        range="[0, 1]",
        definition="Saturation expected when both runs select independently of the token, each "
        "expert as often as it does: sum over experts of the product of the two shares of tokens, "
        "over K of the reference.",
    ),
    Column(
        name="top1_match",
        unit="share of tokens",
        range="[0, 1]; missing where a run has no ranks",
        definition="Tokens whose first-ranked expert is the same in both runs.",
        source=_OLMOE,
    ),
    Column(
        name="top1_low",
        unit="share of tokens",
        range=f"[0, 1]; {_INTERVAL}",
        definition="Lower end of the 95 % interval of top1_match over units.",
    ),
    Column(
        name="top1_high",
        unit="share of tokens",
        range=f"[0, 1]; {_INTERVAL}",
        definition="Upper end of the 95 % interval of top1_match over units.",
    ),
    Column(
        name="top1_chance",
        unit="share of tokens",
        range="[0, 1]",
        definition="top1_match expected when both runs rank independently of the token: sum over "
        "experts of the product of the two shares of tokens that rank it first.",
    ),
    Column(
        name="identical",
        unit="share of tokens",
        range="[0, 1]",
        definition="Tokens that select the same set of experts in both runs; by chance "
        "1 / C(E, K), practically none.",
    ),
    Column(
        name="jaccard",
        unit="",
        range="[0, 1]",
        definition="Experts that a token selects in both runs, over those it selects in either; "
        "mean over tokens.",
    ),
    Column(
        name="jsd",
        unit="nats",
        range="[0, ln 2]; 0 when both runs have the same load",
        definition="Jensen-Shannon divergence of the two loads, each the share of slots of every "
        "expert over all these tokens.",
    ),
    Column(
        name="jsd_token",
        unit="nats",
        range="[0, ln 2]; missing where a run has no weights",
        definition="Jensen-Shannon divergence of a token's routing weights in the two runs, each "
        "divided by its sum; mean over the tokens whose weights sum above 0 in both.",
    ),
    Column(
        name="num_experts",
        unit="experts",
        range="1 or more",
        definition="Routed experts, E.",
    ),
    Column(
        name="top_k",
        unit="experts",
        range="above 0",
        definition="Experts that a token selects in the run, mean over tokens.",
    ),
    Column(
        name="top_k_against",
        unit="experts",
        range="above 0",
        definition="Experts that a token selects in the reference, mean over tokens.",
    ),
    Column(
        name="num_tokens",
        unit="tokens",
        range="1 or more",
        definition="Counted tokens that are the same in both runs and passed this router in both.",
    ),
    Column(
        name="num_prompts",
        unit="prompts",
        range="1 or more",
        definition="Prompts with such a token.",
    ),
    Column(
        name="num_units",
        unit="units",
        range="1 or more",
        definition="Units of resampling with such a token.",
    ),
)

# Rows of the sums over tokens.
_TOKENS, _OVERLAP, _TOP1, _IDENTICAL, _JACCARD, _JSD, _HAS_JSD, _RUN_K, _OTHER_K = range(9)
_NUM_SUMS: Final = 9


def router_saturation(
    store: Store,
    run_id: str,
    *,
    against: str,
    filters: Filters | None = None,
    unit: str = "pair_id",
) -> AnalysisTable:
    """Share of each token's routing that is the same as in a reference run, by router.

    Where the two runs select different numbers of experts, the overlap is over the number of the
    reference.

    Args:
        store: where both runs lie.
        run_id: the run.
        against: the reference: final checkpoint, base model, unsteered run.
        filters: which prompts, tokens and routers of the run count.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.

    Raises:
        RunError: when there is no such run.
        AnalysisInputError: when the runs cannot be compared; see `match_runs`.
    """
    matched = match_runs(store, run_id, against=against, filters=filters, unit=unit)
    totals = [
        _Totals.empty(router.num_experts, len(matched.units)) for router in matched.run.routers
    ]
    for pair in read_pairs(matched, weights=matched.has_weights):
        totals[pair.router].add(pair, has_weights=matched.has_weights)
    parts = [
        router_index(router, None) | _row(total, matched)
        for router, total in zip(matched.run.routers, totals, strict=True)
    ]
    frame = stack_parts(parts, COLUMNS)
    return AnalysisTable(
        name="saturation",
        title=f"Saturation of the routers: {run_id} against {against}",
        frame=frame,
        columns=COLUMNS,
        context=matched.run.context(
            num_prompts=len(matched.units),
            num_tokens=len(matched.tokens),
            parameters={"against": against, "unit": unit},
        ),
        notes=(*matched.notes, *_notes(matched, frame["top_k"], frame["top_k_against"])),
        summary={"saturation": float(frame["saturation"].mean())},
    )


def _notes(matched: MatchedRuns, run_k: Any, other_k: Any) -> tuple[str, ...]:
    notes = []
    if not np.allclose(run_k, other_k):
        notes.append(
            "The runs select different numbers of experts (top_k, top_k_against): saturation is "
            "over the number of the reference."
        )
    if not matched.has_ranks:
        notes.append("One of the runs has no ranks, so top1_match is missing.")
    if not matched.has_weights:
        notes.append("One of the runs has no routing weights, so jsd_token is missing.")
    return tuple(notes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Totals:
    """Running sums of one router.

    Attributes:
        sums: of each quantity over the tokens of each prompt, [Q, P].
        load: slots of each expert in the run and in the reference, [2, E].
        first: tokens that rank each expert first, [2, E].
    """

    sums: FloatArray
    load: FloatArray
    first: FloatArray

    @classmethod
    def empty(cls, num_experts: int, num_prompts: int) -> _Totals:
        """All sums at 0."""
        load, first = np.zeros((2, 2, num_experts))
        return cls(sums=np.zeros((_NUM_SUMS, num_prompts)), load=load, first=first)

    def add(self, pair: PairedSlots, *, has_weights: bool) -> None:
        """Add the tokens of a block; no prompt is in two blocks."""
        if not len(pair.prompts):
            return
        starts = np.flatnonzero(np.diff(pair.prompts, prepend=-1))
        per_token_QN = _per_token(pair, has_weights=has_weights)
        self.sums[:, pair.prompts[starts]] = np.add.reduceat(per_token_QN, starts, axis=1)
        size = pair.num_experts + 2
        for side, experts_KN in enumerate((pair.run, pair.reference)):
            self.load[side] += np.bincount(experts_KN.ravel(), minlength=size)[:-2]
            self.first[side] += np.bincount(experts_KN[0], minlength=size)[:-2]


def _per_token(pair: PairedSlots, *, has_weights: bool) -> FloatArray:
    """The quantities of each token, [Q, N]."""
    kept_JN = pair.kept()
    overlap_N = kept_JN.sum(axis=0)
    run_k_N = (pair.run < pair.num_experts).sum(axis=0)
    other_k_N = (pair.reference < pair.num_experts).sum(axis=0)
    found_QN = np.zeros((_NUM_SUMS, len(pair.prompts)))
    found_QN[_TOKENS] = 1
    found_QN[_OVERLAP] = overlap_N / other_k_N
    found_QN[_TOP1] = pair.run[0] == pair.reference[0]
    found_QN[_IDENTICAL] = (overlap_N == run_k_N) & (overlap_N == other_k_N)
    found_QN[_JACCARD] = overlap_N / (run_k_N + other_k_N - overlap_N)
    found_QN[_RUN_K], found_QN[_OTHER_K] = run_k_N, other_k_N
    if has_weights:
        divergence_N, found_QN[_HAS_JSD] = _token_divergence(pair, kept_JN)
        found_QN[_JSD] = divergence_N
    return found_QN


def _token_divergence(
    pair: PairedSlots, kept_JN: NDArray[np.bool_]
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """JSD of each token's renormalized weights in nats, 0 where undefined; where it is defined.

    Only experts that both runs select need logarithms: with p and q the two weights, an expert
    of one side alone adds p ln 2 / 2. Single precision, exactly 0 for equal weights.
    """
    sums = [weights.sum(axis=0) for weights in (pair.run_weights, pair.reference_weights)]
    defined_N = (sums[0] > 0) & (sums[1] > 0)
    divisors = [np.where(defined_N, sum_N, np.float32(1)) for sum_N in sums]
    p_KN = pair.run_weights / divisors[0]
    q_JN = np.asarray(pair.reference_weights / divisors[1], dtype=np.float32)
    q_KN = pair.at_run_slots(q_JN)
    smallest = np.finfo(np.float32).tiny
    half_KN = np.maximum((p_KN + q_KN) / 2, smallest)
    terms_KN = p_KN * np.log(np.maximum(p_KN / half_KN, smallest))
    terms_KN += q_KN * np.log(np.maximum(q_KN / half_KN, smallest))
    alone_N = (q_JN * ~kept_JN).sum(axis=0)
    divergence_N = (terms_KN.sum(axis=0) + alone_N * np.float32(np.log(2))) / 2
    return np.where(defined_N, np.clip(divergence_N, 0, np.log(2)), 0), defined_N


def _row(total: _Totals, matched: MatchedRuns) -> dict[str, Any]:
    """The numbers of one router."""
    sums_Q = total.sums.sum(axis=1)
    tokens = sums_Q[_TOKENS]
    means_Q = divide(sums_Q, tokens)
    share_E, other_share_E = divide(total.load, tokens)
    first_E, other_first_E = divide(total.first, tokens)
    tokens_U, overlap_U, top1_U = (
        np.bincount(matched.units, sums_P, minlength=matched.num_units).astype(np.float64)
        for sums_P in total.sums[[_TOKENS, _OVERLAP, _TOP1]]
    )
    low, high = _interval(overlap_U, tokens_U)
    top1 = [means_Q[_TOP1], *_interval(top1_U, tokens_U), first_E @ other_first_E]
    if not matched.has_ranks:
        top1 = [np.nan] * 4
    return {
        "saturation": means_Q[_OVERLAP],
        "low": low,
        "high": high,
        "chance": means_Q[_RUN_K] / len(share_E),
        "chance_by_load": divide(share_E @ other_share_E, means_Q[_OTHER_K]),
        **dict(zip(("top1_match", "top1_low", "top1_high", "top1_chance"), top1, strict=True)),
        "identical": means_Q[_IDENTICAL],
        "jaccard": means_Q[_JACCARD],
        "jsd": jensen_shannon(*normalize(total.load)),
        "jsd_token": divide(sums_Q[_JSD], sums_Q[_HAS_JSD]),
        "num_experts": len(share_E),
        "top_k": means_Q[_RUN_K],
        "top_k_against": means_Q[_OTHER_K],
        "num_tokens": int(tokens),
        "num_prompts": int((total.sums[_TOKENS] > 0).sum()),
        "num_units": int((tokens_U > 0).sum()),
    }


def _interval(sums_U: FloatArray, tokens_U: FloatArray) -> tuple[FloatArray, FloatArray]:
    """95 % interval over units of a mean over tokens."""
    return ratio_interval(
        sums_U.sum(),
        tokens_U.sum(),
        squares=(sums_U**2).sum(),
        crosses=(sums_U * tokens_U).sum(),
        squared_denominators=(tokens_U**2).sum(),
        num_units=(tokens_U > 0).sum(),
    )
