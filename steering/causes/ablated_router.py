"""One router with another expert taken out at every row, on top of what a plan does there anyway.

The selection is made by `moescope.kernels.route.select` with the edits that a `mask` in a plan
makes, as `moescope.steering.steer` does it, so that the numbers are the same.

Letters: T rows of the router, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moescope.kernels.route import Edits, select
from moescope.probe.errors import PlanError
from moescope.probe.routers import RouterSite
from moescope.probe.routers.spec import RouterOutput
from moescope.steering.operators import edits_of
from moescope.steering.plan import Intervention, Mask, SteeringPlan

#: Where an intervention acts: at all rows, at none, or at those of bool[T].
Place = bool | Tensor


class AblatedRouter:
    """A router, the interventions of a plan on it, and the mask that takes experts out.

    Args:
        site: the router.
        base: the plan's interventions on it, without replays.
        mask: of the mode wanted; which experts it names makes no difference.
    """

    def __init__(self, site: RouterSite, base: Sequence[Intervention], mask: Mask) -> None:
        self.site = site
        self.base = tuple(base)
        self.mask = mask
        self._experts_of: list[Tensor] = []
        for one in self.base:
            experts_E = torch.zeros(site.info.num_experts, dtype=torch.bool)
            experts_E[list(one.experts)] = True
            self._experts_of.append(experts_E if one.experts else torch.ones(1, dtype=torch.bool))

    def edits(self, places: Sequence[Place], masked_TE: Tensor) -> Edits:
        """The edits of a call.

        Args:
            places: where each intervention of the plan acts.
            masked_TE: the experts taken out at each row, bool[T, E].
        """
        requests: list[tuple[Intervention, Tensor]] = []
        for place, experts_E, one in zip(places, self._experts_of, self.base, strict=True):
            if place is False:
                continue
            what = experts_E.to(masked_TE.device)
            requests.append((one, place[:, None] & what if isinstance(place, Tensor) else what))
        info = self.site.info
        limit = info.top_k if info.kind == "attention" or info.rule.capacity is not None else None
        requests.append((self.mask, masked_TE))
        return edits_of(requests, top_k=info.top_k, limit=limit)

    @contextmanager
    def attached(
        self, expert_of_rows: Callable[[], Tensor], places: Callable[[], Sequence[Place]]
    ) -> Iterator[None]:
        """Take one expert out at each row of every call while the block runs.

        Args:
            expert_of_rows: the expert of each row, int64[T], of the call that is running.
            places: where the plan's own interventions act in it.
        """

        def hook(_module: nn.Module, args: Any, output: Any) -> Any:
            found = self.site.form.read(self.site, args, output)
            expert_T = expert_of_rows().to(found.logits.device)
            if len(expert_T) != len(found.logits):
                raise PlanError(
                    f"{self.site.where}: {len(found.logits)} rows passed the router where "
                    f"{len(expert_T)} tokens ran, so experts cannot be taken out row by row"
                )
            masked_TE = torch.zeros(found.logits.shape, dtype=torch.bool, device=expert_T.device)
            masked_TE.scatter_(1, expert_T[:, None], True)
            inputs = self.site.form.inputs(self.site, args, output)
            edits = self.edits(places(), masked_TE)
            weights, ids = select(found.logits, self.site.info.rule, edits, **inputs)
            return self.site.form.write(self.site, args, output, weights, ids)

        handle = self.site.router.register_forward_hook(hook, prepend=True)
        try:
            yield
        finally:
            handle.remove()


def require_own_rule(
    site: RouterSite, found: RouterOutput, inputs: dict[str, Any], real_T: Tensor
) -> None:
    """The rule must repeat the router's own output on real tokens.

    Raises:
        PlanError: it does not, so nothing can be taken out there.
    """
    weights, ids = select(found.logits, site.info.rule, **inputs)
    real_T = real_T.to(ids.device)
    same = torch.equal(ids[real_T], found.expert_ids[real_T])
    if not same or not torch.equal(weights[real_T], found.weights[real_T]):
        raise PlanError(
            f"{site.where}: no expert can be taken out, because its selection rule "
            f"({site.info.rule.description}) does not repeat the router's own output"
        )


def on_router(plan: SteeringPlan | None, site: RouterSite, layers: int) -> list[Intervention]:
    """The interventions of a plan that act on one router.

    Args:
        plan: the plan.
        site: the router.
        layers: how many routers its layer has; an intervention without a kind is on the only one.
    """
    if plan is None:
        return []
    kinds = (None, site.info.kind) if layers == 1 else (site.info.kind,)
    return [
        one for one in plan.interventions if site.info.layer in one.on_layers and one.kind in kinds
    ]


def without_router(plan: SteeringPlan | None, site: RouterSite, layers: int) -> SteeringPlan | None:
    """The plan without what it does on one router; None where nothing is left."""
    if plan is None:
        return None
    here = on_router(plan, site, layers)
    left: list[Intervention] = []
    for one in plan.interventions:
        if one not in here:
            left.append(one)
            continue
        others = [layer for layer in one.on_layers if layer != site.info.layer]
        if others:
            left.append(one.model_copy(update={"layer": None, "layers": tuple(others)}))
    if not left:
        return None
    return plan.model_copy(update={"interventions": tuple(left)})
