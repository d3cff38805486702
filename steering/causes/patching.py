"""Routing patching: one side run with the routing of the other.

Two sides A and B are two models on the same token rows, or one model on two versions of its
prompts with equally many tokens. Each side's routing (ids and weights, as its own forward decided
them) is replayed in the other, in one layer or in all. What the target becomes says how much of a
behaviour lies in who is selected and how much in the weights and everything else.

With D = m(A) - m(B), m(B | A) the target of B under A's routing:

    routing in B   m(B | A) - m(B)     what A's routing brings to B
    routing in A   m(A | B) - m(A)     what B's routing takes from A (as much, of the other sign,
                                       where routing and the rest do not interact)
    routing        the mean of the first and minus the second (Shapley value of two players)
    the rest       D - routing

Source: ours, after activation patching (Vig et al., arXiv 2004.12265), of routing decisions
instead of activations.

Letters: X layers or sets of layers, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.recording import Trace
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import LayerInfo, RouterSite
from moescope.steering.apply import steer
from moescope.steering.causes.measuring import TargetBatch, target_batches
from moescope.steering.causes.replaying import (
    RECORDED,
    batch_values,
    recorded_batch,
    replay_plan,
)
from moescope.steering.causes.shares import effect_columns, share_columns
from moescope.steering.causes.targets import TargetRow
from moescope.steering.generate import proved_sites


@dataclass(frozen=True)
class PatchSide:
    """One side.

    Attributes:
        bundle: its model.
        rows: from `target_rows`; for two models of one tokenizer the same on both sides.
        rendered: its prompts.
    """

    bundle: ModelBundle
    rows: Sequence[TargetRow]
    rendered: Sequence[RenderedPrompt]


@dataclass(frozen=True, eq=False)
class RoutingPatch:
    """Targets with their own routing and with that of the other side.

    Attributes:
        layers: layer and kind of each patch; None for all layers, which comes last.
        a, b: float64[P], the targets as they are.
        b_with_a: float64[X, P], B's under A's routing.
        a_with_b: float64[X, P], A's under B's routing.
    """

    layers: tuple[tuple[int, str] | None, ...]
    a: NDArray[np.float64]
    b: NDArray[np.float64]
    b_with_a: NDArray[np.float64]
    a_with_b: NDArray[np.float64]

    def frame(self, units: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
        """Two rows per patch.

        Columns: `layer` (missing for all), `kind`, `weights` and `routing` (whose), `effect` (the
        change of the target of the side with these weights) with `low` and `high` (95 %, over
        units), `n` prompts, `share` of the way to the other side with its interval.

        Args:
            units: the unit of each prompt.
            seed: of the resampling.
        """
        parts = []
        for weights, routing, own, other, found in (
            ("b", "a", self.b, self.a, self.b_with_a),
            ("a", "b", self.a, self.b, self.a_with_b),
        ):
            columns = {
                "layer": pd.array([one and one[0] for one in self.layers], dtype="Int64"),
                "kind": [one[1] if one else "all" for one in self.layers],
                "weights": weights,
                "routing": routing,
                **effect_columns(found - own, units, seed),
                **share_columns(found - own, other - own, units, seed),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def summary(self, units: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
        """The difference between the sides split, all layers patched; see the module.

        Columns: `quantity` (`difference`, `routing in b`, `routing in a`, `routing`, `rest`),
        `effect`, `low`, `high`, `n`, and its `share` of the difference with an interval.
        """
        if None not in self.layers:
            raise InputError("the split needs all layers patched at once, and only some were")
        at = self.layers.index(None)
        whole = self.a - self.b
        into_b, into_a = self.b_with_a[at] - self.b, self.a_with_b[at] - self.a
        routing = (into_b - into_a) / 2
        values_XP = np.array([whole, into_b, into_a, routing, whole - routing])
        return pd.DataFrame(
            {
                "quantity": ["difference", "routing in b", "routing in a", "routing", "rest"],
                **effect_columns(values_XP, units, seed),
                **share_columns(values_XP, whole, units, seed),
            }
        )


def patch_routing(
    a: PatchSide,
    b: PatchSide,
    *,
    layers: Sequence[int] | None = None,
    tokens_per_batch: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingPatch:
    """Run each side with the routing of the other, layer by layer and in all layers at once.

    Args:
        a: one side.
        b: the other; its rows belong to the same prompts in the same order and have equally many
            tokens.
        layers: decoder layers to patch one by one, and together as `all`; all routed ones without.
        tokens_per_batch: padded tokens a forward may hold.
        progress: called with (batches done, batches in all).

    Raises:
        InputError: rows of unequal length, models of other routers, or a layer without a router.
        PlanError: a layer cannot be steered; names it and why.
    """
    _require_same_rows(a, b)
    sites_a, sites_b = proved_sites(a.bundle, a.rendered), proved_sites(b.bundle, b.rendered)
    infos = _patched(sites_a, sites_b, layers)
    sets = [[info] for info in infos] + [infos]
    num_prompts = len(a.rendered)
    own = np.zeros((2, num_prompts))
    crossed = np.zeros((2, len(sets), num_prompts))
    batches_a = target_batches(a.bundle, a.rows, tokens_per_batch=tokens_per_batch)
    batches_b = target_batches(b.bundle, b.rows, tokens_per_batch=tokens_per_batch)
    for done, (batch_a, batch_b) in enumerate(zip(batches_a, batches_b, strict=True)):
        prompts = [row.prompt for row in batch_a.rows]
        found = [
            recorded_batch(side.bundle, batch, _ids(side), sites)
            for side, batch, sites in ((a, batch_a, sites_a), (b, batch_b, sites_b))
        ]
        for at, (values, _) in enumerate(found):
            np.add.at(own[at], prompts, values)
        for number, chosen in enumerate(sets):
            into_a = _with_routing(a, batch_a, sites_a, chosen, found[1][1])
            into_b = _with_routing(b, batch_b, sites_b, chosen, found[0][1])
            np.add.at(crossed[0, number], prompts, into_a)
            np.add.at(crossed[1, number], prompts, into_b)
        if progress is not None:
            progress(done + 1, len(batches_a))
    keys = tuple((info.layer, info.kind) for info in infos)
    return RoutingPatch((*keys, None), own[0], own[1], crossed[1], crossed[0])


def _with_routing(
    side: PatchSide,
    batch: TargetBatch,
    sites: Sequence[RouterSite],
    infos: Sequence[LayerInfo],
    trace: Trace,
) -> NDArray[np.float64]:
    """One side's values with recorded routing in some layers, float64[B]."""
    with steer(side.bundle.model, replay_plan(infos), sites=sites, runs={RECORDED: trace}):
        return batch_values(side.bundle, batch, _ids(side))


