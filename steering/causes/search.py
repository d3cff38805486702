"""A set of experts that causes a behavior, found under a stated budget of side effects.

Experts back each other up, so single effects do not add up, and a ranking of them, followed far
enough, breaks the language. The search asks anew after each step: with the experts taken out that
were chosen so far, a one-pass attribution (`attribution`) estimates what each other expert would
do; the best few are measured exactly (`ablation`), and the best of these that keeps the cost within
the budget joins. With `beam` several sets are carried on side by side; with `group` several experts
join at once between two attributions. At the end, members that are no longer needed leave.

What is pursued is an `Aim`: a target lowered or raised on some prompts, and no further than to a
`bound`, so that prompts that are won already do not hide those that are not. The cost is another
aim's target on neutral prompts, which must not move.

Letters: X experts, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.probe.errors import PlanError
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import LayerInfo, find_routers
from moescope.steering.apply import steer
from moescope.steering.causes.ablation import scan
from moescope.steering.causes.attribution import attribute
from moescope.steering.causes.keys import ExpertKey, Mode
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.targets import TargetRow
from moescope.steering.plan import SteeringPlan

FloatArray = NDArray[np.float64]
#: Told what is being done, steps done, steps at most.
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Aim:
    """A target to move on some prompts.

    Attributes:
        rows: of the target, from `target_rows`.
        rendered: the prompts.
        direction: where it should go.
        bound: as far as a prompt's value counts; further is no better. Infinite on the side of the
            direction for no bound.
    """

    rows: Sequence[TargetRow]
    rendered: Sequence[RenderedPrompt]
    direction: Literal["lower", "raise"] = "lower"
    bound: float = -np.inf

    def loss(self, values: FloatArray) -> FloatArray:
        """What is left to do, mean over prompts, in the target's unit; [...] of float64[..., P]."""
        sign, bound = (1.0, self.bound) if self.direction == "lower" else (-1.0, -self.bound)
        found: FloatArray = np.maximum(sign * values, bound).mean(-1)
        return found


@dataclass(frozen=True)
class Step:
    """One expert's joining.

    Attributes:
        expert: layer, kind and expert.
        estimate: of the change of the loss, by attribution.
        change: of the loss, exact, with those chosen before taken out.
        loss: of the aim after it.
        cost: of the whole set after it, in the cost target's unit.
        num_tried: experts that were measured exactly for this step.
    """

    expert: ExpertKey
    estimate: float
    change: float
    loss: float
    cost: float
    num_tried: int


