"""The strategies of published systems: from a table of experts to the plan that their authors make.

Signs: in every table a positive number means that the first group (set 1, group a, the task) uses
the expert more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Literal, Unpack

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.steering.check import RoutedLayer
from moescope.steering.draft import CommonOptions, Draft
from moescope.steering.plan import SteeringPlan
from moescope.steering.ranked import RankedExpert

STEERMOE: Final = "SteerMoE, arXiv 2509.09660, section 3"
BANDARKAR: Final = "Bandarkar et al., arXiv 2510.04694 (interventions known second-hand)"
MOTE: Final = "MoTE: Dahlke et al., arXiv 2502.11096 (interventions known second-hand)"
RICE: Final = "RICE: Wang et al., arXiv 2505.14681 (known second-hand)"

_DELTA = ("delta", "effect", "score", "risk_difference")


def steermoe(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    num_force: int = 0,
    num_mask: int = 0,
    reverse: bool = False,
    **common: Unpack[CommonOptions],
) -> SteeringPlan:
    """Force what set 1 uses more and mask what set 2 uses more, as SteerMoE does.

    Experts in order of |risk difference|, descending; of those with a positive one the first
    `num_force` are forced to the top (max + 0.01), of those with a negative one the first
    `num_mask` are masked (min - 0.01). A layer forces at most k experts: any further one is left
    out and not replaced, as in the paper, but told. Masks fill up, as in the paper: where they
    leave a layer fewer than k experts, masked ones take the other slots, which is told too.

    `derive.plan_from_contrast` differs: it masks what group a uses more (a is what is to vanish,
    here set 1 is what is wanted), and the next expert takes the place of one that does not fit.

    Args:
        frame: with `risk_difference` or the counts a1, d1, a2, d2; if only confirmed experts
            count, with `effect`.
        layers: the model's routed layers; without them nothing is capped.
        num_force: experts with a positive number to force.
        num_mask: experts with a negative number to mask.
        reverse: flip all signs.
        **common: see `CommonOptions`.

    Raises:
        PlanError: too few experts.
    """
    parameters = {"num_force": num_force, "num_mask": num_mask, "reverse": reverse}
    draft = Draft(
        "steermoe", STEERMOE, frame, layers, parameters, common,
        wanted=("risk_difference", "effect", "score"),
    )  # fmt: skip
    sign = -1 if reverse else 1
    ranked = draft.ranking.by_size()
    words = ("positive", "negative")
    forced = draft.first(
        [one for one in ranked if sign * one.value > 0],
        num_force, "forced", f"with a {words[reverse]} {draft.ranking.column}",
    )  # fmt: skip
    masked = draft.first(
        [one for one in ranked if sign * one.value < 0],
        num_mask, "masked", f"with a {words[not reverse]} {draft.ranking.column}",
    )  # fmt: skip
    draft.tell_filled_up(masked)
    draft.add(draft.at_most_k(forced), action="force", strength="max")
    draft.add(masked, action="mask", mode="replace", via="min", fill_up=True)
    return draft.plan()


def bandarkar_soft(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    tau: float | None = None,
    strength: float = 0.5,
    suppress: bool = False,
    on: Literal["logit", "selection"] = "logit",
    **common: Unpack[CommonOptions],
) -> SteeringPlan:
    """Raise the logits of a task's experts by a share of the token's standard deviation.

    The authors steer middle layers only (`layer_range`); which, is theirs per model, and whether
    their numbers count from 0 is not known to us.

    Args:
        frame: of `delta_experts` (with `value`, where it is split), or any with a number per
            expert.
        layers: the model's routed layers.
        tau: experts with a larger number are taken; by default the rows that the table has as
            `above`. The authors' are 0.25 to 0.5.
        strength: lambda, in standard deviations of the token's logits; over 0. The authors' is
            0.5, of at most 1.
        suppress: also lower the experts below -tau, by as much; needs tau.
        on: `selection` for routers that select by another score than they weight by.
        **common: see `CommonOptions`.

    Raises:
        PlanError: no expert is above tau.
    """
    if not (math.isfinite(strength) and strength > 0):
        raise PlanError(f"strength is {strength:g} standard deviations; it must be over 0")
    parameters = {"tau": tau, "strength": strength, "suppress": suppress, "on": on}
    draft = Draft("bandarkar-soft", BANDARKAR, frame, layers, parameters, common, wanted=_DELTA)
    up, down = _beyond(draft, tau, suppress)
    if strength > 1:
        draft.note("the authors' strength is at most 1 standard deviation")
    draft.add(up, action="bias", value=strength, unit="std", on=on)
    draft.add(down, action="bias", value=-strength, unit="std", on=on)
    return draft.plan()


def bandarkar_hard(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    tau: float | None = None,
    suppress: bool = False,
    **common: Unpack[CommonOptions],
) -> SteeringPlan:
    """Force a task's experts to the top.

    The authors set a logit to the token's largest plus noise drawn from N(0, 1e-6) against ties;
    ours is the largest plus 0.01 for all forced ones alike. They report that more than k forced
    experts of a layer derail generation; experts that find no room are left out and told.

    Args:
        frame: of `delta_experts` (with `value`, where it is split), or any with a number per
            expert.
        layers: the model's routed layers; without them nothing is capped.
        tau: experts with a larger number are taken; by default the rows that the table has as
            `above`.
        suppress: also mask the experts below -tau (min - 0.01); needs tau.
        **common: see `CommonOptions`.

    Raises:
        PlanError: no expert is above tau, or masks leave a token fewer than k.
    """
    parameters = {"tau": tau, "suppress": suppress}
    draft = Draft("bandarkar-hard", BANDARKAR, frame, layers, parameters, common, wanted=_DELTA)
    up, down = _beyond(draft, tau, suppress)
    draft.require_k_left(down)
    draft.add(draft.at_most_k(up), action="force", strength="max")
    draft.add(down, action="mask", mode="replace", via="min")
    return draft.plan()


def mote_suppress(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    num_experts: int = 10,
    **common: Unpack[CommonOptions],
) -> SteeringPlan:
    """Switch off the experts with the largest scores; their slots are not refilled.

    The authors switch off 10 refusal experts of DeepSeek-R1 (score: `ftri`).

    Args:
        frame: a contrast.
        layers: the model's routed layers.
        num_experts: how many, all with a positive score.
        **common: see `CommonOptions`.

    Raises:
        PlanError: fewer experts have a positive score.
    """
    draft = Draft("mote-suppress", MOTE, frame, layers, {"num_experts": num_experts}, common)
    draft.add(_largest(draft, num_experts, "masked"), action="mask", mode="drop_renorm")
    return draft.plan()


def mote_stimulate(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    num_experts: int = 10,
    force: Literal["natural", "max"] = "natural",
    **common: Unpack[CommonOptions],
) -> SteeringPlan:
    """Force the experts with the largest scores into every selection.

    Args:
        frame: a contrast.
        layers: the model's routed layers; with them at most k experts of a layer are forced, and
            further ones are left out and told.
        num_experts: how many, all with a positive score.
        force: `natural`: the weight is that of the expert's own score; `max`: it gets the largest.
            What the authors do is not known to us.
        **common: see `CommonOptions`.

    Raises:
        PlanError: fewer experts have a positive score.
    """
    parameters = {"num_experts": num_experts, "force": force}
    draft = Draft("mote-stimulate", MOTE, frame, layers, parameters, common)
    chosen = _largest(draft, num_experts, "forced")
    draft.add(draft.at_most_k(chosen), action="force", strength=force)
    return draft.plan()


def rice(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    beta: float | None = None,
    num_experts: int = 2,
    renormalize: bool = False,
    **common: Unpack[CommonOptions],
) -> SteeringPlan:
    """Multiply the routing weight of the experts with the largest scores where they are selected.

    Args:
        frame: a contrast of method `npmi`, or any with a number per expert.
        layers: the model's routed layers.
        beta: the factor, over 0; there is no default: the authors tried 2 to 512, and too much
            collapses.
        num_experts: how many, all with a positive score; the authors' are 1 to 5, mostly 2.
        renormalize: whether a token's weights then sum to what they did; whether the authors' do
            is not known to us.
        **common: see `CommonOptions`.

    Raises:
        PlanError: no factor, or fewer experts have a positive score.
    """
    if beta is None or not (math.isfinite(beta) and beta > 0):
        raise PlanError("strategy 'rice' needs beta, a factor over 0; the authors tried 2 to 512")
    parameters = {"beta": beta, "num_experts": num_experts, "renormalize": renormalize}
    draft = Draft("rice", RICE, frame, layers, parameters, common)
    chosen = _largest(draft, num_experts, "scaled")
    draft.add(chosen, action="scale", value=beta, renormalize=renormalize)
    return draft.plan()


def _largest(draft: Draft, number: int, done: str) -> list[RankedExpert]:
    ranked = [one for one in draft.ranking.largest_first() if one.value > 0]
    return draft.first(ranked, number, done, f"with a positive {draft.ranking.column}")


def _beyond(
    draft: Draft, tau: float | None, suppress: bool
) -> tuple[list[RankedExpert], list[RankedExpert]]:
    """The experts above tau, and those below -tau if they are wanted; the farthest first."""
    ranked = draft.ranking.largest_first()
    column = draft.ranking.column
    if tau is None:
        if "above" not in draft.ranking.columns:
            raise PlanError(
                "the table has no column 'above', so name tau: experts with a larger "
                f"{column} are taken"
            )
        if suppress:
            raise PlanError("suppress needs tau: the table does not say which experts are below")
        up = [one for one in ranked if one.is_above]
        beyond: Any = "the table's own tau"
    else:
        if not (math.isfinite(tau) and tau >= 0):
            raise PlanError(f"tau is {tau:g}; it must be at least 0")
        up = [one for one in ranked if one.value > tau]
        beyond = f"tau {tau:g}"
    down = [one for one in draft.ranking.smallest_first() if suppress and one.value < -(tau or 0)]
    if not up and not down:
        largest = f"; the largest is {ranked[0].value:.4g}" if ranked else ""
        raise PlanError(
            f"no one of {len(ranked)} {draft.ranking.noun} has a {column} above {beyond}{largest}"
        )
    return up, down
