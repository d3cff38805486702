"""Plans out of plans: several as one, and one turned into its opposite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from moescope.probe.errors import PlanError
from moescope.steering.check import LayerShape, RoutedLayer, check_shape, layers_of
from moescope.steering.interventions import Bias, Force, Intervention, Mask, Scale
from moescope.steering.plan import SteeringPlan

#: What takes the place of each action in the opposite plan, for its provenance.
INVERSES: Final = {
    "mask": "force",
    "force": "mask replace",
    "bias v": "bias -v",
    "scale v": "scale 1/v",
}
# Where an intervention acts.
_SCOPE: Final = {"layer", "layers", "kind", "tokens", "prompt_ids"}
# Without these an intervention is what is done, on which tokens.
_PLACE: Final = {"experts", "layer", "layers", "kind", "prompt_ids"}
# A model large enough for any plan: without a model, numbers of experts are not judged.
_MANY = 1 << 40


def compose(
    plans: Sequence[SteeringPlan],
    *,
    layers: Sequence[RoutedLayer] | None = None,
    name: str | None = None,
) -> SteeringPlan:
    """One plan that asks for everything that several ask for.

    What they ask for alike is asked for once: the same action with the same settings, scope and
    prompts on the same expert counts once, even a bias or a scale, so that a plan composed with
    itself stays what it is. Experts of otherwise equal interventions are put together.

    Args:
        plans: at least one.
        layers: the model's routed layers; with them numbers of experts are checked too.
        name: of the result; by default the plans' names, joined.

    Raises:
        PlanError: the plans are for different models, or contradict each other: an expert in two
            opposite or differently set actions on the same tokens, two numbers of experts per
            token, anything beside a replay.
    """
    if not plans:
        raise PlanError("there is nothing to compose; name at least one plan")
    names = " + ".join(plan.title for plan in plans)
    models = list(dict.fromkeys(plan.model for plan in plans if plan.model is not None))
    if len(models) > 1:
        raise PlanError(
            f"{names} cannot be composed: they are for different models ({', '.join(models)})"
        )
    everything = [one for plan in plans for one in plan.interventions]
    shapes = list(layers) if layers is not None else _any_layers(everything)
    for plan in plans:
        check_shape(plan, shapes)
    merged = SteeringPlan(
        name=name or names,
        model=models[0] if models else None,
        provenance={"composed_of": [_origin(plan) for plan in plans]},
        interventions=_merged(everything, shapes),
    )
    try:
        check_shape(merged, shapes)
    except PlanError as error:
        raise PlanError(f"{names} cannot be composed: {error}") from error
    return merged


def invert(
    plan: SteeringPlan,
    *,
    strength: Literal["max", "natural"] = "max",
    layers: Sequence[RoutedLayer] | None = None,
    name: str | None = None,
) -> SteeringPlan:
    """The opposite plan: what was masked is forced, what was forced is masked, and so on.

    mask (any mode) becomes force, force (any strength) becomes mask replace via min, bias v becomes
    bias -v, scale v becomes scale 1/v. Layers, tokens and prompts stay. The opposite of the
    opposite is the plan itself for masks that replace via min, forces of `strength`, and biases.

    Args:
        plan: what to turn around.
        strength: of the forces that take the place of masks.
        layers: the model's routed layers; with them the numbers of experts are checked: a plan
            that masks more than k experts of a layer has no opposite.
        name: of the result.

    Raises:
        PlanError: top_k, top_p and replay have no opposite, nor has a scale of 0.
    """
    inverse = SteeringPlan(
        name=name or f"opposite of {plan.title}",
        model=plan.model,
        provenance={
            "opposite_of": _origin(plan),
            "mapping": INVERSES | {"mask": f"force {strength}"},
        },
        interventions=[
            _opposite(plan, number, one, strength)
            for number, one in enumerate(plan.interventions, start=1)
        ],
    )
    if layers is not None:
        check_shape(inverse, layers)
    return inverse


def _opposite(
    plan: SteeringPlan, number: int, one: Intervention, strength: Literal["max", "natural"]
) -> Intervention:
    where: dict[str, Any] = one.model_dump(include=_SCOPE)
    where["experts"] = one.experts
    if isinstance(one, Mask):
        return Intervention(action="force", strength=strength, **where)
    if isinstance(one, Force):
        return Intervention(action="mask", mode="replace", via="min", **where)
    if isinstance(one, Bias):
        return one.model_copy(update={"value": -one.value if one.value else 0.0})
    if isinstance(one, Scale):
        factor = 1 / one.value if one.value else math.inf
        if math.isfinite(factor):
            return one.model_copy(update={"value": factor})
    raise PlanError(
        f"{plan.title} has no opposite: intervention {number} is {one.setting}, and only mask, "
        "force, bias, and scale by more than 0 can be turned around"
    )


def _origin(plan: SteeringPlan) -> dict[str, Any]:
    return {"name": plan.name, "plan_id": plan.plan_id, "provenance": dict(plan.provenance)}


def _merged(
    interventions: Sequence[Intervention], layers: Sequence[RoutedLayer]
) -> list[Intervention]:
    """One intervention per layer and setting with all its experts, in order of appearance."""
    merged: dict[Any, tuple[Intervention, RoutedLayer, set[int]]] = {}
    for one, router in _by_router(interventions, layers):
        prompts = None if one.prompt_ids is None else frozenset(one.prompt_ids)
        key = (one.model_dump_json(exclude=_PLACE), router.layer, router.kind, prompts)
        _, _, experts = merged.setdefault(key, (one, router, set()))
        experts.update(one.experts)
    several = {
        router.layer for router in layers if sum(o.layer == router.layer for o in layers) > 1
    }
    return [
        one.model_copy(
            update={
                "layer": router.layer,
                "layers": None,
                "kind": router.kind if router.layer in several or one.kind is not None else None,
            }
            | ({"experts": tuple(sorted(experts))} if experts else {})
        )
        for one, router, experts in merged.values()
    ]


def _by_router(
    interventions: Sequence[Intervention], layers: Sequence[RoutedLayer]
) -> Iterator[tuple[Intervention, RoutedLayer]]:
    whole = SteeringPlan(interventions=interventions)
    for number, one in enumerate(interventions, start=1):
        for router in layers_of(whole, number, layers):
            yield one, router


def _any_layers(interventions: Sequence[Intervention]) -> list[RoutedLayer]:
    """Routers that have room for whatever the plans ask."""
    kinds: dict[int, set[str]] = {}
    for one in interventions:
        for layer in one.on_layers:
            kinds.setdefault(layer, set()).update(() if one.kind is None else (one.kind,))
    return [
        LayerShape(layer, kind, 2 * _MANY, _MANY)
        for layer, found in sorted(kinds.items())
        for kind in sorted(found or {"mlp"})
    ]
