"""The checks of the survey: what is tried on the tiny model of each family.

Each check returns when it holds and raises otherwise, with a sentence that says which layer and
why. What experts got is read at the experts' own inputs and from their weights
(`moescope.probe.zoo.capture`), never from what steering says it did.

Letters: T rows that passed a router, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.recording import record
from moescope.probe.routers import RouterSite
from moescope.probe.zoo.build import TinyModel
from moescope.probe.zoo.capture import Arrived, capture, without_weights
from moescope.steering.apply import steer
from moescope.steering.plan import Intervention, SteeringPlan
from moescope.steering.report import SteeringReport

#: Raised inside a forward by the check that nothing is left behind then.
_STOP = "the survey stopped this forward on purpose"


class CheckError(MoescopeError):
    """A check of the survey does not hold."""


class _StopError(Exception):
    """Not one of ours, so that nobody catches it by accident."""


@dataclass
class Bench:
    """A tiny model with what its checks share.

    Attributes:
        tiny: the model and its inputs.
        sites: its routers, as `verify_routers` proved them.
    """

    tiny: TinyModel
    sites: list[RouterSite]

    @property
    def tolerance(self) -> float:
        """Relative difference that rounding alone makes between two ways to compute a weight."""
        return 1e-5 if next(self.tiny.model.parameters()).dtype == torch.float32 else 2e-2

    def output(self) -> Tensor:
        """The model's output: logits, or the last hidden state."""
        with torch.no_grad():
            found: Tensor = self.tiny.model(**self.tiny.inputs)[0]
        return found

    @cached_property
    def base(self) -> tuple[Tensor, dict[str, Arrived]]:
        """The output without steering, and what arrived at the experts then."""
        with capture(self.sites) as caught:
            output = self.output()
        return output, dict(caught.layers)

    @cached_property
    def active(self) -> list[RouterSite]:
        """The layers whose experts ran: not those of a modality that the inputs do not have."""
        return [site for site in self.sites if site.info.module in self.base[1]]

    @cached_property
    def used(self) -> dict[str, tuple[int, int]]:
        """Router's name -> its most and its least used expert with weights of its own."""
        found = {}
        for site in self.active:
            counts = counts_of(site, self.base[1][site.info.module])
            rule = site.info.rule
            own = counts[: rule.num_experts - rule.num_zero_experts - rule.has_skip]
            found[site.info.module] = (int(own.argmax()), int(own.argmin()))
        return found

    @property
    def most(self) -> dict[str, int]:
        """Router's name -> the expert that most tokens use."""
        return {module: pair[0] for module, pair in self.used.items()}

    @property
    def least(self) -> dict[str, int]:
        """Router's name -> the expert that fewest tokens use."""
        return {module: pair[1] for module, pair in self.used.items()}

    def plan(self, action: str, experts: Mapping[str, int] | None = None, **fields: Any) -> Any:
        """One intervention of this action on every layer, on one expert each."""
        return SteeringPlan(
            interventions=[
                Intervention(
                    action=action, layer=site.info.layer, kind=site.info.kind,
                    **({} if experts is None else {"experts": [experts[site.info.module]]}),
                    **fields,
                )
                for site in self.active
            ]
        )  # fmt: skip

    @contextmanager
    def steered(self, plan: SteeringPlan, **options: Any) -> Iterator[SteeringReport]:
        """Steering with the proved routers."""
        with steer(self.tiny.model, plan, sites=self.sites, **options) as report:
            yield report

    def under(self, plan: SteeringPlan, **options: Any) -> tuple[Tensor, dict[str, Arrived]]:
        """The output under a plan, and what arrived at the experts."""
        with self.steered(plan, **options), capture(self.sites) as caught:
            output = self.output()
        return output, dict(caught.layers)

    def expert_rows(self, site: RouterSite) -> int:
        """How many rows pass this layer's router."""
        return int(self.recorded_ids[site.info.module].shape[0])

    @cached_property
    def recorded_ids(self) -> dict[str, Tensor]:
        """Router's name -> recorded ids of a forward without steering, int64[T, K]."""
        with record(self.tiny.model, sites=self.sites) as trace:
            self.output()
        keys = {site.info.module: (site.info.layer, site.info.kind) for site in self.active}
        return {module: trace[key].expert_ids for module, key in keys.items()}


