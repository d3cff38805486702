"""Where a replay takes its routing from: a trace in memory, or a run in a store.

    with record(model) as trace:
        model(**inputs)
    with steer(model, plan, runs={"base": trace}):
        model(**inputs)

A trace is replayed call by call, so the same inputs must come in the same order. A run of a store
is looked up by prompt and position, in batches of any composition; whoever runs the model says
which prompts they are (`moescope.probe.batching.running_prompts`).

Letters: T rows of the router, K experts per token, N rows of a stored layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.recording import Trace
from moescope.probe.routers import RouterSite
from moescope.probe.storage import Store
from moescope.steering.positions import TokenPositions

#: Positions of one prompt are numbers below this.
_STRIDE = 1 << 32


class Replayed(NamedTuple):
    """Recorded routing for the rows of one router call.

    Attributes:
        ids: int64[T, K]; rows end in -1 where fewer experts were used.
        weights: float[T, K], 0 there.
        found: bool[T], the rows that were recorded; None for all, without -1.
    """

    ids: Tensor
    weights: Tensor
    found: Tensor | None


class RoutingSource(Protocol):
    """Recorded routing that can be replayed."""

    def begin(self, site: RouterSite) -> LayerSource:
        """The routing of one router, from its beginning.

        Raises:
            PlanError: the layer was not recorded, or with another number of experts.
        """
        ...


class LayerSource(Protocol):
    """The recorded routing of one router, while a block of steering runs."""

    def routing(self, num_rows: int, positions: TokenPositions | None) -> Replayed:
        """The routing of the next call of this router."""
        ...


def source_of(run: Trace | RoutingSource) -> RoutingSource:
    """A source from what `steer` was handed."""
    return TraceSource(run) if isinstance(run, Trace) else run


@dataclass(frozen=True)
class TraceSource:
    """The routing in a `Trace` of `record`."""

    trace: Trace

    def begin(self, site: RouterSite) -> LayerSource:
        """See `RoutingSource`."""
        if self.trace.level == "usage":
            raise PlanError(
                "a trace of level usage holds counts only and cannot be replayed; record at level "
                "topk"
            )
        module = site.info.module
        parts = [one.rows[module] for one in self.trace.forwards if module in one.rows]
        if not parts:
            raise PlanError(f"{site.where} has no routing in the trace that is to be replayed")
        calls = [(one.expert_ids, one.weights) for one in parts]
        _require_experts(site, max(int(ids.max()) for ids, _ in calls if ids.numel()))
        return _TraceLayer(site, calls)


class _TraceLayer:
    """One layer of a trace, call by call."""

    def __init__(self, site: RouterSite, calls: list[tuple[Tensor, Tensor]]) -> None:
        self.site = site
        self.calls = calls
        self.number = 0

    def routing(self, num_rows: int, positions: TokenPositions | None) -> Replayed:
        del positions
        if self.number >= len(self.calls):
            raise MoescopeError(
                f"{self.site.where}: the replayed trace has {len(self.calls)} forwards, and this "
                "is one more"
            )
        ids, weights = self.calls[self.number]
        self.number += 1
        if len(ids) != num_rows:
            raise MoescopeError(
                f"{self.site.where}: forward {self.number} of the replayed trace routed {len(ids)} "
                f"tokens, and this one routes {num_rows}; replay the same inputs in the same order"
            )
        return Replayed(ids.long(), weights, None)


@dataclass(frozen=True)
class StoredRun:
    """The routing of a run in a store, looked up by prompt and position.

    Attributes:
        store: the store.
        run_id: a run of level topk or above.
    """

    store: Store
    run_id: str

    def begin(self, site: RouterSite) -> LayerSource:
        """See `RoutingSource`."""
        if not self.store.has_routing(self.run_id):
            raise PlanError(
                f"run {self.run_id!r} kept no single tokens and cannot be replayed; record it at "
                "level topk"
            )
        table = self.store.arrow(
            "SELECT prompt_id, position, expert, weight FROM routing "
            "WHERE run_id = ? AND layer = ? AND kind = ? "
            "ORDER BY prompt_id, position, rank NULLS LAST, weight DESC, expert",
            [self.run_id, site.info.layer, site.info.kind],
        )
        if not table.num_rows:
            raise PlanError(f"{site.where} has no routing in run {self.run_id!r}")
        columns = {name: table[name].to_numpy() for name in table.column_names}
        _require_experts(site, int(columns["expert"].max()))
        return _StoredLayer(site, columns)


class _StoredLayer:
    """One layer of a run: keys of its tokens in order, and their slots."""

    def __init__(self, site: RouterSite, columns: Mapping[str, NDArray[Any]]) -> None:
        self.site = site
        slot_keys = columns["prompt_id"].astype(np.int64) * _STRIDE + columns["position"]
        self.keys_N, first = np.unique(slot_keys, return_index=True)
        row_of_slot = np.searchsorted(self.keys_N, slot_keys)
        column = np.arange(len(slot_keys)) - first[row_of_slot]
        shape = len(self.keys_N), int(column.max()) + 1
        self.ids_NK = np.full(shape, -1, dtype=np.int64)
        self.weights_NK = np.zeros(shape, dtype=np.float32)
        self.ids_NK[row_of_slot, column] = columns["expert"]
        self.weights_NK[row_of_slot, column] = columns["weight"]

    def routing(self, num_rows: int, positions: TokenPositions | None) -> Replayed:
        if positions is None or positions.num_rows != num_rows:
            raise MoescopeError(
                f"{self.site.where}: which tokens pass the router is not known, so a stored run "
                "cannot be replayed; call the steered model itself"
            )
        prompt_T, position_T = positions.prompts_and_positions()
        keys_T = (prompt_T * _STRIDE + position_T).numpy()
        rows_T = np.searchsorted(self.keys_N, keys_T).clip(max=len(self.keys_N) - 1)
        found_T = (self.keys_N[rows_T] == keys_T) & (position_T.numpy() >= 0)
        return Replayed(
            torch.from_numpy(self.ids_NK[rows_T]),
            torch.from_numpy(self.weights_NK[rows_T]),
            torch.from_numpy(found_T),
        )


def _require_experts(site: RouterSite, highest: int) -> None:
    if highest >= site.info.num_experts:
        raise PlanError(
            f"{site.where} has {site.info.num_experts} experts, and the routing to be replayed "
            f"names expert {highest}: it is a run of another model"
        )
