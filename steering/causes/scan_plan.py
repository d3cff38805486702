"""What a scan takes out: its experts, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from moescope.probe.bridges import underlying
from moescope.probe.errors import ModelInputError, PlanError
from moescope.probe.models import ModelBundle
from moescope.probe.routers import RouterSite, find_routers
from moescope.steering.causes.ablated_router import AblatedRouter, on_router
from moescope.steering.causes.keys import ExpertKey, Mode
from moescope.steering.causes.stored_batch import Stack, stack_of
from moescope.steering.check import check_rules, check_shape
from moescope.steering.plan import Intervention, Mask, Replay, SteeringPlan

Via = Literal["min", "inf", "selection"]
#: Kinds of routers that a plain forward of a decoder does not reach.
_NOT_REACHED = ("encoder", "mtp")


@dataclass(frozen=True)
class ScanPlan:
    """A scan, checked.

    Attributes:
        mode, via: how experts are taken out.
        base_plan: active all the time, or None.
        sites: all routers of the model.
        experts: those to take out, router by router.
        routers: the routers that have any, by name, each with the base plan's interventions on it.
        stacks: the layers around each.
    """

    mode: Mode
    via: Via
    base_plan: SteeringPlan | None
    sites: tuple[RouterSite, ...]
    experts: tuple[ExpertKey, ...]
    routers: dict[str, AblatedRouter]
    stacks: dict[str, Stack | None]

    def keys_of(self, module: str) -> list[ExpertKey]:
        """The experts of one router, in order."""
        info = self.routers[module].site.info
        return [key for key in self.experts if key[:2] == (info.layer, info.kind)]


def planned_scan(
    bundle: ModelBundle,
    experts: Collection[ExpertKey] | None,
    base_plan: SteeringPlan | None,
    mode: Mode,
    via: Via,
) -> ScanPlan:
    """Check what is asked for.

    Raises:
        PlanError: an expert that is not there or cannot be taken out, or a base plan that replays
            a recorded run.
        ModelInputError: a dense model, or one with an encoder.
    """
    model = underlying(bundle.model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelInputError(
            f"{bundle.name} has an encoder; experts are taken out of decoder-only models"
        )
    sites = find_routers(model)
    infos = [site.info for site in sites]
    if base_plan is not None:
        check_shape(base_plan, infos)
        check_rules(base_plan, infos)
        if any(isinstance(one, Replay) for one in base_plan.interventions):
            raise PlanError(
                f"plan {base_plan.title!r} replays a recorded run, which leaves nothing to take "
                "experts out of; leave the replay out"
            )
    mask = Intervention(action="mask", layer=0, experts=[0], mode=mode, via=via)
    assert isinstance(mask, Mask)
    chosen = _chosen(experts, sites, base_plan)
    here = {
        site.info.module: AblatedRouter(
            site, on_router(base_plan, site, _routers(site, sites)), mask
        )
        for site in sites
        if any(key[:2] == (site.info.layer, site.info.kind) for key in chosen)
    }
    for router in here.values():
        _check(router, chosen)
    stacks = {name: stack_of(model, router.site, sites) for name, router in here.items()}
    return ScanPlan(mode, via, base_plan, tuple(sites), tuple(chosen), here, stacks)


def _chosen(
    experts: Collection[ExpertKey] | None,
    sites: Sequence[RouterSite],
    base_plan: SteeringPlan | None,
) -> list[ExpertKey]:
    """The experts in the order of routers."""
    there = {
        ExpertKey(site.info.layer, site.info.kind, expert): site
        for site in sites
        for expert in range(site.info.num_experts)
    }
    if experts is not None:
        missing = sorted(set(experts) - set(there))
        if missing:
            layer, kind, expert = missing[0]
            raise PlanError(
                f"there is no expert {expert} in layer {layer} ({kind}); see moescope doctor"
            )
        wanted = set(experts)
        return [key for key in there if key in wanted]
    found = []
    for key, site in there.items():
        if site.info.kind in _NOT_REACHED or site.record_only is not None:
            continue
        if site.info.top_k == site.info.num_experts:
            continue
        own = on_router(base_plan, site, _routers(site, sites))
        if not any(key[2] in one.experts for one in own):
            found.append(key)
    if not found:
        raise PlanError("no expert of this model can be taken out")
    return found


def _check(router: AblatedRouter, chosen: Sequence[ExpertKey]) -> None:
    """Refuse what `steer` would refuse."""
    info = router.site.info
    if info.kind in _NOT_REACHED:
        raise PlanError(f"{router.site.where}: a forward of the model does not reach this router")
    if router.site.record_only is not None:
        raise PlanError(
            f"{router.site.where} can be recorded but not steered: {router.site.record_only}"
        )
    own = [
        one.model_copy(update={"layer": info.layer, "layers": None, "kind": info.kind})
        for one in router.base
    ]
    for layer, kind, expert in chosen:
        if (layer, kind) != (info.layer, info.kind):
            continue
        mask = router.mask.model_copy(update={"layer": layer, "kind": kind, "experts": (expert,)})
        check_shape(SteeringPlan(interventions=[*own, mask]), [info])


def _routers(site: RouterSite, sites: Sequence[RouterSite]) -> int:
    """How many routers a router's layer has."""
    return sum(one.info.layer == site.info.layer for one in sites)
