"""Whether a plan can be carried out on a model's layers: everything refused before it runs.

Refused: a layer or an expert that is not there, a router whose rule is not verified, and for any
kind of token an expert in two opposite or differently set actions, more than k experts forced, or
fewer than k left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from moescope.probe.errors import PlanError
from moescope.steering.plan import (
    FirstGenerated,
    Force,
    Intervention,
    Mask,
    SteeringPlan,
    TokenScope,
)


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
        found = layer_of(plan, number, layers)
        if not found.verified:
            raise PlanError(
                f"{_place(plan, number, intervention)}: the router of layer {found.layer} can be "
                f"recorded but not steered: {found.reason}"
            )


def check_shape(plan: SteeringPlan, layers: Sequence[RoutedLayer]) -> None:
    """The part of `check` that needs no live model: layers, experts, k and contradictions."""
    planned: dict[tuple[int, str], list[int]] = defaultdict(list)
    for number, intervention in enumerate(plan.interventions, start=1):
        found = layer_of(plan, number, layers)
        beyond = [expert for expert in intervention.experts if expert >= found.num_experts]
        if beyond:
            raise PlanError(
                f"{_place(plan, number, intervention)}: layer {found.layer} has no expert "
                f"{beyond[0]}; its experts are 0-{found.num_experts - 1}"
            )
        planned[found.layer, found.kind].append(number)
    for (layer, kind), numbers in planned.items():
        found = next(one for one in layers if (one.layer, one.kind) == (layer, kind))
        for moment in _moments(plan, numbers):
            _check_moment(plan, found, numbers, moment)


def layer_of(plan: SteeringPlan, number: int, layers: Iterable[AnyLayer]) -> AnyLayer:
    """The layer on which the plan's intervention (counted from 1) acts.

    Raises:
        PlanError: no such router, or more than one where the intervention does not say which.
    """
    intervention = plan.interventions[number - 1]
    layers = list(layers)
    here = [found for found in layers if found.layer == intervention.layer]
    place = _place(plan, number, intervention)
    if not here:
        raise PlanError(
            f"{place}: layer {intervention.layer} has no router; the routed layers are "
            f"{_ranges(found.layer for found in layers)}"
        )
    kinds = ", ".join(sorted(found.kind for found in here))
    chosen = [found for found in here if intervention.kind in (None, found.kind)]
    if not chosen:
        raise PlanError(
            f"{place}: layer {intervention.layer} has no router of kind {intervention.kind!r}; "
            f"it has {kinds}"
        )
    if len(chosen) > 1:
        raise PlanError(
            f"{place}: layer {intervention.layer} has several routers ({kinds}); name one in "
            "field 'kind'"
        )
    return chosen[0]


@dataclass(frozen=True)
class _Moment:
    """A kind of token that every scope of a layer either covers or does not.

    `generated` counts generated tokens from 0 and is None for prompt tokens.
    """

    words: str
    is_last_prompt: bool = False
    generated: int | None = None

    def within(self, scope: TokenScope) -> bool:
        if isinstance(scope, FirstGenerated):
            return self.generated is not None and self.generated < scope.first_generated
        if scope == "prompt":
            return self.generated is None
        if scope == "generated":
            return self.generated is not None
        return scope == "all" or self.is_last_prompt


def _moments(plan: SteeringPlan, numbers: Sequence[int]) -> list[_Moment]:
    """One representative for every set of tokens that these interventions tell apart."""
    scopes = [plan.interventions[number - 1].tokens for number in numbers]
    ends = {scope.first_generated for scope in scopes if isinstance(scope, FirstGenerated)}
    return [
        _Moment("prompt tokens"),
        _Moment("the last prompt token", is_last_prompt=True),
        *(
            _Moment(f"generated tokens from number {first + 1}", generated=first)
            for first in sorted({0, *ends})
        ),
    ]


def _check_moment(
    plan: SteeringPlan, found: RoutedLayer, numbers: Sequence[int], moment: _Moment
) -> None:
    treated: dict[int, int] = {}
    forced: set[int] = set()
    masked: set[int] = set()
    for number in numbers:
        intervention = plan.interventions[number - 1]
        if not moment.within(intervention.tokens):
            continue
        for expert in intervention.experts:
            other = plan.interventions[treated.setdefault(expert, number) - 1]
            if other.setting != intervention.setting:
                raise PlanError(
                    f"{_place(plan, number, intervention)}: on {moment.words}, expert {expert} of "
                    f"layer {found.layer} is asked for {intervention.setting} here and for "
                    f"{other.setting} in intervention {treated[expert]}; keep one"
                )
        if isinstance(intervention, Force):
            forced.update(intervention.experts)
        if isinstance(intervention, Mask):
            masked.update(intervention.experts)
    _check_counts(plan, found, moment, num_forced=len(forced), num_masked=len(masked))


def _check_counts(
    plan: SteeringPlan, found: RoutedLayer, moment: _Moment, *, num_forced: int, num_masked: int
) -> None:
    where = f"{_quoted(plan)}, layer {found.layer}: on {moment.words}"
    if num_forced > found.top_k:
        raise PlanError(
            f"{where}, {num_forced} experts are forced, but only {found.top_k} are selected per "
            f"token; force at most {found.top_k}"
        )
    left = found.num_experts - num_masked
    if left < found.top_k:
        raise PlanError(
            f"{where}, {num_masked} of {found.num_experts} experts are masked and {left} left, "
            f"but {found.top_k} are selected per token; mask at most "
            f"{found.num_experts - found.top_k}"
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
