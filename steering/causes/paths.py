"""The effect of taking an expert out, split by whether later layers may route anew.

Taking an expert out changes the residual stream, and with it what later routers decide. Two
different questions:

    total           m(expert out) - m, later layers route as they will
    direct+values   the same with the later layers' routing frozen, ids and weights, to what it was
                    with the expert in: the expert's own words, and what later attention and later
                    experts make of the changed values
    later routing   total - direct+values: what goes through changed routing

and, where asked for, the last in two: with the ids frozen and their weights free,

    later weights   m(expert out, ids frozen) - m(expert out, ids and weights frozen)
    later ids       m(expert out) - m(expert out, ids frozen)

The frozen routing is that of all tokens in all routed layers after the expert's. Source: ours;
freezing one path to tell it from another is the path patching of Goldowsky-Dill et al. (arXiv
2304.05969) and the frozen-pattern direct effects of Wang et al. (arXiv 2211.00593).

Letters: X experts, P prompts, T rows, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.kernels.route import Edits, select
from moescope.probe.errors import InputError, MoescopeError
from moescope.probe.models import ModelBundle
from moescope.probe.recording import Trace
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import RouterSite
from moescope.steering.apply import steer
from moescope.steering.causes.measuring import TargetBatch, target_batches
from moescope.steering.causes.replaying import RECORDED, batch_values, recorded_batch, replays
from moescope.steering.causes.shares import effect_columns, share_columns
from moescope.steering.causes.targets import TargetRow
from moescope.steering.computed_routing import RouterCall, computed_routing
from moescope.steering.generate import proved_sites
from moescope.steering.plan import SteeringPlan

#: How an expert is taken out; see `moescope.steering.interventions.Mask`.
MaskMode = Literal["drop", "drop_renorm", "replace"]


@dataclass(frozen=True, eq=False)
class PathEffects:
    """Effects of taking experts out, by path.

    Attributes:
        experts: layer, kind and expert of each.
        mode: how it was taken out.
        baseline: float64[P], the target of the model as it is.
        total: float64[X, P], later layers route freely.
        frozen: float64[X, P], later layers keep ids and weights (`direct+values`).
        ids_frozen: float64[X, P], later layers keep the ids; None where it was not asked for.
    """

    experts: tuple[tuple[int, str, int], ...]
    mode: MaskMode
    baseline: NDArray[np.float64]
    total: NDArray[np.float64]
    frozen: NDArray[np.float64]
    ids_frozen: NDArray[np.float64] | None

    @property
    def through_routing(self) -> NDArray[np.float64]:
        """What goes through changed routing of later layers, float64[X, P]."""
        return self.total - self.frozen

    def frame(self, units: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
        """One row per expert and path.

        Columns: `layer`, `kind`, `expert`, `path` (see the module), `effect` with `low` and `high`
        (95 %, over units), `n` prompts, its `share` of the total with an interval (NaN where the
        total is 0).

        Args:
            units: the unit of each prompt.
            seed: of the resampling.
        """
        paths = self._paths()
        parts = []
        for at, (layer, kind, expert) in enumerate(self.experts):
            values_XP = np.array([values[at] for values in paths.values()])
            columns = {
                "layer": layer,
                "kind": kind,
                "expert": expert,
                "path": list(paths),
                **effect_columns(values_XP, units, seed),
                **share_columns(values_XP, self.total[at], units, seed),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def _paths(self) -> Mapping[str, NDArray[np.float64]]:
        found = {
            "total": self.total,
            "direct+values": self.frozen,
            "later routing": self.through_routing,
        }
        if self.ids_frozen is not None:
            found["later weights"] = self.ids_frozen - self.frozen
            found["later ids"] = self.total - self.ids_frozen
        return found


def path_effects(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    experts: Sequence[tuple[int, str, int]],
    *,
    mode: MaskMode = "drop",
    split_ids: bool = False,
    tokens_per_batch: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> PathEffects:
    """Effects of taking single experts out, with later routing free and frozen.

    Two forwards per expert and batch that uses it, three with `split_ids`.

    Args:
        bundle: model and tokenizer.
        rows: from `target_rows`.
        rendered: the prompts.
        experts: layer, kind and expert; one is out at a time.
        mode: how it is taken out.
        split_ids: also with the later layers' ids frozen and their weights free.
        tokens_per_batch: padded tokens a forward may hold.
        progress: called with (experts and batches done, in all).

    Raises:
        InputError: an expert is not there; `split_ids` in a model with routed attention.
        PlanError: a layer cannot be steered; names it and why.
    """
    if not experts:
        raise InputError("path effects need at least one expert")
    sites = proved_sites(bundle, rendered)
    places = [_place(sites, expert) for expert in experts]
    if split_ids and any(site.info.kind != "mlp" for site in sites):
        raise InputError("ids can be frozen alone only where all routers are of kind mlp")
    ids = [one.prompt.prompt_id for one in rendered]
    baseline = np.zeros(len(rendered))
    effects = np.zeros((3, len(experts), len(rendered)))
    batches = target_batches(bundle, rows, tokens_per_batch=tokens_per_batch)
    for number, batch in enumerate(batches):
        prompts = [row.prompt for row in batch.rows]
        values, trace = recorded_batch(bundle, batch, ids, sites)
        np.add.at(baseline, prompts, values)
        for at, (place, (_, _, expert)) in enumerate(zip(places, experts, strict=True)):
            site = sites[place]
            if mode == "replace" or _is_used(trace, site, expert):
                one = _Removal(bundle, batch, ids, sites, place, expert, mode, trace)
                free = one.total()
                changes = (free, one.frozen(free), one.ids_frozen(free) if split_ids else free)
                for path, changed in enumerate(changes):
                    np.add.at(effects[path, at], prompts, changed - values)
            if progress is not None:
                progress(number * len(experts) + at + 1, len(batches) * len(experts))
    total, frozen, ids_frozen = effects
    return PathEffects(
        tuple(experts), mode, baseline, total, frozen, ids_frozen if split_ids else None
    )


@dataclass(frozen=True)
class _Removal:
    """One expert out in one batch.

    Attributes:
        place: index of its router among the sites.
        trace: the routing with the expert in.
    """

    bundle: ModelBundle
    batch: TargetBatch
    prompt_ids: Sequence[int]
    sites: Sequence[RouterSite]
    place: int
    expert: int
    mode: MaskMode
    trace: Trace

    @property
    def later(self) -> Sequence[RouterSite]:
        """The routers after the expert's."""
        return self.sites[self.place + 1 :]

    def total(self) -> NDArray[np.float64]:
        """Values with later routing free, float64[B]."""
        with steer(self.bundle.model, self._plan([]), sites=self.sites):
            return self._values()

    def frozen(self, free: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values with later ids and weights frozen; `free` where there is nothing later."""
        if not self.later:
            return free
        plan = self._plan(replays([site.info for site in self.later]))
        with steer(self.bundle.model, plan, sites=self.sites, runs={RECORDED: self.trace}):
            return self._values()

    def ids_frozen(self, free: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values with later ids frozen, their weights by the rule; `free` as above."""
        if not self.later:
            return free
        recorded = {
            site.info.module: self.trace[site.info.layer, site.info.kind].expert_ids
            for site in self.later
        }

        def same_ids(call: RouterCall) -> tuple[Tensor, Tensor]:
            return _weights_of(call, recorded[call.site.info.module])

        with ExitStack() as stack:
            stack.enter_context(steer(self.bundle.model, self._plan([]), sites=self.sites))
            layers = [site.info.layer for site in self.later]
            stack.enter_context(
                computed_routing(
                    self.bundle.model, same_ids, layers=layers, name="same ids", sites=self.sites
                )
            )
            return self._values()

    def _plan(self, more: Sequence[dict[str, Any]]) -> SteeringPlan:
        info = self.sites[self.place].info
        mask: dict[str, Any] = {
            "action": "mask",
            "layer": info.layer,
            "kind": info.kind,
            "experts": [self.expert],
            "mode": self.mode,
        }
        return SteeringPlan(name="expert out", interventions=[mask, *more])

    def _values(self) -> NDArray[np.float64]:
        return batch_values(self.bundle, self.batch, self.prompt_ids)


def _weights_of(call: RouterCall, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The weights that a router's rule gives chosen experts, and their ids, in its own order."""
    logits_TE = call.decided.logits
    ids_TK = ids_TK.to(logits_TE.device)
    is_other = torch.ones(logits_TE.shape, dtype=torch.bool, device=logits_TE.device)
    is_other.scatter_(1, ids_TK, False)
    weights, ids = select(
        logits_TE, call.site.info.rule, Edits(mask_selection=is_other), **call.inputs
    )
    if not torch.equal(ids.sort(dim=1).values, ids_TK.sort(dim=1).values):
        raise MoescopeError(
            f"{call.site.where}: the rule cannot be held to chosen experts, so ids cannot be "
            "frozen without their weights"
        )
    return weights, ids


def _place(sites: Sequence[RouterSite], wanted: tuple[int, str, int]) -> int:
    layer, kind, expert = wanted
    for at, site in enumerate(sites):
        if (site.info.layer, site.info.kind) == (layer, kind):
            if not 0 <= expert < site.info.num_experts:
                raise InputError(
                    f"layer {layer} has experts 0 to {site.info.num_experts - 1}, and no expert "
                    f"{expert}"
                )
            return at
    raise InputError(f"layer {layer} has no router of kind {kind!r}")


def _is_used(trace: Trace, site: RouterSite, expert: int) -> bool:
    found = trace[site.info.layer, site.info.kind]
    return bool(((found.expert_ids == expert) & (found.weights != 0)).any())
