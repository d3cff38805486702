"""What groups of prompts used, per router and expert: the reader under every analysis.

Counts come from `usage_arrays` where the phase and segment of a token suffice, and from the routing
of single tokens where its position matters (`last_prompt`, `first_generated`, `span`); both give
the same shape. Arrays travel through Arrow, a bounded number of prompts at a time, and one
sparse product per router sums them over groups.

Letters: P prompts, G groups of prompts, E experts of a router, R rows read, S slots read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import DTypeLike, NDArray
from scipy import sparse

from moescope.probe.analysis.selection import IntArray, Router, Selection
from moescope.probe.analysis.token_fields import TokenField
from moescope.probe.analysis.token_filters import (
    column_array,
    router_condition,
    token_conditions,
)
from moescope.probe.analysis.token_slots import read_slots, read_tokens
from moescope.probe.errors import AnalysisInputError

_MISSING: Final = {"weight_sum": "routing weights", "prob_sum": "router scores"}
Quantity = Literal["num_tokens", "weight_sum", "prob_sum"]
FloatArray = NDArray[np.floating[Any]]

# Array elements fetched at a time (240 MB as 4-byte numbers), and the token groups (prompt,
# template, answer) that a prompt usually has: together they bound the prompts per read.
ELEMENTS_PER_READ = 60_000_000
GROUPS_PER_PROMPT = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterUsage:
    """What groups of prompts used at one router.

    Attributes:
        router: the router.
        tokens: routed tokens counted in each group.
        sums: quantity -> sums over those tokens, [G, E].
    """

    router: Router
    tokens: FloatArray
    sums: Mapping[str, FloatArray]

    @property
    def counts(self) -> FloatArray:
        """Tokens of each group that selected each expert, [G, E]."""
        return self.sums["num_tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedUsage:
    """The usage of all selected routers, and how much was counted.

    Attributes:
        routers: one entry per router, in the order of the selection.
        prompt_tokens: counted tokens of each selected prompt (at the router that saw most of them).
        num_prompts: prompts with at least one counted token, in any group.
        group_prompts: prompts of each group with at least one counted token.
    """

    routers: tuple[RouterUsage, ...]
    prompt_tokens: FloatArray
    num_prompts: int
    group_prompts: IntArray

    @property
    def num_tokens(self) -> int:
        """Counted tokens, at the router that saw most of them."""
        return int(max((usage.tokens.sum() for usage in self.routers), default=0))


def has_quantity(selection: Selection, name: Quantity) -> bool:
    """Whether the run recorded this quantity; imported ones need not have weights or scores."""
    found = selection.store.arrow(
        f"SELECT count(*) = count({name}) AS known FROM usage_arrays WHERE run_id = ?",
        [selection.run_id],
    )
    return bool(found["known"][0].as_py())


def read_counts(
    selection: Selection,
    group_P: IntArray,
    *,
    quantities: Sequence[Quantity] = ("num_tokens",),
    dtype: DTypeLike = np.float64,
    field: TokenField | None = None,
) -> GroupedUsage:
    """Sum usage over groups of prompts, or of their tokens.

    Args:
        selection: the prompts, tokens and routers that count.
        group_P: the group of each selected prompt, from 0; -1 leaves the prompt out.
        quantities: what to sum over the counted tokens: selections (`num_tokens`), routing
            weights (`weight_sum`), router scores over all E (`prob_sum`).
        dtype: of the sums; float32 is exact for counts below 2**24.
        field: a field of tokens that splits every group: with V values, group g becomes the groups
            g * V to g * V + V - 1.

    Raises:
        AnalysisInputError: when the run lacks what is asked, or no token is left.
    """
    width = 1 if field is None else len(field.labels)
    num_groups = (int(group_P.max(initial=-1)) + 1) * width
    totals = {
        router: _Totals(router, num_groups, quantities, dtype) for router in selection.routers
    }
    ids_P = selection.prompt_ids
    tokens_PV = np.zeros((len(ids_P), width))
    for router, rows in _rows(selection, group_P, quantities, field):
        index_R = np.searchsorted(ids_P, rows.prompt_ids)
        kept_R = group_P[index_R] >= 0
        group_R = np.where(kept_R, group_P[index_R] * width + rows.values, -1)
        totals[router].add(group_R, rows)
        cell_R = index_R * width + rows.values
        seen = np.bincount(cell_R, rows.tokens * kept_R, minlength=tokens_PV.size)
        np.maximum(tokens_PV, seen.reshape(tokens_PV.shape), out=tokens_PV)
    if not tokens_PV.any():
        raise AnalysisInputError(
            f"run {selection.run_id!r} has no routed token among: {selection.filters.describe()}"
        )
    prompts, values = np.nonzero(tokens_PV)
    return GroupedUsage(
        routers=tuple(total.usage() for total in totals.values()),
        prompt_tokens=tokens_PV.sum(axis=1),
        num_prompts=len(np.unique(prompts)),
        group_prompts=np.bincount(group_P[prompts] * width + values, minlength=num_groups),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """Rows of one router: prompt, value of the field, tokens, and arrays [R, E] by quantity."""

    prompt_ids: IntArray
    values: IntArray
    tokens: FloatArray
    arrays: Mapping[str, FloatArray | sparse.csr_array]


class _Totals:
    """Running sums over groups for one router."""

    def __init__(
        self, router: Router, num_groups: int, quantities: Sequence[str], dtype: DTypeLike
    ) -> None:
        self.router = router
        self.tokens = np.zeros(num_groups)
        self.sums = {
            name: np.zeros((num_groups, router.num_experts), dtype=dtype) for name in quantities
        }

    def add(self, group_R: IntArray, rows: _Rows) -> None:
        """Add rows to their groups; rows of group -1 are skipped."""
        kept = np.flatnonzero(group_R >= 0)
        shape = (len(self.tokens), len(group_R))
        indicator = sparse.csr_array((np.ones(len(kept)), (group_R[kept], kept)), shape=shape)
        self.tokens += indicator @ rows.tokens
        for name, array in rows.arrays.items():
            product = indicator @ array
            self.sums[name] += product.toarray() if sparse.issparse(product) else product

    def usage(self) -> RouterUsage:
        """The sums so far."""
        return RouterUsage(router=self.router, tokens=self.tokens, sums=self.sums)


def _batches(selection: Selection, group_P: IntArray) -> Iterator[tuple[int, int]]:
    """First and last prompt id of each read, so that no read is larger than the bound."""
    ids = selection.prompt_ids[group_P >= 0]
    elements = GROUPS_PER_PROMPT * sum(router.num_experts for router in selection.routers)
    step = max(1, ELEMENTS_PER_READ // elements)
    for start in range(0, len(ids), step):
        yield int(ids[start]), int(ids[min(start + step, len(ids)) - 1])


def _rows(
    selection: Selection,
    group_P: IntArray,
    quantities: Sequence[Quantity],
    field: TokenField | None,
) -> Iterator[tuple[Router, _Rows]]:
    if selection.filters.needs_positions or (field is not None and field.needs_positions):
        yield from _token_rows(selection, group_P, quantities, field)
        return
    for batch in _batches(selection, group_P):
        yield from _usage_rows(selection, batch, quantities, field)


def _usage_rows(
    selection: Selection,
    batch: tuple[int, int],
    quantities: Sequence[Quantity],
    field: TokenField | None,
) -> Iterator[tuple[Router, _Rows]]:
    conditions = [
        "run_id = ?",
        "prompt_id BETWEEN ? AND ?",
        router_condition(selection.routers),
        *token_conditions(selection.filters),
    ]
    columns = ["prompt_id", "layer", "kind", "routed_tokens", *quantities]
    columns += [] if field is None else [field.name]
    table = selection.store.arrow(
        f"SELECT {', '.join(columns)} FROM usage_arrays WHERE {' AND '.join(conditions)}",
        [selection.run_id, *batch],
    ).combine_chunks()
    for name in quantities:
        if table[name].null_count:
            raise AnalysisInputError(
                f"run {selection.run_id!r} has no {_MISSING.get(name, name)}: its source did not "
                "record them; ask for counts instead"
            )
    kept_R = np.isin(column_array(table, "prompt_id"), selection.prompt_ids)
    for router in selection.routers:
        rows = np.flatnonzero(kept_R & _is_router(table, router))
        if not len(rows):
            continue
        part = table.take(pa.array(rows))
        yield (
            router,
            _Rows(
                prompt_ids=column_array(part, "prompt_id"),
                values=_no_value(part.num_rows) if field is None else field.of_usage(part),
                tokens=column_array(part, "routed_tokens").astype(np.float64),
                arrays={name: _matrix(part, name, router, selection) for name in quantities},
            ),
        )


def _token_rows(
    selection: Selection,
    group_P: IntArray,
    quantities: Sequence[Quantity],
    field: TokenField | None,
) -> Iterator[tuple[Router, _Rows]]:
    """Rows of prompts summed from single tokens, for what usage does not know."""
    if "prob_sum" in quantities:
        what = "position" if field is not None else f"tokens {selection.filters.scope!r}"
        raise AnalysisInputError(
            f"router scores are summed over whole phases, so {what} cannot be picked out of them; "
            "use tokens all, prompt or generated, and no positions"
        )
    own = [field.name] if field is not None and not field.needs_positions else []
    tokens = read_tokens(selection, own)
    value_T = _no_value(len(tokens)) if field is None else field.of_tokens(tokens)
    width = 1 if field is None else len(field.labels)
    asks_weights = "weight_sum" in quantities
    for block in read_slots(selection, tokens, weights=asks_weights):
        cell_T = tokens.prompts[block.tokens] * width + value_T[block.tokens]
        cells, row_T = np.unique(cell_T, return_inverse=True)
        prompts = cells // width
        for router, experts_TK in block.experts.items():
            weights_TK = block.weights[router] if asks_weights else None
            counted = count_slots(router, experts_TK, weights_TK, row_T, len(cells))
            kept = (counted.tokens > 0) & (group_P[prompts] >= 0)
            yield (
                router,
                _Rows(
                    prompt_ids=selection.prompt_ids[prompts[kept]],
                    values=(cells % width)[kept],
                    tokens=counted.tokens[kept],
                    arrays={name: counted.sums[name][kept] for name in quantities},
                ),
            )


def _no_value(number: int) -> IntArray:
    return np.zeros(number, dtype=np.int64)


def count_slots(
    router: Router,
    experts_TK: NDArray[np.uint16],
    weights_TK: NDArray[np.float32] | None,
    group_T: IntArray,
    num_groups: int,
) -> RouterUsage:
    """What groups of tokens used at one router, from the slots of each token.

    Args:
        router: the router.
        experts_TK: of `token_slots.SlotBlock`; E where there is no slot.
        weights_TK: the weights of these slots, or None to count alone.
        group_T: the group of each token, from 0; -1 leaves the token out.
        num_groups: how many groups there are.
    """
    width = router.num_experts + 1
    kept = np.flatnonzero(group_T >= 0)
    experts_TK, group_T = experts_TK[kept], group_T[kept]
    cells = (group_T[:, None] * width + experts_TK).ravel()
    size = num_groups * width

    def summed(values: NDArray[Any] | None) -> FloatArray:
        whole = np.bincount(cells, values, minlength=size).astype(np.float64)
        return whole.reshape(num_groups, width)[:, :-1]

    passed = (experts_TK < router.num_experts).any(axis=1)
    sums = {"num_tokens": summed(None)}
    if weights_TK is not None:
        sums["weight_sum"] = summed(weights_TK[kept].ravel())
    return RouterUsage(
        router=router,
        tokens=np.bincount(group_T, passed, minlength=num_groups).astype(np.float64),
        sums=sums,
    )


def _is_router(table: pa.Table, router: Router) -> NDArray[np.bool_]:
    """Which rows belong to a router."""
    here = pc.and_(
        pc.equal(table.column("layer"), router.layer), pc.equal(table.column("kind"), router.kind)
    )
    return np.asarray(here.to_numpy(), dtype=bool)


def _matrix(table: pa.Table, name: str, router: Router, selection: Selection) -> FloatArray:
    """A list column as [R, E]."""
    values = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if len(values) != table.num_rows * router.num_experts:
        raise AnalysisInputError(
            f"run {selection.run_id!r} does not hold {name} for all {router.num_experts} experts "
            f"of layer {router.layer}, so this cannot be computed from it"
        )
    return np.asarray(values).reshape(table.num_rows, router.num_experts)
