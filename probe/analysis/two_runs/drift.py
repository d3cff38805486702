"""Which experts a run uses more or less than a reference run does, on the same tokens.

Fine-tuning, further training or steering moves routing. The shift of an expert is the difference of
two shares of the same tokens (domain specialization of OLMoE, arXiv 2409.02060, section 5, in two
runs), paired token by token; `kept` says how many of the tokens that used the expert still do. Both
are needed: an expert can serve other tokens and as many as before.

Whether a shift is more than chance is tested by swapping the two runs within units of resampling.
All experts are tested at once, none is picked first, so p is adjusted over all of them (step-down
max-T, Westfall and Young 1993), as in a contrast without a split.

Letters: P prompts, U units, N tokens of a block at a router, K slots of a token, E experts of a
router, X experts of all routers one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.probe.analysis.columns import CHANCE, EXPERT, KIND, LAYER, expert_index, stack_parts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.intervals import ratio_interval
from moescope.probe.analysis.measures import FloatArray, divide
from moescope.probe.analysis.selection import IntArray, Router
from moescope.probe.analysis.statistics import Parts, smallest_p, step_down_max_t
from moescope.probe.analysis.two_runs.matched_runs import (
    MatchedRuns,
    PairedSlots,
    match_runs,
    read_pairs,
)
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

# Permutations per level: the smallest p must lie well below the level.
PERMUTATIONS_PER_LEVEL = 20

_OLMOE = "domain specialization: OLMoE, arXiv 2409.02060, section 5"
_INTERVAL = "missing with fewer than 2 units"

COLUMNS = (
    LAYER,
    KIND,
    EXPERT,
    Column(
        name="token_share",
        unit="share of tokens",
        range="[0, 1]; sums to K over the experts of a router",
        definition="Tokens that select the expert in the run, over all tokens.",
        source=_OLMOE,
    ),
    Column(
        name="token_share_against",
        unit="share of tokens",
        range="[0, 1]; sums to K over the experts of a router",
        definition="The same tokens in the reference.",
        source=_OLMOE,
    ),
    Column(
        name="shift",
        unit="share of tokens",
        range="[-1, 1]; 0 without drift; sums to 0 over the experts of a router where K is the "
        "same",
        definition="token_share minus token_share_against.",
    ),
    Column(
        name="low",
        unit="share of tokens",
        range=f"[-1, 1]; {_INTERVAL}",
        definition="Lower end of the 95 % interval of the shift over units, paired by token.",
    ),
    Column(
        name="high",
        unit="share of tokens",
        range=f"[-1, 1]; {_INTERVAL}",
        definition="Upper end of the 95 % interval of the shift over units, paired by token.",
    ),
    Column(
        name="kept",
        unit="share of the expert's tokens",
        range="[0, 1]; missing where the reference never selects the expert",
        definition="Of the tokens that select the expert in the reference, those that select it "
        "in the run too.",
    ),
    Column(
        name="kept_low",
        unit="share of the expert's tokens",
        range="[0, 1]; missing with fewer than 2 units that select the expert",
        definition="Lower end of the 95 % interval of kept over units.",
    ),
    Column(
        name="kept_high",
        unit="share of the expert's tokens",
        range="[0, 1]; missing with fewer than 2 units that select the expert",
        definition="Upper end of the 95 % interval of kept over units.",
    ),
    Column(
        name="kept_chance",
        unit="share of the expert's tokens",
        range="[0, 1]",
        definition="kept expected when the run selects the expert as often as it does but "
        "independently of the token: token_share.",
    ),
    Column(
        name="weight_shift",
        unit="routing weight",
        range="any; missing where a run has no weights",
        definition="Routing weight of the expert in the run minus that in the reference, 0 where "
        "it is not selected; mean over all tokens.",
    ),
    Column(
        name="p",
        unit="",
        range=f"(0, 1]; {_INTERVAL}",
        definition="Two-sided permutation p of the shift, the two runs swapped within units, "
        "adjusted over all experts of the table (step-down max-T).",
        source="Westfall and Young 1993, algorithm 4.1",
    ),
    Column(
        name="moved",
        unit="",
        range="true or false",
        definition="Whether p is at most the level: a shift that chance does not explain.",
    ),
    CHANCE,
    Column(
        name="num_tokens_against",
        unit="tokens",
        range="0 or more",
        definition="Tokens that select the expert in the reference: what kept is a share of.",
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


def expert_drift(
    store: Store,
    run_id: str,
    *,
    against: str,
    filters: Filters | None = None,
    unit: str = "pair_id",
    level: float = 0.05,
    permutations: int = 2_000,
    seed: int = 0,
) -> AnalysisTable:
    """Shift of every expert's use from a reference run to the run, the largest first.

    Args:
        store: where both runs lie.
        run_id: the run.
        against: the reference: base model, unsteered run, earlier checkpoint.
        filters: which prompts, tokens and routers of the run count.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.
        level: the chance of any false finding among all experts.
        permutations: swaps of the two runs; at least 20 / level.
        seed: of the permutations.

    Raises:
        RunError: when there is no such run.
        AnalysisInputError: when the runs cannot be compared (see `match_runs`), or a parameter is
            out of range.
    """
    _check(level, permutations)
    matched = match_runs(store, run_id, against=against, filters=filters, unit=unit)
    totals = [_Totals.empty(router, matched) for router in matched.run.routers]
    for pair in read_pairs(matched, weights=matched.has_weights):
        totals[pair.router].add(pair, matched.units)
    p_X, notes = _tested(totals, matched, level, permutations, np.random.default_rng(seed))
    p_of_router = np.split(p_X, np.cumsum([router.num_experts for router in matched.run.routers]))
    parts = [
        _rows(router, total, matched) | {"p": p_E, "moved": p_E <= level}
        for router, total, p_E in zip(matched.run.routers, totals, p_of_router, strict=False)
    ]
    parameters = {
        "against": against, "unit": unit, "level": level, "permutations": permutations,
        "seed": seed,
    }  # fmt: skip
    frame = stack_parts(parts, COLUMNS)
    order = np.argsort(-frame["shift"].abs().to_numpy(), kind="stable")
    return AnalysisTable(
        name="drift",
        title=f"Drift of the experts: {run_id} against {against}",
        frame=frame.iloc[order].reset_index(drop=True),
        columns=COLUMNS,
        context=matched.run.context(
            num_prompts=len(matched.units),
            num_tokens=len(matched.tokens),
            parameters=parameters,
        ),
        notes=(*matched.notes, *notes),
        summary={
            "moved": int(frame["moved"].sum()),
            "experts": len(frame),
            "saturation": float(pd.Series([total.saturation() for total in totals]).mean()),
        },
    )


def _check(level: float, permutations: int) -> None:
    """Refuse parameters out of range."""
    if not 0 < level < 1:
        raise AnalysisInputError(f"level is {level}; it lies between 0 and 1")
    least = math.ceil(PERMUTATIONS_PER_LEVEL / level)
    if permutations < least:
        raise AnalysisInputError(
            f"{permutations} permutations are too few at level {level:g}; {least:,} or more are "
            "right"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Totals:
    """Running sums of one router.

    Attributes:
        tokens: of each prompt, [P].
        overlap: share of a token's experts that it keeps, summed over the tokens of each prompt.
        used: tokens of each unit that select each expert, [U, E].
        used_against: the same in the reference.
        kept: tokens of each unit that select it in both.
        weights: routing weight of each expert in the run and in the reference, [2, E].
    """

    tokens: FloatArray
    overlap: FloatArray
    used: NDArray[np.float32]
    used_against: NDArray[np.float32]
    kept: NDArray[np.float32]
    weights: FloatArray

    @classmethod
    def empty(cls, router: Router, matched: MatchedRuns) -> _Totals:
        """All sums at 0."""
        tokens, overlap = np.zeros((2, len(matched.units)))
        used, used_against, kept = np.zeros(
            (3, matched.num_units, router.num_experts), dtype=np.float32
        )
        return cls(
            tokens=tokens,
            overlap=overlap,
            used=used,
            used_against=used_against,
            kept=kept,
            weights=np.zeros((2, router.num_experts)),
        )

    def add(self, pair: PairedSlots, unit_P: IntArray) -> None:
        """Add the tokens of a block; no prompt is in two blocks."""
        if not len(pair.prompts):
            return
        is_first_N = np.diff(pair.prompts, prepend=-1) != 0
        starts = np.flatnonzero(is_first_N)
        prompts = pair.prompts[starts]
        kept_JN = pair.kept()
        overlap_N = kept_JN.sum(axis=0) / (pair.reference < pair.num_experts).sum(axis=0)
        self.tokens[prompts] = np.diff(starts, append=len(pair.prompts))
        self.overlap[prompts] = np.add.reduceat(overlap_N, starts)
        # Experts of each unit of the block side by side, the two that mean "none" included.
        units, unit_of_prompt = np.unique(unit_P[prompts], return_inverse=True)
        size = pair.num_experts + 2
        offset_N = unit_of_prompt[np.cumsum(is_first_N) - 1] * size
        lost_JN = np.where(kept_JN, pair.reference, pair.num_experts)
        sides = (
            (self.used, pair.run),
            (self.used_against, pair.reference),
            (self.kept, lost_JN),
        )
        for sums_UE, experts_KN in sides:
            counts = np.bincount((experts_KN + offset_N).ravel(), minlength=len(units) * size)
            sums_UE[units] += counts.reshape(-1, size)[:, :-2]
        weighted = ((pair.run, pair.run_weights), (pair.reference, pair.reference_weights))
        for sums_E, (experts_KN, weights_KN) in zip(self.weights, weighted, strict=True):
            if len(weights_KN):
                sums_E += np.bincount(experts_KN.ravel(), weights_KN.ravel(), minlength=size)[:-2]

    def saturation(self) -> float:
        """Mean over tokens of the share of their experts that they keep."""
        return float(divide(self.overlap.sum(), self.tokens.sum()))


def _tested(
    totals: Sequence[_Totals],
    matched: MatchedRuns,
    level: float,
    permutations: int,
    rng: np.random.Generator,
) -> tuple[FloatArray, tuple[str, ...]]:
    """Adjusted p of every expert, [X]; what limits them."""
    tokens_P = np.max([total.tokens for total in totals], axis=0)
    tokens_U = np.bincount(matched.units, tokens_P, minlength=matched.num_units)
    counted = np.flatnonzero(tokens_U)
    used_UX = np.concatenate([total.used[counted] for total in totals], axis=1)
    against_UX = np.concatenate([total.used_against[counted] for total in totals], axis=1)
    num_units, num_experts = used_UX.shape
    if num_units < 2:
        return np.full(num_experts, np.nan), ("With one unit no shift can be tested.",)
    # An expert that no unit uses more or less cannot have moved, nor pass for the largest shift.
    differs = np.flatnonzero((used_UX != against_UX).any(axis=0))
    parts = Parts(
        counts=np.concatenate([used_UX[:, differs], against_UX[:, differs]]).astype(np.float64),
        tokens=np.tile(tokens_U[counted], 2),
        units=np.tile(np.arange(num_units), 2),
        is_a=np.arange(2 * num_units) < num_units,
    )
    p_X = np.ones(num_experts)
    if len(differs):
        p_X[differs] = step_down_max_t(parts, permutations, rng)
    least = smallest_p(parts)
    if least <= level:
        return p_X, ()
    return p_X, (
        f"With so few units no p can be below {least:.3g}: nothing can be called moved at "
        f"{level:g}, whatever the shifts.",
    )


def _rows(router: Router, total: _Totals, matched: MatchedRuns) -> dict[str, Any]:
    """The rows of one router, without the test."""
    tokens_U = np.bincount(matched.units, total.tokens, minlength=matched.num_units)[:, None]
    tokens = tokens_U.sum()
    used_E, against_E, kept_E = (
        sums_UE.sum(axis=0, dtype=np.float64)
        for sums_UE in (total.used, total.used_against, total.kept)
    )
    shift = total.used.astype(np.float64) - total.used_against
    low_E, high_E = _interval(shift, tokens_U, (-1.0, 1.0))
    kept_low_E, kept_high_E = _interval(total.kept, total.used_against, (0.0, 1.0))
    weight_shift_E = divide(total.weights[0] - total.weights[1], tokens)
    share_E = divide(used_E, tokens)
    numbers = {
        "chance": router.chance,
        "num_tokens": int(tokens),
        "num_prompts": int((total.tokens > 0).sum()),
        "num_units": int((tokens_U > 0).sum()),
    }
    return (
        expert_index(router, None)
        | {
            "token_share": share_E,
            "token_share_against": divide(against_E, tokens),
            "shift": divide(used_E - against_E, tokens),
            "low": low_E,
            "high": high_E,
            "kept": divide(kept_E, against_E),
            "kept_low": kept_low_E,
            "kept_high": kept_high_E,
            "kept_chance": share_E,
            "weight_shift": weight_shift_E
            if matched.has_weights
            else np.full_like(share_E, np.nan),
            "num_tokens_against": against_E.astype(np.int64),
        }
        | {name: np.full(router.num_experts, number) for name, number in numbers.items()}
    )


def _interval(
    numerator_UE: NDArray[Any], denominator_UE: NDArray[Any], bounds: tuple[float, float]
) -> tuple[FloatArray, FloatArray]:
    """95 % interval over units of each expert's ratio."""
    top_UE, bottom_UE = (
        np.asarray(values, dtype=np.float64) for values in (numerator_UE, denominator_UE)
    )
    return ratio_interval(
        top_UE.sum(axis=0),
        bottom_UE.sum(axis=0),
        squares=(top_UE**2).sum(axis=0),
        crosses=(top_UE * bottom_UE).sum(axis=0),
        squared_denominators=(bottom_UE**2).sum(axis=0),
        num_units=(bottom_UE > 0).sum(axis=0),
        bounds=bounds,
    )
