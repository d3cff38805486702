"""The checks of the survey: what is tried on the tiny model of each family.

Each check returns when it holds and raises otherwise, with a sentence that says which layer and
why. What experts got is read at the experts' own inputs and from their weights
(`moescope.probe.zoo.capture`), never from what steering says it did.

Letters: T rows that passed a router, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moescope.probe.errors import PlanError
from moescope.probe.recording import record
from moescope.probe.routers import RouterSite
from moescope.probe.zoo.capture import Arrived, without_weights
from moescope.steering.plan import Intervention, SteeringPlan
from moescope.steering.survey_bench import Bench, CheckError, counts_of

#: Raised inside a forward by the check that nothing is left behind then.
_STOP = "the survey stopped this forward on purpose"


class _StopError(Exception):
    """Not one of ours, so that nobody catches it by accident."""


def _slots(bench: Bench, site: RouterSite, arrived: Arrived, plan: SteeringPlan) -> int:
    """Slots with a weight.

    JetMoE's attention experts always get K slots a token and see no weights, so slots that are not
    in use have weight 0 in what the router handed on.
    """
    if site.info.rule.has_skip and arrived.expert_ids is not None:
        skipped = arrived.expert_ids == site.info.num_experts - 1
        return int(skipped.sum() + counts_of(site, arrived)[:-1].sum())
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
    trace, _ = bench.unsteered
    for site in bench.active:
        layer = trace[site.info.layer, site.info.kind]
        arrived = bench.before(site)
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
    if not torch.equal(output, bench.base):
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
        if via != "min":
            continue  # the same hooks with other scores
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
            rows = bench.num_rows(site)
            got = int(counts_of(site, arrived[site.info.module])[experts[site.info.module]])
            what = f"{got} of {rows} tokens reach an expert forced with strength {strength}"
            if site.info.rule.capacity is not None:
                what += f"; it takes {site.info.rule.capacity} of each sequence (its capacity)"
            _require(got == rows, site, what)
        if strength == "natural":
            continue  # a weight may be small enough to vanish in the output
        with without_weights([(site, experts[site.info.module]) for site in bench.active]):
            without, _ = bench.under(plan)
        changed = (output != without).flatten(2).any(-1)
        if not bool((changed | ~bench.is_text).all()):
            raise CheckError("the output of some token does not depend on the forced experts")


def biased(bench: Bench) -> None:
    """A bias downwards gives no token to its expert and lowers its weight, at the first layer."""
    site = bench.active[0]
    expert = bench.most[site.info.module]
    settings: list[dict[str, Any]] = [
        {"value": -2.0}, {"value": -1.0, "unit": "std"}, {"value": -1.0, "on": "selection"},
    ]  # fmt: skip
    before = counts_of(site, bench.before(site))[expert]
    for setting in settings:
        output, arrived = bench.under(bench.plan("bias", bench.most, **setting))
        after = counts_of(site, arrived[site.info.module])[expert]
        _require(bool(after <= before), site, f"a bias of {setting} gives tokens to its expert")
        if setting.get("on") == "selection" and all(
            one.info.rule.from_table for one in bench.active
        ):
            continue  # ids come from a table: no score to add to
        _require_changed(bench, output, f"a bias of {setting}")


def scaled(bench: Bench) -> None:
    """Only the weight of the scaled expert changes, by the factor, at the first layer."""
    site = bench.active[0]
    expert = bench.most[site.info.module]
    output, arrived = bench.under(bench.plan("scale", bench.most, value=2.0))
    _require_changed(bench, output, "scaling")
    before, after = bench.before(site), arrived[site.info.module]
    if before.weights is not None and after.weights is not None:
        assert before.expert_ids is not None
        factor = torch.where(before.expert_ids == expert, 2.0, 1.0)
        _require_close(
            bench, site, after.weights, before.weights.float() * factor, "scaled weights"
        )
    output, arrived = bench.under(bench.plan("scale", bench.most, value=2.0, renormalize=True))
    if any(one.info.top_k > 1 for one in bench.active):  # one weight alone keeps its sum
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
            got = arrived[site.info.module]
            if got.weights is None:
                continue  # counts there include slots of weight 0; the weights of experts tell
            left = int(counts_of(site, got)[experts[site.info.module]])
            _require(left == 0, site, f"{left} tokens give weight to a dropped expert ({mode})")
        _require_changed(bench, output, f"mode {mode}")
        if mode != "drop":
            continue  # the same hooks with other weights for the rest
        with without_weights([(site, experts[site.info.module]) for site in bench.active]):
            without, _ = bench.under(plan)
        if not torch.equal(output, without):
            raise CheckError(f"the weights of dropped experts still matter ({mode})")
        site = bench.active[0]
        before, after = bench.before(site), arrived[site.info.module]
        if before.weights is not None and after.weights is not None:
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
            wanted = bench.num_rows(site) * (site.info.top_k + change)
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
        rows = bench.num_rows(site)
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
    if not torch.equal(bench.output(), bench.base):
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
    if not torch.equal(bench.output(), bench.base):
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
    if torch.equal(output, bench.base):
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
