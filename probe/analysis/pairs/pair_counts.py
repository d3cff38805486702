"""How often tokens use two experts together, and how much that varies from unit to unit.

The two experts are of one router (co-activation) or of two layers (transitions). Every token
enters with all its pairs; one count per unit and pair gives the sums over units that the interval
of a ratio needs (`moescope.probe.analysis.intervals`). Blocks of tokens stream by, so memory
depends on the number of experts and not on the number of tokens.

Letters: N tokens of a block or less, K slots per token, E experts of the first router, F of the
second, C pairs of a token, U units, P prompts, G groups of units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.probe.analysis.intervals import ratio_interval
from moescope.probe.analysis.measures import FloatArray, divide
from moescope.probe.analysis.selection import MOST_ROWS, IntArray, Router, Selection
from moescope.probe.analysis.token_slots import Tokens, read_slots
from moescope.probe.errors import AnalysisInputError

PairForm = Literal["all", "adjacent", "top1"]
"""Which slots of a token make pairs: every slot of the first router with every one of the second,
neighbors in rank order of one router (both ways), or the slots of rank 0."""

# Cells (units x experts x experts) counted at a time, small enough to stay in cache.
CELLS_PER_STEP = 100_000
# Pairs counted at a time.
PAIRS_PER_STEP = 2_000_000
# Sorting a pair costs as much as visiting so many cells.
CELLS_PER_SORTED_PAIR = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class PairCounts:
    """Pairs (i, j) of experts used by one token: i of the first router, j of the second.

    Attributes:
        first: router of i.
        second: router of j; the same one where pairs lie within a layer.
        pairs: how many pairs (i, j) the tokens have, [E, F].
        squares: sum over units of their squared number of pairs, [E, F].
        crosses: sum over units of pairs (i, j) times tokens that use i, [E, F].
        users: tokens that use i (as their top-1, where pairs are of top-1), [E].
        squared_users: sum over units of their squared number of such tokens, [E].
        user_units: units with such a token, [E].
        followers: tokens that use j, [F].
        group_pairs: pairs of each group of units, float32[G, E, F]; G is 0 without groups.
        num_tokens: tokens that passed both routers.
        num_prompts: prompts with such a token.
        num_units: units with such a token.
    """

    first: Router
    second: Router
    pairs: FloatArray
    squares: FloatArray
    crosses: FloatArray
    users: FloatArray
    squared_users: FloatArray
    user_units: IntArray
    followers: FloatArray
    group_pairs: NDArray[np.float32]
    num_tokens: int
    num_prompts: int
    num_units: int

    @property
    def share(self) -> FloatArray:
        """Pairs (i, j) per token that uses i, [E, F]; NaN where no token uses i."""
        return divide(self.pairs, self.users[:, None])

    def share_interval(self) -> tuple[FloatArray, FloatArray]:
        """95 % interval of `share` over units, [E, F] each; NaN with fewer than 2 units."""
        return ratio_interval(
            self.pairs,
            self.users[:, None],
            squares=self.squares,
            crosses=self.crosses,
            squared_denominators=self.squared_users[:, None],
            num_units=self.user_units[:, None],
        )


def count_pairs(
    selection: Selection,
    tokens: Tokens,
    links: Sequence[tuple[Router, Router]],
    unit_P: IntArray,
    *,
    form: PairForm = "all",
    group_P: IntArray | None = None,
    ranked: str | None = None,
) -> list[PairCounts]:
    """Count the pairs of every link between routers.

    Args:
        selection: the routers.
        tokens: of `read_tokens`.
        links: first and second router, out of the selection.
        unit_P: unit of each prompt, from 0.
        form: which slots make pairs.
        group_P: group of each prompt for a jackknife; all prompts of a unit are in one.
        ranked: what needs slots in rank order, for the message; None where order does not matter.

    Raises:
        AnalysisInputError: when ranks are asked for and the run has none.
    """
    groups = np.zeros(0, dtype=np.int64)
    if group_P is not None:
        groups = np.zeros(int(unit_P.max()) + 1, dtype=np.int64)
        groups[unit_P] = group_P
    counters = [_Counter(first, second, form, groups) for first, second in links]
    for block in read_slots(selection, tokens, unit_P=unit_P, ranked=ranked):
        prompt_N = tokens.prompts[block.tokens]
        unit_N = unit_P[prompt_N]
        experts = block.experts
        if (np.diff(unit_N) < 0).any():
            order = np.argsort(unit_N, kind="stable")
            prompt_N, unit_N = prompt_N[order], unit_N[order]
            experts = {router: slots[order] for router, slots in experts.items()}
        for counter in counters:
            counter.add(experts[counter.first], experts[counter.second], unit_N, prompt_N)
    return [counter.result() for counter in counters]


def check_rows(num_rows: int, what: str) -> None:
    """Refuse a table that is too long to help anybody.

    Raises:
        AnalysisInputError: above `MOST_ROWS`.
    """
    if num_rows > MOST_ROWS:
        raise AnalysisInputError(
            f"{what} of the selected layers have {num_rows:,} rows, more than {MOST_ROWS:,}; "
            "keep fewer layers with --layers"
        )


class _Counter:
    """Running sums of one link."""

    def __init__(self, first: Router, second: Router, form: PairForm, group_U: IntArray) -> None:
        self.first, self.second, self._form, self._group_U = first, second, form, group_U
        # One place more on both sides, for slots that a token lacks.
        self._padded = (first.num_experts + 1, second.num_experts + 1)
        self._size = self._padded[0] * self._padded[1]
        self._pairs, self._squares, self._crosses = np.zeros((3, self._size))
        self._users, self._squared_users = np.zeros((2, self._padded[0]))
        self._user_units = np.zeros(self._padded[0], dtype=np.int64)
        self._followers = np.zeros(self._padded[1])
        num_groups = int(group_U.max(initial=-1)) + 1
        self._group_pairs = np.zeros((num_groups, self._size), dtype=np.float32)
        self._num_tokens = self._num_prompts = self._num_units = 0

    def add(
        self,
        first_NK: NDArray[np.uint16],
        second_NK: NDArray[np.uint16],
        unit_N: IntArray,
        prompt_N: IntArray,
    ) -> None:
        """Add a block of whole units, in order of unit."""
        if self._form == "top1":
            first_NK, second_NK = first_NK[:, :1], second_NK[:, :1]
        passed_N = first_NK[:, 0] < self.first.num_experts
        passed_N &= second_NK[:, 0] < self.second.num_experts
        if not passed_N.all():
            first_NK, second_NK = first_NK[passed_N], second_NK[passed_N]
            unit_N, prompt_N = unit_N[passed_N], prompt_N[passed_N]
        if not len(unit_N):
            return
        self._num_tokens += len(unit_N)
        # The tokens of a prompt stand together, as those of a unit do.
        self._num_prompts += int((np.diff(prompt_N, prepend=-1) != 0).sum())
        self._followers += np.bincount(second_NK.ravel(), minlength=self._padded[1])
        is_new_N = np.diff(unit_N, prepend=-1) != 0
        starts_U = np.r_[np.flatnonzero(is_new_N), len(unit_N)]
        self._num_units += len(starts_U) - 1
        unit_U, local_N = unit_N[starts_U[:-1]], np.cumsum(is_new_N) - 1
        pairs_per_token = self._codes(first_NK[:1], second_NK[:1]).size
        num_pairs, num_cells = len(unit_N) * pairs_per_token, len(unit_U) * self._size
        is_sparse = num_pairs * CELLS_PER_SORTED_PAIR < num_cells
        step = CELLS_PER_STEP // self._size
        if is_sparse:
            step = PAIRS_PER_STEP * len(unit_U) // max(num_pairs, 1)
        for low, high in _steps(len(unit_U), max(step, 1)):
            rows = slice(int(starts_U[low]), int(starts_U[high]))
            local = local_N[rows] - low
            users_UE = self._count_users(first_NK[rows], local, high - low)
            count = self._count_sparse if is_sparse else self._count_dense
            count(first_NK[rows], second_NK[rows], local, users_UE, unit_U[low:high])

    def _count_users(
        self, first_NK: NDArray[np.uint16], local_N: IntArray, num_units: int
    ) -> FloatArray:
        width = self._padded[0]
        places = first_NK + local_N[:, None] * width
        users_UE = np.bincount(places.ravel(), minlength=num_units * width).reshape(-1, width)
        self._users += users_UE.sum(axis=0)
        self._squared_users += (users_UE**2).sum(axis=0)
        self._user_units += (users_UE > 0).sum(axis=0)
        return users_UE.astype(np.float64)

    def _count_dense(
        self,
        first_NK: NDArray[np.uint16],
        second_NK: NDArray[np.uint16],
        local_N: IntArray,
        users_UE: FloatArray,
        unit_U: IntArray,
    ) -> None:
        """Count in an array of all cells: few units, many pairs in each."""
        shape = (len(users_UE), self._size)
        counts = np.zeros(shape[0] * shape[1], dtype=np.int64)
        pairs_per_token = self._codes(first_NK[:1], second_NK[:1]).size
        for low, high in _steps(len(local_N), max(PAIRS_PER_STEP // max(pairs_per_token, 1), 1)):
            offset_N = local_N[low:high] * self._size
            codes_CN = self._codes(first_NK[low:high], second_NK[low:high], offset_N)
            counts += np.bincount(codes_CN.ravel(), minlength=len(counts))
        counts_UX = counts.reshape(shape).astype(np.float64)
        self._pairs += counts_UX.sum(axis=0)
        self._squares += np.einsum("ux,ux->x", counts_UX, counts_UX)
        by_expert_UEF = counts_UX.reshape(-1, *self._padded)
        self._crosses += np.einsum("uef,ue->ef", by_expert_UEF, users_UE).ravel()
        if len(self._group_pairs):
            for group, counts_X in zip(self._group_U[unit_U], counts_UX, strict=True):
                self._group_pairs[group] += counts_X

    def _count_sparse(
        self,
        first_NK: NDArray[np.uint16],
        second_NK: NDArray[np.uint16],
        local_N: IntArray,
        users_UE: FloatArray,
        unit_U: IntArray,
    ) -> None:
        """Count by sorting: many units, few pairs in each."""
        codes_CN = self._codes(first_NK, second_NK, local_N * self._size)
        cells, counts = np.unique(codes_CN, return_counts=True)
        local, pair = np.divmod(cells, self._size)
        users = users_UE[local, pair // self._padded[1]]
        self._pairs += np.bincount(pair, counts, self._size)
        self._squares += np.bincount(pair, counts.astype(np.float64) ** 2, self._size)
        self._crosses += np.bincount(pair, counts * users, self._size)
        if len(self._group_pairs):
            places = self._group_U[unit_U][local] * self._size + pair
            found = np.bincount(places, counts, self._group_pairs.size)
            self._group_pairs += found.reshape(self._group_pairs.shape).astype(np.float32)

    def _codes(
        self,
        first_NK: NDArray[np.uint16],
        second_NK: NDArray[np.uint16],
        offset_N: IntArray | None = None,
    ) -> IntArray:
        """The place of each pair of each token, [C, N]: offset + i * (F + 1) + j."""
        # Slots before tokens: the sums below run along the long axis.
        row_KN = np.ascontiguousarray(first_NK.T).astype(np.int64) * self._padded[1]
        column_KN = np.ascontiguousarray(second_NK.T).astype(np.int64)
        if offset_N is not None:
            row_KN += offset_N
        if self._form == "adjacent":
            return np.concatenate([row_KN[:-1] + column_KN[1:], row_KN[1:] + column_KN[:-1]])
        return (row_KN[:, None, :] + column_KN[None, :, :]).reshape(-1, row_KN.shape[1])

    def result(self) -> PairCounts:
        """The sums so far, without the places of missing slots."""
        size_E, size_F = self.first.num_experts, self.second.num_experts

        def trimmed(cells: NDArray[Any]) -> NDArray[Any]:
            return cells.reshape(*cells.shape[:-1], *self._padded)[..., :size_E, :size_F]

        return PairCounts(
            first=self.first,
            second=self.second,
            pairs=trimmed(self._pairs),
            squares=trimmed(self._squares),
            crosses=trimmed(self._crosses),
            users=self._users[:size_E],
            squared_users=self._squared_users[:size_E],
            user_units=self._user_units[:size_E],
            followers=self._followers[:size_F],
            group_pairs=trimmed(self._group_pairs),
            num_tokens=self._num_tokens,
            num_prompts=self._num_prompts,
            num_units=self._num_units,
        )


def _steps(number: int, size: int) -> Iterator[tuple[int, int]]:
    """First and last of each part of `number` things, `size` at a time."""
    for low in range(0, number, size):
        yield low, min(low + size, number)
