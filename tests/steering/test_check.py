"""What cannot be done on a model's layers is refused before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape, check, check_shape


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