@dataclass(frozen=True)
class FoundSet:
    """What a search found, on the prompts that it searched on.

    Attributes:
        steps: in the order of joining; those that left at the end are not among them.
        left: experts that joined and were not needed at the end.
        loss_before, loss: of the aim without and with the set taken out.
        cost: of the set.
        mode: how experts are taken out.
        budget: that the cost had to keep to.
    """

    steps: tuple[Step, ...]
    left: tuple[ExpertKey, ...]
    loss_before: float
    loss: float
    cost: float
    mode: Mode
    budget: float

    @property
    def experts(self) -> tuple[ExpertKey, ...]:
        """The set."""
        return tuple(one.expert for one in self.steps)

    def plan(
        self,
        *,
        name: str | None = None,
        model: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> SteeringPlan:
        """The set as a plan that takes all of it out.

        Raises:
            PlanError: nothing was found.
        """
        if not self.steps:
            raise PlanError("no expert was found that helps within the budget: there is no plan")
        found = {
            "method": "conditional search", "loss_before": self.loss_before, "loss": self.loss,
            "cost": self.cost, "budget": self.budget,
            "effects": [
                {"layer": one.expert[0], "expert": one.expert[2], "effect": one.change}
                for one in self.steps
            ],
        }  # fmt: skip
        made = removal_plan(self.experts, self.mode)
        return SteeringPlan(
            name=name, model=model, provenance={**(provenance or {}), **found},
            interventions=made.interventions,
        )  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """One row per step: step, layer, kind, expert, estimate, change, loss, cost, num_tried."""
        return pd.DataFrame(
            [
                (number, *one.expert, one.estimate, one.change, one.loss, one.cost, one.num_tried)
                for number, one in enumerate(self.steps, start=1)
            ],
            columns=["step", "layer", "kind", "expert", "estimate", "change", "loss", "cost",
                     "num_tried"],
        )  # fmt: skip


@dataclass(frozen=True)
class _Candidate:
    """A set on its way."""

    steps: tuple[Step, ...]
    values: FloatArray
    cost_values: FloatArray | None
    loss: float
    cost: float

    @property
    def experts(self) -> tuple[ExpertKey, ...]:
        return tuple(one.expert for one in self.steps)


def search_set(
    bundle: ModelBundle,
    aim: Aim,
    cost: Aim | None,
    *,
    max_experts: int,
    budget: float = 0.05,
    mode: Mode = "replace",
    num_exact: int = 8,
    beam: int = 1,
    group: int = 1,
    least_gain: float = 0.01,
    tokens_per_batch: int = 1024,
    told: Told | None = None,
) -> FoundSet:
    """Search for a set of experts to take out.

    Args:
        bundle: model and tokenizer, unsteered.
        aim: what to move, and on which prompts.
        cost: what must not move, on neutral prompts: its loss may rise by `budget` and no more;
            None for no budget.
        max_experts: the set's largest size.
        budget: in the cost target's unit.
        mode: how experts are taken out, as for the action `mask`.
        num_exact: experts measured exactly in each step, those with the best estimates.
        beam: sets carried on side by side.
        group: experts that join between two attributions.
        least_gain: a step that lowers the loss by less than this share of what it was ends it.
        tokens_per_batch: padded tokens a forward may hold.
        told: told about progress.

    Raises:
        PlanError: a number that makes no sense.
    """
    for name, number in (("max_experts", max_experts), ("num_exact", num_exact), ("beam", beam),
                         ("group", group)):  # fmt: skip
        if number < 1:
            raise PlanError(f"{name} is {number}; it must be at least 1")
    searcher = _Searcher(bundle, aim, cost, mode, budget, num_exact, group, tokens_per_batch)
    start = searcher.start()
    wait = least_gain * abs(start.loss)
    carried, best = [start], start
    while carried and len(carried[0].steps) < max_experts:
        if told is not None:
            told(f"loss {best.loss:.3f}, cost {best.cost:.4f}", len(carried[0].steps), max_experts)
        grown: dict[frozenset[ExpertKey], _Candidate] = {}
        for one in carried:
            room = max_experts - len(one.steps)
            for longer in searcher.grown(one, min(group, room), beam):
                if one.loss - longer.loss > wait:
                    grown.setdefault(frozenset(longer.experts), longer)
        carried = sorted(grown.values(), key=lambda one: one.loss)[:beam]
        if carried and carried[0].loss < best.loss:
            best = carried[0]
    kept, left = searcher.pruned(best, wait)
    return FoundSet(kept.steps, left, start.loss, kept.loss, kept.cost, mode, budget)


class _Searcher:
    """What a search asks the model."""

    def __init__(
        self, bundle: ModelBundle, aim: Aim, cost: Aim | None, mode: Mode, budget: float,
        num_exact: int, group: int, tokens_per_batch: int,
    ) -> None:  # fmt: skip
        self.bundle = bundle
        self.aim = aim
        self.cost = cost
        self.mode: Mode = mode
        self.budget = budget
        self.num_exact = num_exact
        self.tokens_per_batch = tokens_per_batch
        self.sites = find_routers(bundle.model)
        self._infos: dict[tuple[int, str], LayerInfo] = {
            (site.info.layer, site.info.kind): site.info for site in self.sites
        }
        self._cost_before = 0.0

    def start(self) -> _Candidate:
        """Nothing taken out."""
        values = self._measured(self.aim, None)
        cost_values = None if self.cost is None else self._measured(self.cost, None)
        if self.cost is not None and cost_values is not None:
            self._cost_before = float(self.cost.loss(cost_values))
        return _Candidate((), values, cost_values, float(self.aim.loss(values)), 0.0)

    def grown(self, one: _Candidate, number: int, width: int) -> list[_Candidate]:
        """The best sets with `number` experts more that keep to the budget, best first."""
        base = removal_plan(one.experts, self.mode) if one.steps else None
        estimate = attribute(
            self.bundle, self.aim.rows, self.aim.rendered, mode=self._estimated_mode,
            base_plan=base, num_checked=0, sites=self.sites,
            tokens_per_batch=self.tokens_per_batch,
        )  # fmt: skip
        gains = one.loss - self.aim.loss(one.values + estimate.values)
        order = [at for at in np.argsort(-gains, kind="stable") if gains[at] > 0]
        chosen = [
            at for at in order if self._has_room(one, estimate.experts[at])
        ][: self.num_exact]  # fmt: skip
        keys: list[ExpertKey] = [estimate.experts[at] for at in chosen]
        if not keys:
            return []
        singles = self._exact(one, keys, dict(zip(keys, -gains[chosen], strict=True)), base)
        singles.sort(key=lambda found: found.loss)
        if number == 1 or len(singles) < 2:
            return singles[:width]
        joined = self._joined(one, singles[:number])
        return [joined, *singles[: width - 1]] if joined is not None else singles[:width]

    def pruned(self, one: _Candidate, wait: float) -> tuple[_Candidate, tuple[ExpertKey, ...]]:
        """Without the members that the others do not need, the least needed first."""
        left: list[ExpertKey] = []
        while len(one.steps) > 1:
            options = []
            for expert in one.experts:
                steps = tuple(step for step in one.steps if step.expert != expert)
                options.append((expert, self._candidate(steps)))
            expert, shorter = min(options, key=lambda found: found[1].loss)
            if shorter.loss - one.loss > wait or shorter.cost > max(self.budget, one.cost):
                break
            left.append(expert)
            one = shorter
        return one, tuple(left)

    @property
    def _estimated_mode(self) -> Mode:
        return self.mode

    def _exact(
        self, one: _Candidate, keys: list[ExpertKey], estimates: dict[ExpertKey, float],
        base: SteeringPlan | None,
    ) -> list[_Candidate]:  # fmt: skip
        """The set with each of these experts more, measured; those within the budget."""
        values = self._scanned(self.aim, keys, base) + one.values
        costs = None
        if self.cost is not None and one.cost_values is not None:
            costs = self._scanned(self.cost, keys, base) + one.cost_values
        found = []
        for at, key in enumerate(keys):
            loss = float(self.aim.loss(values[at]))
            cost = 0.0
            if self.cost is not None and costs is not None:
                cost = float(self.cost.loss(costs[at])) - self._cost_before
            if cost > self.budget:
                continue
            step = Step(key, estimates[key], loss - one.loss, loss, cost, len(keys))
            found.append(_Candidate(
                (*one.steps, step), values[at], None if costs is None else costs[at], loss, cost
            ))  # fmt: skip
        return found

    def _joined(self, one: _Candidate, singles: Sequence[_Candidate]) -> _Candidate | None:
        """The set with all of these joined, if that keeps to the budget."""
        steps = (*one.steps, *(single.steps[-1] for single in singles))
        for key in {step.expert[:2] for step in steps}:
            taken = sum(step.expert[:2] == key for step in steps)
            if taken > self._infos[key].num_experts - self._infos[key].top_k:
                return None
        joined = self._candidate(steps)
        return joined if joined.cost <= self.budget else None

    def _candidate(self, steps: tuple[Step, ...]) -> _Candidate:
        """A set measured as a whole."""
        plan = removal_plan([step.expert for step in steps], self.mode)
        values = self._measured(self.aim, plan)
        cost, cost_values = 0.0, None
        if self.cost is not None:
            cost_values = self._measured(self.cost, plan)
            cost = float(self.cost.loss(cost_values)) - self._cost_before
        return _Candidate(steps, values, cost_values, float(self.aim.loss(values)), cost)

    def _measured(self, aim: Aim, plan: SteeringPlan | None) -> FloatArray:
        with steer(self.bundle.model, plan or SteeringPlan(interventions=[])):
            return measure_target(
                self.bundle, aim.rows, aim.rendered, tokens_per_batch=self.tokens_per_batch
            )

    def _scanned(
        self, aim: Aim, keys: Sequence[ExpertKey], base: SteeringPlan | None
    ) -> FloatArray:
        """Exact effects of the experts in the order of `keys`, float64[X, P]."""
        found = scan(
            self.bundle, aim.rows, aim.rendered, mode=self.mode, experts=list(keys),
            base_plan=base, tokens_per_batch=self.tokens_per_batch,
        )  # fmt: skip
        index = {key: at for at, key in enumerate(found.experts)}
        effects: FloatArray = found.effects[[index[key] for key in keys]]
        return effects

    def _has_room(self, one: _Candidate, key: ExpertKey) -> bool:
        """Whether the expert is not taken out yet and its router keeps k others."""
        if key in one.experts:
            return False
        info = self._infos[key[:2]]
        return sum(other[:2] == key[:2] for other in one.experts) < info.num_experts - info.top_k


def removal_plan(experts: Sequence[tuple[int, str, int]], mode: Mode) -> SteeringPlan:
    """A plan that takes these experts out."""
    by_router: dict[tuple[int, str], list[int]] = {}
    for layer, kind, expert in experts:
        by_router.setdefault((layer, kind), []).append(expert)
    return SteeringPlan(
        interventions=[
            {
                "action": "mask", "layer": layer, "kind": kind, "mode": mode,
                "experts": sorted(members),
            }
            for (layer, kind), members in sorted(by_router.items())
        ]
    )  # fmt: skip
