"""Whether a plan can be carried out on a model's layers: everything refused before it runs.

Refused: a layer or an expert that is not there, a router whose rule is not verified, a number of
experts that a family cannot take, and for any kind of token an expert in two opposite or
differently set actions, two numbers of experts, anything beside a replay, more than k experts
forced, or fewer than k left (but by masks that fill up).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from moescope.probe.errors import PlanError
from moescope.steering.plan import (
    Bias,
    FirstGenerated,
    Force,
    Intervention,
    Mask,
    Replay,
    Scale,
    SteeringPlan,
    TokenScope,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from moescope.kernels.route import RoutingRule


class RoutedLayer(Protocol):
    """What a plan needs to know of one router; a live model's `LayerInfo` has it."""

    @property
    def layer(self) -> int:
        """Decoder layer index."""

    @property
    def kind(self) -> str:
        """Which router of that layer: `mlp`, `attention`, ..."""

    @property
    def num_experts(self) -> int:
        """Routed experts E."""

    @property
    def top_k(self) -> int:
        """Experts selected per token, K."""


class CheckedLayer(RoutedLayer, Protocol):
    """A router of a live model that was proved to be read right, or was not."""

    @property
    def verified(self) -> bool:
        """Whether the attach-time checks passed."""

    @property
    def reason(self) -> str | None:
        """Why not."""


class RuledLayer(RoutedLayer, Protocol):
    """A router with its selection rule."""

    @property
    def rule(self) -> RoutingRule:
        """How it selects."""


@dataclass(frozen=True)
class LayerShape:
    """A routed layer known without its model, for example from a store."""

    layer: int
    kind: str
    num_experts: int
    top_k: int


AnyLayer = TypeVar("AnyLayer", bound=RoutedLayer)


def check(plan: SteeringPlan, layers: Sequence[CheckedLayer]) -> None:
    """Refuse what cannot be done on these layers.

    Args:
        plan: what is asked for.
        layers: the routed layers of the model, verified or not.

    Raises:
        PlanError: naming plan, intervention, and what would be right.
    """
    check_shape(plan, layers)
    for number, intervention in enumerate(plan.interventions, start=1):
        for found in layers_of(plan, number, layers):
            if not found.verified:
                raise PlanError(
                    f"{_place(plan, number, intervention)}: the router of layer {found.layer} can "
                    f"be recorded but not steered: {found.reason}"
                )


def check_rules(plan: SteeringPlan, layers: Sequence[RuledLayer]) -> None:
    """Refuse numbers of experts that a family cannot take.

    Raises:
        PlanError: naming plan, intervention and the reason.
    """
    for number, intervention in enumerate(plan.interventions, start=1):
        if not isinstance(intervention, TopK | TopP):
            continue
        for found in layers_of(plan, number, layers):
            place = f"{_place(plan, number, intervention)}: layer {found.layer}"
            if found.rule.capacity is not None:
                raise PlanError(
                    f"{place} sends each token to exactly one expert, up to the expert's capacity; "
                    "its number of experts cannot be changed"
                )
            is_more = isinstance(intervention, TopK) and intervention.value > found.top_k
            if found.kind == "attention" and is_more:
                raise PlanError(
                    f"{place} has attention experts, {found.top_k} query heads for each token; "
                    f"no token can use more than {found.top_k}"
                )


def check_shape(plan: SteeringPlan, layers: Sequence[RoutedLayer]) -> None:
    """The part of `check` that needs no live model: layers, experts, k and contradictions."""
    planned: dict[tuple[int, str], list[int]] = defaultdict(list)
    for number, intervention in enumerate(plan.interventions, start=1):
        for found in layers_of(plan, number, layers):
            beyond = [expert for expert in intervention.experts if expert >= found.num_experts]
            if beyond:
                raise PlanError(
                    f"{_place(plan, number, intervention)}: layer {found.layer} has no expert "
                    f"{beyond[0]}; its experts are 0-{found.num_experts - 1}"
                )
            if isinstance(intervention, TopK) and intervention.value > found.num_experts:
                raise PlanError(
                    f"{_place(plan, number, intervention)}: layer {found.layer} has "
                    f"{found.num_experts} experts, so no token can use {intervention.value}"
                )
            planned[found.layer, found.kind].append(number)
    for (layer, kind), numbers in planned.items():
        found = next(one for one in layers if (one.layer, one.kind) == (layer, kind))
        for moment in _moments(plan, numbers):
            _check_moment(plan, found, numbers, moment)


def layers_of(plan: SteeringPlan, number: int, layers: Iterable[AnyLayer]) -> list[AnyLayer]:
    """The layers on which the plan's intervention (counted from 1) acts, in its order.

    Raises:
        PlanError: no such router, or more than one where the intervention does not say which.
    """
    layers = list(layers)
    intervention = plan.interventions[number - 1]
    return [_router(plan, number, layer, layers) for layer in intervention.on_layers]


def _router(plan: SteeringPlan, number: int, layer: int, layers: Sequence[AnyLayer]) -> AnyLayer:
    intervention = plan.interventions[number - 1]
    here = [found for found in layers if found.layer == layer]
    place = _place(plan, number, intervention)
    if not here:
        raise PlanError(
            f"{place}: layer {layer} has no router; the routed layers are "
            f"{_ranges(found.layer for found in layers)}"
        )
    kinds = ", ".join(sorted(found.kind for found in here))
    chosen = [found for found in here if intervention.kind in (None, found.kind)]
    if not chosen:
        raise PlanError(
            f"{place}: layer {layer} has no router of kind {intervention.kind!r}; it has {kinds}"
        )
    if len(chosen) > 1:
        raise PlanError(
            f"{place}: layer {layer} has several routers ({kinds}); name one in field 'kind'"
        )
    return chosen[0]