def counts_of(site: RouterSite, arrived: Arrived) -> Tensor:
    """Tokens per expert at the experts' input, int64[E]."""
    if arrived.counts is None:
        raise CheckError(f"{site.where}: what its experts receive cannot be counted")
    return arrived.counts


def _slots(bench: Bench, site: RouterSite, arrived: Arrived, plan: SteeringPlan) -> int:
    """Slots with a weight.

    JetMoE's attention experts always get K slots a token and see no weights, so slots that are not
    in use have weight 0 in what the router handed on.
    """
    if arrived.expert_ids is not None or site.info.kind != "attention":
        return int(counts_of(site, arrived).sum())
    with bench.steered(plan), record(bench.tiny.model, sites=bench.sites) as trace:
        bench.output()
    return int((trace[site.info.layer, site.info.kind].weights != 0).sum())


def _require(holds: bool, site: RouterSite, what: str) -> None:
    if not holds:
        raise CheckError(f"{site.where}: {what}")


def recorded(bench: Bench) -> None:
    """Recorded ids and weights are those that arrived at the experts, to the bit."""
    with record(bench.tiny.model, sites=bench.sites) as trace, capture(bench.sites) as caught:
        bench.output()
    for site in bench.active:
        layer = trace[site.info.layer, site.info.kind]
        arrived = caught[site]
        _require(bool(torch.isfinite(layer.logits).all()), site, "a recorded logit is not finite")
        if arrived.expert_ids is None or arrived.weights is None:
            weighted = layer.expert_ids[layer.weights != 0]
            counts = torch.bincount(weighted, minlength=site.info.num_experts)
            same = torch.equal(counts, counts_of(site, arrived))
            _require(same, site, "the record counts other tokens per expert than its experts got")
            continue
        slots = layer.weights != 0
        same_ids = torch.equal(layer.expert_ids[slots], arrived.expert_ids[slots])
        _require(same_ids, site, "the recorded ids are not those that its experts got")
        same_weights = torch.equal(layer.weights, arrived.weights)
        _require(same_weights, site, "the recorded weights are not those that its experts got")


def verified(bench: Bench) -> None:
    """Every layer that ran was proved when it was attached."""
    for site in bench.active:
        _require(site.info.verified, site, str(site.info.reason))


def empty_plan(bench: Bench) -> None:
    """A plan without interventions leaves the output as it is, to the bit."""
    output, _ = bench.under(SteeringPlan())
    if not torch.equal(output, bench.base[0]):
        raise CheckError("an empty plan changes the output")


def masked(bench: Bench) -> None:
    """A masked expert receives no token, and could lose its weights unnoticed."""
    experts = bench.most
    for via in ("min", "inf", "selection"):
        plan = bench.plan("mask", experts, via=via)
        output, arrived = bench.under(plan)
        for site in bench.active:
            left = int(counts_of(site, arrived[site.info.module])[experts[site.info.module]])
            _require(left == 0, site, f"{left} tokens reach an expert masked via {via}")
        _require_changed(bench, output, f"masking via {via}")
        with without_weights([(site, experts[site.info.module]) for site in bench.active]):
            without, _ = bench.under(plan)
        if not torch.equal(output, without):
            raise CheckError(f"the weights of experts masked via {via} still matter")


def forced(bench: Bench) -> None:
    """A forced expert receives every token, and no token's output is the same without it."""
    experts = bench.least
    for strength in ("max", "natural"):
        plan = bench.plan("force", experts, strength=strength)
        output, arrived = bench.under(plan)
        for site in bench.active:
            rows = bench.expert_rows(site)
            got = int(counts_of(site, arrived[site.info.module])[experts[site.info.module]])
            what = f"{got} of {rows} tokens reach an expert forced with strength {strength}"
            _require(got == rows, site, what)
        if strength == "natural":
            continue  # a weight may be small enough to vanish in the output
        with without_weights([(site, experts[site.info.module]) for site in bench.active]):
            without, _ = bench.under(plan)
        if not bool((output != without).flatten(2).any(-1).all()):
            raise CheckError("the output of some token does not depend on the forced experts")


