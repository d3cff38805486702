"""How estimated effects rank against exact ones, on a sample of experts.

An estimate is worth what its agreement is: first-order effects ranked .46 to .66 with exact ones
over all experts of small trained models. So a few experts are taken out for real, one at a time,
and the rank correlation says whether the estimate's order may be trusted.

Letters: N experts of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.probe.analysis.statistics import rank_correlation
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.steering.apply import steer
from moescope.steering.causes.attribution import Attribution
from moescope.steering.causes.keys import ExpertKey, Mode
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.targets import TargetRow
from moescope.steering.plan import Intervention, SteeringPlan

#: Two-sided 95 % of the normal distribution.
_Z = 1.959964


@dataclass(frozen=True, eq=False)
class Agreement:
    """Estimates beside exact effects, both means over the same prompts.

    Attributes:
        experts: the N experts of the sample.
        estimates: float64[N].
        exact: float64[N].
        spearman: their rank correlation; NaN with fewer than 2 experts, or where all of one side
            are alike.
        low, high: its 95 % interval over experts (Fisher's z with the variance of Bonett and
            Wright, 2000, Psychometrika 65, 23-28); NaN with fewer than 4.
        same_sign: share of the experts whose exact effect is not 0 with the estimate's sign; NaN
            where there is none.
        num_prompts: prompts behind each effect.
        seed: of the sample.
    """

    experts: tuple[ExpertKey, ...]
    estimates: NDArray[np.float64]
    exact: NDArray[np.float64]
    spearman: float
    low: float
    high: float
    same_sign: float
    num_prompts: int
    seed: int

    @property
    def n(self) -> int:
        """N."""
        return len(self.experts)

    def __str__(self) -> str:
        if math.isnan(self.spearman):
            return f"no rank correlation to exact effects ({self.n} experts with an estimate)"
        ends = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return (
            f"rank correlation to exact effects {self.spearman:.2f}{ends}, n = {self.n} experts, "
            f"{self.num_prompts} prompts"
        )


def measure_agreement(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    attribution: Attribution,
    *,
    mode: Mode,
    base_plan: SteeringPlan | None = None,
    num_experts: int = 24,
    seed: int = 0,
    tokens_per_batch: int = 1024,
) -> Agreement:
    """Take a sample of experts out for real, one forward of all rows each.

    Args:
        bundle: model and tokenizer.
        rows: the target's.
        rendered: the prompts.
        attribution: the estimates, on the same rows.
        mode: how the estimates take experts out.
        base_plan: under which they were made.
        num_experts: of the sample; fewer where fewer have an estimate.
        seed: of the sample.
        tokens_per_batch: padded tokens a forward may hold.
    """
    means_X = attribution.means
    base = base_plan or SteeringPlan()
    free_X = np.array([not _named_by(base, key) for key in attribution.experts])
    chosen = stratified(np.where(free_X, means_X, 0.0), num_experts, seed)
    baseline = float(attribution.baseline.mean())
    exact = np.zeros(len(chosen))
    for at, index in enumerate(chosen):
        plan = without(base, attribution.experts[index], mode)
        with steer(bundle.model, plan):
            values = measure_target(bundle, rows, rendered, tokens_per_batch=tokens_per_batch)
        exact[at] = values.mean() - baseline
    keys = tuple(attribution.experts[index] for index in chosen)
    return compared(keys, means_X[chosen], exact, len(rendered), seed)


def compared(
    experts: tuple[ExpertKey, ...],
    estimates: NDArray[np.float64],
    exact: NDArray[np.float64],
    num_prompts: int,
    seed: int = 0,
) -> Agreement:
    """Rank correlation of estimates and exact effects of the same experts, with its interval."""
    count = len(experts)
    varied = count >= 2 and len(set(estimates)) > 1 and len(set(exact)) > 1
    found = rank_correlation(estimates, exact) if varied else math.nan
    low, high = rank_interval(found, count)
    there = exact != 0
    same = float((np.sign(estimates) == np.sign(exact))[there].mean()) if there.any() else math.nan
    return Agreement(experts, estimates, exact, found, low, high, same, num_prompts, seed)


def rank_interval(spearman: float, count: int) -> tuple[float, float]:
    """95 % interval of a rank correlation over `count` pairs; NaN with fewer than 4.

    Fisher's z with variance (1 + r^2 / 2) / (n - 3): Bonett and Wright (2000).
    """
    if math.isnan(spearman) or count < 4:
        return math.nan, math.nan
    middle = math.atanh(min(max(spearman, -0.999999), 0.999999))
    half = _Z * math.sqrt((1 + spearman**2 / 2) / (count - 3))
    return math.tanh(middle - half), math.tanh(middle + half)


def stratified(means_X: NDArray[np.float64], number: int, seed: int) -> NDArray[np.int64]:
    """Indices of experts over the whole ranking: one drawn from each of `number` equal parts of it.

    Experts whose estimate is 0 (no prompt selects them) are left out: they would agree for free.
    """
    ranked = np.argsort(means_X, kind="stable")
    ranked = ranked[means_X[ranked] != 0]
    rng = np.random.default_rng(seed)
    parts = np.array_split(ranked, min(number, len(ranked))) if len(ranked) else []
    return np.array([int(rng.choice(part)) for part in parts], dtype=np.int64)


def without(base: SteeringPlan, key: ExpertKey, mode: Mode) -> SteeringPlan:
    """The base plan with one expert taken out besides."""
    mask = Intervention(
        action="mask", layer=key.layer, kind=key.kind, experts=[key.expert], mode=mode
    )
    return SteeringPlan(
        name=f"without expert {key.expert} of layer {key.layer}",
        interventions=[*base.interventions, mask],
    )


def _named_by(plan: SteeringPlan, key: ExpertKey) -> bool:
    """Whether the plan acts on this expert, so that taking it out as well could contradict it."""
    return any(
        key.layer in one.on_layers and key.expert in one.experts and one.kind in (None, key.kind)
        for one in plan.interventions
    )
