"""Which savings a model allows: each is tried, and its numbers compared with whole forwards.

The reference is `steer` with a `mask`, the way in which anybody would take the expert out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moescope.probe.errors import MoescopeError
from moescope.probe.models import ModelBundle
from moescope.probe.routers import RouterSite
from moescope.steering.apply import steer
from moescope.steering.causes.ablated_router import AblatedRouter, without_router
from moescope.steering.causes.measuring import batch_running
from moescope.steering.causes.reach import Pairs
from moescope.steering.causes.restart import (
    LADDER,
    REFUSALS,
    Savings,
    rows_of,
    usable,
    without_experts,
)
from moescope.steering.causes.stored_batch import Stack, StoredBatch, forward
from moescope.steering.plan import SteeringPlan

#: Values of the two ways may differ by this much, times their size where that is over 1.
TOLERANCE = 1e-5
#: Rows on which each of two experts is compared.
_ROWS = 4


@dataclass(frozen=True)
class Bench:
    """What a proof runs on.

    Attributes:
        bundle: model and tokenizer.
        sites: all its routers.
        base_plan: active all the time, or None.
        prompt_ids: of all prompts, by index.
    """

    bundle: ModelBundle
    sites: Sequence[RouterSite]
    base_plan: SteeringPlan | None
    prompt_ids: Sequence[int]

    def num_routers(self, site: RouterSite) -> int:
        """How many routers a router's layer has."""
        return sum(one.info.layer == site.info.layer for one in self.sites)

    def rest_of_plan(self, site: RouterSite) -> SteeringPlan:
        """What the base plan does elsewhere; it may be empty."""
        rest = without_router(self.base_plan, site, self.num_routers(site))
        return rest or SteeringPlan(interventions=[])


def proved_savings(
    bench: Bench,
    stored: StoredBatch,
    router: AblatedRouter,
    around: Stack | None,
    pairs: Pairs,
    ladder: Sequence[Savings] = LADDER,
) -> Savings:
    """The fastest way that gives what whole forwards give.

    Raises:
        MoescopeError: not even whole forwards give the same as `steer`.
    """
    sample = _sample(pairs)
    wanted = _by_steering(bench, stored, router, sample)
    is_last = around is not None and around.is_last
    rest = bench.rest_of_plan(router.site)
    why = "the numbers differ"
    for savings in usable(ladder, stored.cache is not None, is_last):
        try:
            with steer(bench.bundle.model, rest):
                found = without_experts(
                    bench.bundle, stored, router, around, sample, bench.prompt_ids, savings
                )
        except REFUSALS as error:
            why = str(error)
            continue
        if same_values(found, wanted):
            return savings
    raise MoescopeError(
        f"{router.site.where}: taking experts out row by row gives other numbers than a mask plan, "
        f"so nothing can be measured there ({why}); does the model draw anything at random?"
    )


def same_values(found: Tensor, wanted: Tensor) -> bool:
    """Whether values agree to `TOLERANCE`."""
    limit = TOLERANCE * wanted.abs().clamp(min=1.0)
    return bool(((found - wanted).abs() <= limit).all())


def _sample(pairs: Pairs) -> Pairs:
    """A few rows of two experts: the one whose changes begin last, and the most frequent one."""
    last = pairs.places[-1]
    most = pairs.places.bincount().argmax()
    at = [(pairs.places == one).nonzero()[:, 0][-_ROWS:].tolist() for one in (most, last)]
    return pairs.chosen(torch.tensor(sorted({*at[0], *at[1]})))


def _by_steering(bench: Bench, stored: StoredBatch, router: AblatedRouter, sample: Pairs) -> Tensor:
    """The sample's values under `steer` with the whole plan, one forward an expert."""
    info = router.site.info
    found = torch.zeros(len(sample), device=stored.values.device)
    for expert in sorted(set(sample.experts.tolist())):
        mask = router.mask.model_copy(
            update={"layer": info.layer, "kind": info.kind, "experts": (expert,)}
        )
        own = () if bench.base_plan is None else bench.base_plan.interventions
        plan = SteeringPlan(interventions=[*own, mask])
        at = (sample.experts == expert).nonzero()[:, 0]
        batch = rows_of(stored, sample.rows[at], 0)
        with steer(bench.bundle.model, plan), batch_running(batch, bench.prompt_ids):
            found[at.to(found.device)] = batch.values(forward(bench.bundle, batch))
    return found