def biased(bench: Bench) -> None:
    """A bias upwards takes no token from its expert and changes its weight, at the first layer."""
    site = bench.active[0]
    expert = bench.least[site.info.module]
    settings: list[dict[str, Any]] = [
        {"value": 2.0}, {"value": 1.0, "unit": "std"}, {"value": 1.0, "on": "selection"},
    ]  # fmt: skip
    for setting in settings:
        output, arrived = bench.under(bench.plan("bias", bench.least, **setting))
        before = counts_of(site, bench.base[1][site.info.module])[expert]
        after = counts_of(site, arrived[site.info.module])[expert]
        _require(bool(after >= before), site, f"a bias of {setting} takes tokens from its expert")
        if setting.get("on") == "selection" and site.info.rule.from_table:
            continue  # ids come from a table: no score to add to
        _require_changed(bench, output, f"a bias of {setting}")


def scaled(bench: Bench) -> None:
    """Only the weight of the scaled expert changes, by the factor, at the first layer."""
    site = bench.active[0]
    expert = bench.most[site.info.module]
    output, arrived = bench.under(bench.plan("scale", bench.most, value=2.0))
    _require_changed(bench, output, "scaling")
    before, after = bench.base[1][site.info.module], arrived[site.info.module]
    if before.weights is not None and after.weights is not None:
        assert before.expert_ids is not None
        factor = torch.where(before.expert_ids == expert, 2.0, 1.0)
        _require_close(
            bench, site, after.weights, before.weights.float() * factor, "scaled weights"
        )
    output, arrived = bench.under(bench.plan("scale", bench.most, value=2.0, renormalize=True))
    _require_changed(bench, output, "scaling with renormalization")
    after = arrived[site.info.module]
    if before.weights is not None and after.weights is not None:
        sums = [one.float().sum(-1) for one in (after.weights, before.weights)]
        _require_close(bench, site, sums[0], sums[1], "the sums of weights after scaling")


def dropped(bench: Bench) -> None:
    """A dropped expert counts for nothing, the others keep their weight (or their ratios)."""
    experts = bench.most
    for mode in ("drop", "drop_renorm"):
        plan = bench.plan("mask", experts, mode=mode)
        output, arrived = bench.under(plan)
        for site in bench.active:
            left = int(counts_of(site, arrived[site.info.module])[experts[site.info.module]])
            _require(left == 0, site, f"{left} tokens give weight to a dropped expert ({mode})")
        _require_changed(bench, output, f"mode {mode}")
        with without_weights([(site, experts[site.info.module]) for site in bench.active]):
            without, _ = bench.under(plan)
        if not torch.equal(output, without):
            raise CheckError(f"the weights of dropped experts still matter ({mode})")
        site = bench.active[0]
        before, after = bench.base[1][site.info.module], arrived[site.info.module]
        if mode == "drop" and before.weights is not None and after.weights is not None:
            assert before.expert_ids is not None
            expected = before.weights.masked_fill(before.expert_ids == experts[site.info.module], 0)
            same = torch.equal(_by_expert(site, after), _by_expert(site, before, expected))
            _require(same, site, "dropping an expert changes the weights of others")


def top_k(bench: Bench) -> None:
    """Every token uses as many experts as asked for: one more, and one fewer."""
    refusals = []
    for change, kind in product((1, -1), dict.fromkeys(site.info.kind for site in bench.active)):
        sites = [one for one in bench.active if one.info.kind == kind and one.info.top_k + change]
        if not sites:
            continue
        plan = SteeringPlan(
            interventions=[
                Intervention(
                    action="top_k", layer=site.info.layer, kind=kind,
                    value=site.info.top_k + change,
                )
                for site in sites
            ]
        )  # fmt: skip
        try:
            output, arrived = bench.under(plan)
        except PlanError as error:
            refusals.append(error)
            continue
        for site in sites:
            wanted = bench.expert_rows(site) * (site.info.top_k + change)
            got = _slots(bench, site, arrived[site.info.module], plan)
            _require(got == wanted, site, f"{got} slots reach its experts, not {wanted}")
        _require_changed(bench, output, "another number of experts")
    if refusals:  # raised last, so that what is not refused has been tried
        raise refusals[0]


def top_p(bench: Bench) -> None:
    """A share of probability close to 0 leaves one expert, the strongest, to every token."""
    plan = bench.plan("top_p", value=1e-6)
    output, arrived = bench.under(plan)
    for site in bench.active:
        rows = bench.expert_rows(site)
        got = _slots(bench, site, arrived[site.info.module], plan)
        _require(got == rows, site, f"{got} slots reach its experts, not one for each of {rows}")
    if any(site.info.top_k > 1 for site in bench.active):
        _require_changed(bench, output, "one expert per token")


