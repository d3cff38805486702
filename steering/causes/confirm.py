"""A found set confirmed on units that had no part in the search, beside random sets of its shape.

The effect is the change of the aim's loss when the whole set is taken out, paired by prompt, with a
bootstrap interval over units. A random set has as many experts in each layer, none of them of the
found set. The set is confirmed when the interval keeps clear of 0 on the side sought, no random set
does as much, and the cost on neutral prompts keeps to the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.probe.analysis.statistics import split_halves
from moescope.probe.models import ModelBundle
from moescope.probe.routers import find_routers
from moescope.steering.apply import steer
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.search import Aim
from moescope.steering.derive import random_plan
from moescope.steering.plan import SteeringPlan
from moescope.steering.rates import mean_over_units


@dataclass(frozen=True)
class Confirmed:
    """A set on held-out units.

    Attributes:
        change: of the aim's loss, mean over prompts, in the target's unit.
        low, high: 95 % bootstrap interval over units; None with fewer than two.
        random: the same of each random set.
        cost: rise of the cost's loss; None without one.
        n: prompts; num_units: units.
        is_confirmed: whether the set passed.
        reason: in a sentence.
    """

    change: float
    low: float | None
    high: float | None
    random: tuple[float, ...]
    cost: float | None
    n: int
    num_units: int
    is_confirmed: bool
    reason: str

    def in_words(self) -> str:
        """The confirmation as a line."""
        word = "confirmed" if self.is_confirmed else "not confirmed"
        interval = "" if self.low is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        band = f"{min(self.random):+.3f} to {max(self.random):+.3f}" if self.random else "none"
        cost = "" if self.cost is None else f"; cost on neutral prompts {self.cost:+.4f}"
        return (
            f"{word} on {self.n} prompts ({self.num_units} units) kept apart: loss "
            f"{self.change:+.3f}{interval}, {len(self.random)} random sets {band}{cost}; "
            f"{self.reason}"
        )


def confirm_set(
    bundle: ModelBundle,
    plan: SteeringPlan,
    aim: Aim,
    units: Sequence[str],
    cost: Aim | None,
    *,
    budget: float,
    num_random: int = 20,
    seed: int = 0,
    tokens_per_batch: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Confirmed:
    """Measure a plan on held-out prompts beside random plans of its shape.

    Args:
        bundle: model and tokenizer, unsteered.
        plan: that takes the set out.
        aim: the aim on held-out prompts.
        units: of each of them.
        cost: the cost's aim on held-out neutral prompts.
        budget: that the cost's loss may rise by.
        num_random: random sets, with seeds `seed`, `seed + 1`, ...
        seed: of these, and of the bootstrap.
        tokens_per_batch: padded tokens a forward may hold.
        progress: called with (plans measured, plans in all).
    """

    def losses(of: Aim, under: SteeringPlan) -> NDArray[np.float64]:
        with steer(bundle.model, under):
            values = measure_target(bundle, of.rows, of.rendered, tokens_per_batch=tokens_per_batch)
        return of.loss(values[:, None])

    nothing = SteeringPlan(interventions=[])
    before = losses(aim, nothing)
    changes = losses(aim, plan) - before
    mean, low, high = mean_over_units(changes.tolist(), units, seed)
    infos = [site.info for site in find_routers(bundle.model)]
    random: list[float] = []
    for number in range(num_random):
        control = random_plan(plan, infos, seed + number)
        random.append(float((losses(aim, control) - before).mean()))
        if progress is not None:
            progress(number + 1, num_random)
    rise = None
    if cost is not None:
        rise = float((losses(cost, plan) - losses(cost, nothing)).mean())
    is_confirmed, reason = _judge(mean, high, random, rise, budget)
    return Confirmed(
        mean, low, high, tuple(random), rise, len(changes), len(set(units)), is_confirmed, reason
    )


def halves_of_units(
    units: Sequence[str], strata: Sequence[str | None], seed: int = 0
) -> NDArray[np.bool_]:
    """Which prompts belong to the discovery half: whole units, balanced over strata, bool[P].

    Args:
        units: of each prompt.
        strata: of each prompt (its label, say); a unit's is that of its first prompt.
        seed: of the split.
    """
    names, first_U, unit_P = np.unique(
        np.asarray(units, dtype=object).astype(str), return_index=True, return_inverse=True
    )
    labels = np.asarray(["" if one is None else one for one in strata])[first_U]
    _, stratum_U = np.unique(labels, return_inverse=True)
    del names
    is_first_U = split_halves(stratum_U.astype(np.int64), np.random.default_rng(seed))
    found: NDArray[np.bool_] = is_first_U[unit_P]
    return found


def _judge(
    change: float, high: float | None, random: Sequence[float], rise: float | None, budget: float
) -> tuple[bool, str]:
    if high is None or high >= 0:
        return False, "the change is within chance"
    if not random:
        return False, "there is no random set to compare with"
    if min(random) <= change:
        return False, "a random set does as much"
    if rise is not None and rise > budget:
        return False, f"it costs more than the budget of {budget:g}"
    kept = "without a budget to keep to" if rise is None else "within the budget"
    return True, f"no random set does as much, {kept}"
