"""How often the tokens of each label use each expert: under vocabulary and information.

A label is a whole number of a token: its id, the id before it, the language of its prompt. Tokens
are sorted by label once; tables labels x experts are then counted a few labels at a time, small
enough for the cache, so that 100,000 labels cost no more memory than ten. The experts of all
tokens are held at 2 bytes a slot; where they are too many, routers are read in several passes.

Letters: T counted tokens, N tokens with a label, in order of labels, V labels, P prompts,
K slots per token, E routed experts, C cells of a table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from moescope.probe.analysis.selection import IntArray, Router, Selection
from moescope.probe.analysis.token_slots import Tokens, read_slots

BoolArray = NDArray[np.bool_]
Result = TypeVar("Result")

# Slots whose experts are held at a time, 2 bytes each.
SLOTS_HELD = 500_000_000
# Cells of a table, and tokens counted at a time: both stay in cache.
CELLS_PER_TABLE = 1 << 18
TOKENS_PER_COUNT = 1 << 15
# Routers worked on at a time: parts of the work hold the interpreter, so more gain little.
MOST_THREADS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterSlots:
    """The experts of all counted tokens at one router.

    Attributes:
        router: the router.
        experts: uint16[T, K] in rank order; E where a token has no further slot.
        passed: which tokens passed this router, bool[T]; None where all did.
        is_even: whether every token has all K slots.
    """

    router: Router
    experts: NDArray[np.uint16]
    passed: BoolArray | None
    is_even: bool

    def of(self, chosen: IntArray) -> NDArray[np.uint16]:
        """The experts of some tokens, [chosen, K]."""
        # A whole row as one element: numpy copies it at once instead of slot by slot.
        rows = self.experts.view(np.dtype((np.void, 2 * self.experts.shape[1]))).ravel()
        return rows.take(chosen).view(np.uint16).reshape(len(chosen), self.experts.shape[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrangement:
    """Tokens in order of their labels.

    Attributes:
        order: the tokens that have a label, by label, [N].
        labels: of these tokens, ascending, [N].
        starts: where the tokens of each label begin in `order`, and the end, [V + 1].
    """

    order: IntArray
    labels: IntArray
    starts: IntArray

    @property
    def num_labels(self) -> int:
        """V, labels without a token included."""
        return len(self.starts) - 1

    @property
    def sizes(self) -> IntArray:
        """Tokens of each label, [V]."""
        return np.diff(self.starts)


class PerPassing(Generic[Result]):
    """Makes something of the tokens that passed a router once for all routers they passed.

    Args:
        make: from which tokens passed, bool[T] or None for all, to what is made of them.
    """

    def __init__(self, make: Callable[[BoolArray | None], Result]) -> None:
        self._make = make
        self._last: tuple[bytes, Result] | None = None
        # Routers are worked on by several threads, and most see the same tokens.
        self._lock = Lock()

    def __call__(self, passed_T: BoolArray | None) -> Result:
        """What was made of these tokens."""
        key = b"" if passed_T is None else np.packbits(passed_T).tobytes()
        with self._lock:
            if self._last is None or self._last[0] != key:
                self._last = (key, self._make(passed_T))
            return self._last[1]


def arrange(label_T: IntArray, num_labels: int | None = None) -> Arrangement:
    """Sort tokens by label; a token of label -1 is left out.

    Args:
        label_T: label of each token, from 0, or -1.
        num_labels: V; by default the largest label and one.
    """
    order = np.argsort(label_T)
    labels = label_T[order]
    first = int(np.searchsorted(labels, 0))
    order, labels = order[first:], labels[first:]
    most = int(labels[-1]) + 1 if len(labels) else 0
    starts = np.searchsorted(labels, np.arange((most if num_labels is None else num_labels) + 1))
    return Arrangement(order=order, labels=labels, starts=starts)


def compact(label_T: NDArray[np.integer]) -> tuple[IntArray, IntArray]:
    """Number the labels that occur from 0, ascending; -1 stays -1.

    Returns:
        the new label of each token [T], and the old label of each new one [V].
    """
    known_T = label_T >= 0
    values, codes = np.unique(label_T[known_T], return_inverse=True)
    label = np.full(len(label_T), -1, dtype=np.int64)
    label[known_T] = codes
    return label, values.astype(np.int64)


def keep_tokens(tokens: Tokens, kept_T: BoolArray) -> Tokens:
    """Some of the tokens."""
    return Tokens(
        prompts=tokens.prompts[kept_T],
        positions=tokens.positions[kept_T],
        columns={name: column[kept_T] for name, column in tokens.columns.items()},
    )


def over_routers(
    selection: Selection,
    tokens: Tokens,
    work: Callable[[RouterSlots], Result],
    *,
    top1: bool = False,
    ranked: str | None = None,
) -> list[Result]:
    """Do something with the slots of every router, several routers at a time.

    Args:
        selection: the routers.
        tokens: of `read_tokens`.
        work: called with the slots of one router; must not change anything.
        top1: whether only the first-ranked slot of each token is held.
        ranked: what needs slots in rank order, for the message; None where order does not matter.

    Returns:
        what `work` returned, in the order of the routers.

    Raises:
        AnalysisInputError: when ranks are asked for and the run has none.
    """
    results: list[Result] = []
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    for routers in _portions(selection.routers, len(tokens), top1):
        slots = _read(replace(selection, routers=routers), tokens, top1, ranked)
        with ThreadPoolExecutor(threads) as pool:
            results += pool.map(work, slots)
    return results


def _portions(
    routers: Sequence[Router], num_tokens: int, top1: bool
) -> Iterator[tuple[Router, ...]]:
    """Routers whose slots may be held together."""
    portion: list[Router] = []
    held = 0
    for router in routers:
        size = num_tokens * (1 if top1 else router.top_k)
        if portion and held + size > SLOTS_HELD:
            yield tuple(portion)
            portion, held = [], 0
        portion.append(router)
        held += size
    yield tuple(portion)


def _read(
    selection: Selection, tokens: Tokens, top1: bool, ranked: str | None
) -> list[RouterSlots]:
    """The slots of all routers of a selection."""
    parts: dict[Router, list[NDArray[np.uint16]]] = {router: [] for router in selection.routers}
    for block in read_slots(selection, tokens, ranked=ranked):
        for router, experts_NK in block.experts.items():
            parts[router].append(experts_NK[:, :1].copy() if top1 else experts_NK)
    return [_joined(router, parts.pop(router)) for router in selection.routers]


def _joined(router: Router, parts: Sequence[NDArray[np.uint16]]) -> RouterSlots:
    """The blocks of one router as one; they may have different numbers of slots."""
    most = max(part.shape[1] for part in parts)
    shape = (sum(len(part) for part in parts), most)
    experts = np.full(shape, router.num_experts, dtype=np.uint16)
    start = 0
    for part in parts:
        experts[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    passed = experts[:, 0] < router.num_experts
    return RouterSlots(
        router=router,
        experts=experts,
        passed=None if passed.all() else passed,
        is_even=bool((experts < router.num_experts).all()),
    )


def label_ranges(starts_V: IntArray, num_experts: int) -> Iterator[tuple[int, int]]:
    """First and last label of each table, so that no table has too many cells.

    Args:
        starts_V: where each label begins among the rows of its table, and the end, [V + 1]; a
            label that needs more rows than a table has gets one of its own.
        num_experts: E.
    """
    rows = max(1, CELLS_PER_TABLE // num_experts)
    first, number = 0, len(starts_V) - 1
    while first < number:
        last = int(np.searchsorted(starts_V, starts_V[first] + rows, side="right")) - 1
        last = max(first + 1, last)
        yield first, last
        first = last


def count_table(slots: RouterSlots, tokens: Arrangement, first: int, last: int) -> IntArray:
    """Tokens of each label from `first` to before `last` that use each expert, [labels, E]."""
    num_experts, per_token = slots.router.num_experts, slots.experts.shape[1]
    width = num_experts if slots.is_even else num_experts + 1
    starts = tokens.starts[first : last + 1]
    shape, table = (last - first, width), None
    for begin in range(int(starts[0]), int(starts[-1]), TOKENS_PER_COUNT):
        chosen = tokens.order[begin : min(begin + TOKENS_PER_COUNT, int(starts[-1]))]
        experts = slots.of(chosen).astype(np.int32).ravel()
        # Rows of a sparse array whose entries repeat: made dense, the repeated ones are added up.
        # That is twice as fast as counting cells, and leaves other threads running.
        ends = (np.clip(starts - begin, 0, len(chosen)) * per_token).astype(np.int32)
        ones = np.ones(len(experts), dtype=np.int64)
        part = sparse.csr_array((ones, experts, ends), shape=shape).toarray()
        table = part if table is None else table + part
    if table is None:
        table = np.zeros(shape, dtype=np.int64)
    return table if slots.is_even else np.ascontiguousarray(table[:, :num_experts])
