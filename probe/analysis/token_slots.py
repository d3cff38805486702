"""Which experts every counted token used: the reader under analyses of order, pairs and tokens.

`read_tokens` finds the tokens that the filters leave, `read_slots` goes through their routing in
blocks of whole prompts, all routers of a block together, so that what a token used in one layer
stands beside what it used in the next. Where usage suffices, `moescope.probe.analysis.counts` is
the faster reader.

Letters: P prompts, T counted tokens, N tokens of a block, K slots per token, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.probe.analysis.selection import IntArray, Router, Selection
from moescope.probe.analysis.token_filters import chosen_tokens_sql, column_array
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.slots import weights_of

# Slots fetched at a time: about 2 bytes each for the expert, 4 for a weight, and a row's keys.
SLOTS_PER_READ = 8_000_000

# Columns that look at the token before or after, counted or not; -1 where there is none.
NEIGHBORS: Final[Mapping[str, str]] = {
    "next_token_id": "lead(token_id)",
    "previous_token_id": "lag(token_id)",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """The counted tokens of a selection, by prompt and position.

    Attributes:
        prompts: index of each token's prompt in `selection.prompts`, ascending, [T].
        positions: in the prompt, ascending within it, [T].
        columns: further columns of `tokens`, [T] each.
    """

    prompts: IntArray
    positions: IntArray
    columns: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_prompts(self) -> int:
        """Prompts with at least one counted token."""
        return int((np.diff(self.prompts) != 0).sum()) + 1 if len(self) else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotBlock:
    """The routing of consecutive tokens.

    Attributes:
        tokens: which of the counted tokens, as a slice.
        experts: router -> uint16[N, K] in rank order; E where a token has no further slot, or did
            not pass this router.
        weights: router -> float32[N, K], 0 where there is no slot; empty unless asked for.
    """

    tokens: slice
    experts: Mapping[Router, NDArray[np.uint16]]
    weights: Mapping[Router, NDArray[np.float32]]


def read_tokens(selection: Selection, columns: Sequence[str] = ()) -> Tokens:
    """The tokens that count, in order.

    Args:
        selection: the prompts and filters.
        columns: columns of `tokens` to fetch with them, or `next_token_id`, `previous_token_id`
            (the neighbor in the prompt, counted or not; -1 at its ends).

    Raises:
        AnalysisInputError: when the run holds no routing, or no token is left.
    """
    selection.require_routing("this analysis")
    ids_P = selection.prompt_ids
    table = selection.store.arrow(
        chosen_tokens_sql(
            selection.filters,
            columns=columns,
            neighbors={name: NEIGHBORS[name] for name in columns if name in NEIGHBORS},
        )
        + " ORDER BY t.prompt_id, t.position",
        [selection.run_id, int(ids_P[0]), int(ids_P[-1])],
    )
    found_T = column_array(table, "prompt_id")
    kept_T = np.isin(found_T, ids_P)
    if not kept_T.any():
        raise AnalysisInputError(
            f"run {selection.run_id!r} has no routed token among: {selection.filters.describe()}"
        )
    return Tokens(
        prompts=np.searchsorted(ids_P, found_T[kept_T]),
        positions=column_array(table, "position")[kept_T].astype(np.int64),
        columns={
            name: table.column(name).to_numpy(zero_copy_only=False)[kept_T] for name in columns
        },
    )


def read_slots(
    selection: Selection,
    tokens: Tokens,
    *,
    unit_P: IntArray | None = None,
    weights: bool = False,
    ranked: str | None = None,
) -> Iterator[SlotBlock]:
    """Go through the routing of these tokens.

    Args:
        selection: the routers.
        tokens: of `read_tokens`.
        unit_P: unit of each prompt; with it no unit is in two blocks.
        weights: whether to fetch routing weights.
        ranked: what needs slots in rank order, for the message; None where order does not matter.

    Raises:
        AnalysisInputError: when weights or ranks are asked for and the run has none.
    """
    index = _TokenIndex(selection, tokens)
    for first, last in _cuts(selection, tokens, unit_P):
        experts: dict[Router, NDArray[np.uint16]] = {}
        found: dict[Router, NDArray[np.float32]] = {}
        for kind in dict.fromkeys(router.kind for router in selection.routers):
            rows = _fetch(selection, tokens, (first, last), kind, weights=weights, ranked=ranked)
            token_R = index.of(rows)
            routers = [router for router in selection.routers if router.kind == kind]
            lists = _Rows(rows, weights=weights)
            by_layer = _by_layer(rows, np.flatnonzero(token_R >= 0), routers)
            for router, own in zip(routers, by_layer, strict=True):
                made = lists.aligned(own, token_R[own] - first, last - first, router)
                experts[router], found[router] = made
        yield SlotBlock(
            tokens=slice(first, last), experts=experts, weights=found if weights else {}
        )


class _TokenIndex:
    """Where each (prompt, position) stands among the counted tokens."""

    def __init__(self, selection: Selection, tokens: Tokens) -> None:
        ids_P = selection.prompt_ids
        # Unknown prompts, and positions past the last counted one, fall on places that hold -1.
        self._row_of_id = np.full(int(ids_P[-1]) + 1, len(ids_P), dtype=np.int32)
        self._row_of_id[ids_P] = np.arange(len(ids_P))
        lengths_P = np.zeros(len(ids_P) + 1, dtype=np.int32)
        np.maximum.at(lengths_P, tokens.prompts, tokens.positions.astype(np.int32) + 1)
        self._lengths_P = lengths_P
        self._starts_P = np.cumsum(lengths_P.astype(np.int64) + 1) - lengths_P - 1
        self._token_of = np.full(int(self._starts_P[-1]) + 1, -1, dtype=np.int32)
        self._token_of[self._starts_P[tokens.prompts] + tokens.positions] = np.arange(len(tokens))

    def of(self, rows: pa.Table) -> NDArray[np.int32]:
        """The counted token of each row; -1 where it is not counted."""
        prompt_R = self._row_of_id[column_array(rows, "prompt_id")]
        place_R = np.minimum(column_array(rows, "position"), self._lengths_P[prompt_R])
        found: NDArray[np.int32] = self._token_of[self._starts_P[prompt_R] + place_R]
        return found


def _cuts(
    selection: Selection, tokens: Tokens, unit_P: IntArray | None
) -> Iterator[tuple[int, int]]:
    """First and last token of each block: whole prompts, and whole units where they matter."""
    starts = np.flatnonzero(np.diff(tokens.prompts, prepend=-1))
    if unit_P is not None:
        unit_S = unit_P[tokens.prompts[starts]]
        last_S = np.full(int(unit_P.max()) + 1, -1, dtype=np.int64)
        last_S[unit_S] = np.arange(len(starts))
        # A block may begin at a prompt when no unit of the prompts before it comes again.
        reach = np.maximum.accumulate(last_S[unit_S])
        starts = starts[np.r_[True, reach[:-1] < np.arange(1, len(starts))]]
    slots_per_token = max(1, sum(router.top_k for router in selection.routers))
    tokens_per_block = max(1, SLOTS_PER_READ // slots_per_token)
    first = 0
    for start, following in zip(starts, np.r_[starts[1:], len(tokens)], strict=True):
        if following - first > tokens_per_block and start > first:
            yield first, int(start)
            first = int(start)
    yield first, len(tokens)


def _fetch(
    selection: Selection,
    tokens: Tokens,
    block: tuple[int, int],
    kind: str,
    *,
    weights: bool,
    ranked: str | None,
) -> pa.Table:
    """The rows of a block's prompts in the routers of one kind."""
    ids = selection.prompt_ids[tokens.prompts[[block[0], block[1] - 1]]]
    layers = ", ".join(str(router.layer) for router in selection.routers if router.kind == kind)
    columns = ["prompt_id", "position", "layer", "experts"]
    columns += ["weights", "bf16_weights"] if weights else []
    columns += ["is_ranked"] if ranked else []
    rows = selection.store.arrow(
        f"SELECT {', '.join(columns)} FROM routing_arrays WHERE run_id = ? "
        f"AND prompt_id BETWEEN ? AND ? AND kind = ? AND layer IN ({layers})",
        [selection.run_id, int(ids[0]), int(ids[1]), kind],
    ).combine_chunks()
    if ranked and not rows["is_ranked"].to_numpy().all():
        raise AnalysisInputError(
            f"run {selection.run_id!r} does not say which expert of a token ranks first, which "
            f"{ranked} needs: its source has neither weights nor an order"
        )
    return rows