def _ids(side: PatchSide) -> list[int]:
    return [one.prompt.prompt_id for one in side.rendered]


def _require_same_rows(a: PatchSide, b: PatchSide) -> None:
    if len(a.rendered) != len(b.rendered):
        raise InputError(
            f"one side has {len(a.rendered)} prompts and the other {len(b.rendered)}; routing is "
            "replayed prompt by prompt"
        )
    if [row.prompt for row in a.rows] != [row.prompt for row in b.rows]:
        raise InputError("the rows of the two sides belong to different prompts")
    for own, other in zip(a.rows, b.rows, strict=True):
        if len(own.token_ids) != len(other.token_ids):
            raise InputError(
                f"prompt {a.rendered[own.prompt].prompt.prompt_id} has a row of "
                f"{len(own.token_ids)} tokens on one side and {len(other.token_ids)} on the other; "
                "routing can be replayed only token by token"
            )


def _patched(
    sites_a: Sequence[RouterSite], sites_b: Sequence[RouterSite], layers: Sequence[int] | None
) -> list[LayerInfo]:
    """The layers to patch, after a check that both models route alike."""

    def shape(sites: Sequence[RouterSite]) -> list[tuple[str, int]]:
        return [(site.info.module, site.info.num_experts) for site in sites]

    if shape(sites_a) != shape(sites_b):
        raise InputError(
            "the two models have other routers or other numbers of experts, so one cannot be run "
            "with the routing of the other"
        )
    infos = [site.info for site in sites_a]
    missing = sorted(set(layers or ()) - {info.layer for info in infos})
    if missing:
        raise InputError(
            f"layer {missing[0]} has no router; the routed layers are "
            f"{', '.join(str(info.layer) for info in infos)}"
        )
    return [info for info in infos if layers is None or info.layer in layers]
