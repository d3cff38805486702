"""What cannot be done on a model's layers is refused before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from moescope.kernels.route import RoutingRule
from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape, check, check_rules, check_shape


@dataclass(frozen=True)
class Router(LayerShape):
    verified: bool = True
    reason: str | None = None


LAYERS = [Router(layer, "mlp", 8, 2) for layer in (1, 2, 3, 5)]


def plan(*interventions: dict[str, Any]) -> SteeringPlan:
    return SteeringPlan(name="p", interventions=interventions)


def mask(experts: list[int], layer: int = 1, **more: Any) -> dict[str, Any]:
    return {"action": "mask", "layer": layer, "experts": experts, **more}


def force(experts: list[int], layer: int = 1, **more: Any) -> dict[str, Any]:
    return {"action": "force", "layer": layer, "experts": experts, **more}


def on(action: str, layer: int = 1, **more: Any) -> dict[str, Any]:
    return {"action": action, "layer": layer, **more}


REFUSED = [
    (
        [mask([1], layer=4)],
        "plan 'p', intervention 1 (mask): layer 4 has no router; the routed layers are 1-3, 5",
    ),
    ([mask([3]), mask([8])], "intervention 2 (mask): layer 1 has no expert 8; its experts are 0-7"),
    (
        [mask([0, 1, 2, 3, 4, 5, 6])],
        "on prompt tokens, 7 of 8 experts are masked and 1 left, but 2 are selected per token; "
        "mask at most 6",
    ),
    ([mask([0, 1, 2, 3]), mask([4, 5, 6])], "7 of 8 experts are masked"),
    ([mask(list(range(7))), mask([7], fill_up=True)], "7 of 8 experts are masked and 1 left"),
    ([mask([4]), mask([4], fill_up=True)], "mask via min filling up here and for mask via min in"),
    ([mask([4], fill_up=True), force([4])], "force max here and for mask via min filling up"),
    (
        [mask([0, 1, 2, 3], tokens="prompt"), mask([4, 5, 6], tokens="last_prompt")],
        "on the last prompt token, 7 of 8 experts are masked",
    ),
    (
        [mask([0, 1, 2, 3], tokens="generated"), mask([4, 5, 6], tokens={"first_generated": 3})],
        "on generated tokens from number 1, 7 of 8 experts are masked",
    ),
    ([force([0, 1, 2])], "3 experts are forced, but only 2 are selected per token"),
    ([force([0, 1]), force([2], tokens="last_prompt")], "on the last prompt token, 3 experts"),
    (
        [mask([4]), force([4, 5])],
        "intervention 2 (force): on prompt tokens, expert 4 of layer 1 is asked for force max "
        "here and for mask via min in intervention 1; keep one",
    ),
    ([mask([4], tokens="generated"), force([4], tokens={"first_generated": 2})], "expert 4"),
    ([mask([4]), mask([4], via="inf")], "asked for mask via inf here and for mask via min"),
    ([force([4]), force([4], strength="natural")], "asked for force natural here"),
    ([mask([1], kind="attention")], "no router of kind 'attention'; it has mlp"),
    (
        [{"action": "replay", "layers": [1, 4], "run": "base"}],
        "intervention 1 (replay): layer 4 has no router",
    ),
    ([on("bias", experts=[9], value=1)], "layer 1 has no expert 9; its experts are 0-7"),
    ([on("top_k", value=9)], "layer 1 has 8 experts, so no token can use 9"),
    (
        [mask([4]), on("bias", experts=[4], value=1)],
        "expert 4 of layer 1 is asked for bias +1 logit here and for mask via min",
    ),
    (
        [mask([4], mode="drop"), on("scale", experts=[4], value=2)],
        "expert 4 of layer 1 is asked for scale x2 here and for mask drop in intervention 1",
    ),
    ([mask([4], mode="drop_renorm"), force([4])], "force max here and for mask drop_renorm"),
    (
        [on("bias", experts=[4], value=1), on("bias", experts=[4], value=1)],
        "bias +1 logit here and for bias +1 logit in intervention 1; keep one",
    ),
    (
        [on("top_k", value=3), on("top_p", value=0.5)],
        "on prompt tokens, layer 1 is asked for top_p 0.5 here and for top_k 3 in intervention 1",
    ),
    ([on("top_k", value=3), on("top_k", value=3)], "top_k 3 here and for top_k 3"),
    (
        [on("replay", run="base"), mask([4])],
        "layer 1 is asked for mask via min here and for replay of base in intervention 1; keep one",
    ),
    (
        [on("replay", run="base"), on("replay", run="other", tokens="last_prompt")],
        "on the last prompt token, layer 1 is asked for replay of other here",
    ),
    ([on("top_k", value=4), mask([0, 1, 2, 3, 4])], "3 left, but 4 are selected per token"),
    ([on("top_k", value=1), force([0, 1])], "2 experts are forced, but only 1 are selected"),
    ([on("top_p", value=0.5), mask(list(range(8)))], "8 of 8 experts are masked"),
    (
        [mask([4], prompt_ids=[3, 5]), force([4], prompt_ids=[5, 8])],
        "on prompt tokens of prompt 5, expert 4 of layer 1",
    ),
    (
        [mask([0, 1, 2, 3]), mask([4, 5, 6], prompt_ids=[7])],
        "on prompt tokens of prompt 7, 7 of 8 experts are masked",
    ),
]


@pytest.mark.parametrize(("interventions", "message"), REFUSED)
def test_what_cannot_be_done_is_refused(interventions: list[Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        check(plan(*interventions), LAYERS)
    assert message in str(caught.value)
    assert "plan 'p'" in str(caught.value)


@pytest.mark.parametrize(
    "interventions",
    [
        [],
        [mask([0, 1, 2, 3, 4, 5])],
        [mask([0, 1, 2, 3, 4, 5]), force([6, 7])],
        [mask([4]), mask([4, 5])],
        [mask([0, 1, 2, 3], tokens="prompt"), mask([4, 5, 6], tokens="generated")],
        [mask([4], tokens="prompt"), force([4], tokens="generated")],
        [mask([4], tokens="last_prompt"), force([4], tokens={"first_generated": 2})],
        [force([0, 1], tokens="prompt"), force([2, 3], tokens="generated")],
        [force([0, 1]), force([0, 1], layer=2)],
        [mask(list(range(8)), mode="drop")],
        [mask(list(range(8)), mode="drop_renorm")],
        [mask([0, 1, 2, 3, 4, 5, 6], fill_up=True)],
        [mask(list(range(8)), fill_up=True), on("top_p", value=0.5)],
        [mask([0, 1, 2, 3, 4, 5], fill_up=True), mask([6])],
        [mask([0, 1, 2, 3, 4, 5, 6]), on("top_k", value=1)],
        [mask([0, 1, 2, 3, 4, 5, 6]), on("top_p", value=0.5)],
        [force([0, 1, 2]), on("top_k", value=3)],
        [force([0, 1, 2]), on("top_p", value=0.1)],
        [on("bias", experts=[4], value=1), on("scale", experts=[4], value=2)],
        [force([4]), on("scale", experts=[4], value=2)],
        [on("top_k", value=3, tokens="prompt"), on("top_p", value=0.5, tokens="generated")],
        [on("replay", run="base", tokens="prompt"), mask([4], tokens="generated")],
        [mask([4], prompt_ids=[3]), force([4], prompt_ids=[5, 8])],
        [{"action": "mask", "layers": [1, 2, 5], "experts": [0, 1]}, force([2])],
    ],
)
def test_what_can_be_done_passes(interventions: list[Any]) -> None:
    check(plan(*interventions), LAYERS)


def test_an_unverified_router_is_refused_with_its_reason() -> None:
    layers = [Router(1, "mlp", 8, 2, verified=False, reason="the rule selects other experts")]
    check_shape(plan(mask([1])), layers)
    with pytest.raises(PlanError, match="recorded but not steered: the rule selects other"):
        check(plan(mask([1])), layers)
    check(plan(), layers)


def test_two_routers_in_one_layer_must_be_told_apart() -> None:
    layers = [Router(1, "mlp", 8, 2), Router(1, "attention", 4, 2)]
    with pytest.raises(PlanError, match="several routers \\(attention, mlp\\); name one"):
        check(plan(mask([1])), layers)
    check(plan(mask([1], kind="attention"), force([1], kind="mlp")), layers)
    with pytest.raises(PlanError, match="no expert 5"):
        check(plan(mask([5], kind="attention")), layers)


RULE = RoutingRule(num_experts=8, top_k=2, renormalize=True)


@dataclass(frozen=True)
class Ruled(Router):
    rule: RoutingRule = RULE


def test_numbers_of_experts_that_a_family_cannot_take_are_refused() -> None:
    more, fewer = plan(on("top_k", value=3)), plan(on("top_k", value=1))
    share, masked = plan(on("top_p", value=0.5)), plan(mask([1]))
    capacity = RoutingRule(num_experts=8, top_k=1, renormalize=False, capacity=4)
    switch = [Ruled(1, "mlp", 8, 1, rule=capacity)]
    for refused in (more, fewer, share):
        with pytest.raises(PlanError, match="exactly one expert, up to the expert's capacity"):
            check_rules(refused, switch)
    check_rules(masked, switch)
    attention = [Ruled(1, "attention", 8, 2)]
    with pytest.raises(PlanError, match="no token can use more than 2"):
        check_rules(more, attention)
    for taken in (fewer, share, masked):
        check_rules(taken, attention)
    check_rules(more, [Ruled(1, "mlp", 8, 2)])