@dataclass(frozen=True)
class _Moment:
    """A kind of token that every scope of a layer either covers or does not.

    `generated` counts generated tokens from 0 and is None for prompt tokens; `prompt` is the id of
    a prompt that some intervention names, None for all others.
    """

    words: str
    is_last_prompt: bool = False
    generated: int | None = None
    prompt: int | None = None

    def within(self, intervention: Intervention) -> bool:
        named = intervention.prompt_ids
        return (named is None or self.prompt in named) and self._within(intervention.tokens)

    def _within(self, scope: TokenScope) -> bool:
        if isinstance(scope, FirstGenerated):
            return self.generated is not None and self.generated < scope.first_generated
        if scope == "prompt":
            return self.generated is None
        if scope == "generated":
            return self.generated is not None
        return scope == "all" or self.is_last_prompt


def _moments(plan: SteeringPlan, numbers: Sequence[int]) -> list[_Moment]:
    """One representative for every set of tokens that these interventions tell apart."""
    chosen = [plan.interventions[number - 1] for number in numbers]
    scopes = [one.tokens for one in chosen]
    ends = {scope.first_generated for scope in scopes if isinstance(scope, FirstGenerated)}
    moments = [
        _Moment("prompt tokens"),
        _Moment("the last prompt token", is_last_prompt=True),
        *(
            _Moment(f"generated tokens from number {first + 1}", generated=first)
            for first in sorted({0, *ends})
        ),
    ]
    named = [set(one.prompt_ids) for one in chosen if one.prompt_ids is not None]
    by_membership = {
        tuple(prompt in ids for ids in named): prompt for prompt in sorted(set().union(*named))
    }
    return moments + [
        replace(moment, words=f"{moment.words} of prompt {prompt}", prompt=prompt)
        for prompt in by_membership.values()
        for moment in moments
    ]


#: What an action decides about an expert: whether it is chosen, its weight, or both.
_DECIDES: dict[type[Intervention], tuple[str, ...]] = {
    Mask: ("choice", "weight"),
    Force: ("choice",),
    Bias: ("choice",),
    Scale: ("weight",),
}


def _check_moment(
    plan: SteeringPlan, found: RoutedLayer, numbers: Sequence[int], moment: _Moment
) -> None:
    here = [
        (number, plan.interventions[number - 1])
        for number in numbers
        if moment.within(plan.interventions[number - 1])
    ]
    _check_experts(plan, found, here, moment)
    _check_router(plan, found, here, moment)
    forced: set[int] = set()
    masked: set[int] = set()
    for _, one in here:
        if isinstance(one, Force):
            forced.update(one.experts)
        if isinstance(one, Mask) and one.mode == "replace" and not one.fill_up:
            masked.update(one.experts)
    per_token = next((one.value for _, one in here if isinstance(one, TopK)), found.top_k)
    if any(isinstance(one, TopP) for _, one in here):
        # Forced experts are taken whatever their probability, so only masks can take all.
        per_token = max(1, len(forced))
    _check_counts(plan, found, moment, per_token, num_forced=len(forced), num_masked=len(masked))


def _check_experts(
    plan: SteeringPlan,
    found: RoutedLayer,
    here: Sequence[tuple[int, Intervention]],
    moment: _Moment,
) -> None:
    """No expert may be asked for two things that exclude each other."""
    decided: dict[tuple[int, str], int] = {}
    for number, one in here:
        for expert in one.experts:
            for what in _DECIDES[type(one)]:
                first = decided.setdefault((expert, what), number)
                if first == number:
                    continue
                other = plan.interventions[first - 1]
                adds_up = isinstance(one, Bias | Scale)
                if other.setting != one.setting or adds_up:
                    raise PlanError(
                        f"{_place(plan, number, one)}: on {moment.words}, expert {expert} of layer "
                        f"{found.layer} is asked for {one.setting} here and for {other.setting} in "
                        f"intervention {first}; keep one"
                    )


def _check_router(
    plan: SteeringPlan,
    found: RoutedLayer,
    here: Sequence[tuple[int, Intervention]],
    moment: _Moment,
) -> None:
    """One number of experts per token, and nothing beside a replay."""
    for first, other in here:
        for number, one in here:
            if number <= first:
                continue
            is_number = isinstance(one, TopK | TopP) and isinstance(other, TopK | TopP)
            if is_number or isinstance(one, Replay) or isinstance(other, Replay):
                raise PlanError(
                    f"{_place(plan, number, one)}: on {moment.words}, layer {found.layer} is asked "
                    f"for {one.setting} here and for {other.setting} in intervention {first}; keep "
                    "one"
                )


def _check_counts(
    plan: SteeringPlan,
    found: RoutedLayer,
    moment: _Moment,
    per_token: int,
    *,
    num_forced: int,
    num_masked: int,
) -> None:
    where = f"{_quoted(plan)}, layer {found.layer}: on {moment.words}"
    if num_forced > per_token:
        raise PlanError(
            f"{where}, {num_forced} experts are forced, but only {per_token} are selected per "
            f"token; force at most {per_token}"
        )
    left = found.num_experts - num_masked
    if left < per_token:
        raise PlanError(
            f"{where}, {num_masked} of {found.num_experts} experts are masked and {left} left, "
            f"but {per_token} are selected per token; mask at most "
            f"{found.num_experts - per_token}"
        )


def _place(plan: SteeringPlan, number: int, intervention: Intervention) -> str:
    return f"{_quoted(plan)}, intervention {number} ({intervention.action})"


def _quoted(plan: SteeringPlan) -> str:
    return f"plan {plan.name!r}" if plan.name else plan.title


def _ranges(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