def _by_layer(rows: pa.Table, kept: IntArray, routers: Sequence[Router]) -> list[IntArray]:
    """The kept rows of each router; all rows are of one kind."""
    layer_R = column_array(rows, "layer")[kept]
    order = np.argsort(layer_R, kind="stable")
    sorted_R = layer_R[order]
    return [
        kept[order[slice(*np.searchsorted(sorted_R, [router.layer, router.layer + 1]))]]
        for router in routers
    ]


class _Rows:
    """Lists of experts, and of weights where asked for, of which routers take their rows."""

    def __init__(self, rows: pa.Table, *, weights: bool) -> None:
        lists = rows["experts"].combine_chunks()
        self._lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        self._is_even = bool((self._lengths == self._lengths[:1]).all())
        self._firsts = np.cumsum(self._lengths, dtype=np.int64) - self._lengths
        self._experts = lists.flatten().to_numpy(zero_copy_only=False).astype(np.uint16, copy=False)
        self._weights = weights_of(rows) if weights else None
        self._asks_weights = weights

    def aligned(
        self, own: IntArray, token_R: NDArray[np.int32], num_tokens: int, router: Router
    ) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Experts and weights [N, K] of the rows `own`, which are those of tokens `token_R`."""
        if self._asks_weights and self._weights is None:
            raise AnalysisInputError(
                f"layer {router.layer} has no routing weights: the run's source did not record "
                "them; ask for counts instead"
            )
        length_R = self._lengths[own]
        most = int(length_R.max(initial=1))
        experts = np.full((num_tokens, most), router.num_experts, dtype=np.uint16)
        used = np.zeros((num_tokens if self._asks_weights else 0, most), dtype=np.float32)
        for length in range(int(length_R.min(initial=most)), most + 1):
            same = slice(None) if self._is_even else length_R == length
            rows = own[same]
            experts[token_R[same], :length] = self._taken(self._experts, rows, length)
            if self._weights is not None:
                used[token_R[same], :length] = self._taken(self._weights, rows, length)
        return experts, used

    def _taken(self, values: NDArray[Any], rows: IntArray, length: int) -> NDArray[Any]:
        """The slots of rows that have so many, [rows, length]."""
        if self._is_even:
            return np.asarray(values.reshape(-1, length)[rows])
        return np.asarray(values[self._firsts[rows, None] + np.arange(length)])