def replayed(bench: Bench) -> None:
    """The routing of another run, recorded under a mask, is repeated, and so is its output."""
    plan = bench.plan("mask", bench.most)
    with record(bench.tiny.model, sites=bench.sites) as trace:
        wanted, given = bench.under(plan)
    output, arrived = bench.under(bench.plan("replay", run="masked"), runs={"masked": trace})
    for site in bench.active:
        before, after = given[site.info.module], arrived[site.info.module]
        same = torch.equal(counts_of(site, before), counts_of(site, after))
        if before.expert_ids is not None and after.expert_ids is not None:
            same = same and torch.equal(before.expert_ids, after.expert_ids)
        _require(same, site, "a replay sends tokens to other experts than the run it repeats")
    if not torch.equal(output, wanted):
        raise CheckError("a replay gives another output than the run it repeats")
    _require_changed(bench, output, "the replay of a masked run")


def restored(bench: Bench) -> None:
    """After all of the above the output is what it was, to the bit, and no hook is left."""
    if not torch.equal(bench.output(), bench.base[0]):
        raise CheckError("the output after leaving is not what it was before")


def after_an_error(bench: Bench) -> None:
    """An exception inside a forward under steering and recording leaves nothing behind."""
    before = _traces_of_hooks(bench.tiny.model)
    proved = all(site.info.verified for site in bench.active)
    plan = bench.plan("mask", bench.most) if proved else SteeringPlan()
    last = bench.active[-1]

    def stop(*_: Any) -> None:
        raise _StopError(_STOP)

    try:
        with record(bench.tiny.model, sites=bench.sites), bench.steered(plan):
            hook = last.experts.register_forward_hook(stop)
            try:
                bench.output()
            finally:
                hook.remove()
    except _StopError:
        pass
    else:
        raise CheckError("the exception did not come through")
    if _traces_of_hooks(bench.tiny.model) != before:
        raise CheckError("an exception leaves a hook behind")
    if not torch.equal(bench.output(), bench.base[0]):
        raise CheckError("the output after an exception is not what it was before")


def _traces_of_hooks(model: nn.Module) -> list[tuple[Any, ...]]:
    """All hooks of all modules, and the attributes that each instance has of its own."""
    return [
        (
            name,
            sorted(module.__dict__),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


def _require_changed(bench: Bench, output: Tensor, what: str) -> None:
    if not bool(torch.isfinite(output).all()):
        raise CheckError(f"the output is not finite under {what}")
    if torch.equal(output, bench.base[0]):
        raise CheckError(f"{what} does not change the output")


def _require_close(
    bench: Bench, site: RouterSite, found: Tensor, expected: Tensor, what: str
) -> None:
    close = torch.allclose(found.float(), expected.float(), rtol=bench.tolerance, atol=1e-6)
    _require(close, site, f"{what} are not what the formula says")


def _by_expert(site: RouterSite, arrived: Arrived, weights: Tensor | None = None) -> Tensor:
    """Weights float[T, E] by expert, so that the order of slots does not matter."""
    weights = arrived.weights if weights is None else weights
    assert arrived.expert_ids is not None and weights is not None
    dense = torch.zeros(weights.shape[0], site.info.num_experts, dtype=weights.dtype)
    return dense.scatter_add(1, arrived.expert_ids, weights)


#: Name of a check -> the check; the later ones rest on the earlier ones.
RECORDING: dict[str, Callable[[Bench], None]] = {"recorded": recorded, "verified": verified}
#: Steering actions, which need proved layers.
ACTIONS: dict[str, Callable[[Bench], None]] = {
    "mask": masked, "force": forced, "bias": biased, "scale": scaled, "drop": dropped,
    "top_k": top_k, "top_p": top_p, "replay": replayed,
}  # fmt: skip
STEERING: dict[str, Callable[[Bench], None]] = {
    "empty plan": empty_plan, **ACTIONS, "restored": restored, "after an error": after_an_error,
}  # fmt: skip
CHECKS: Sequence[str] = (*RECORDING, *STEERING)
