"""From prompts to a confirmed plan: the question, its halves, the search and the confirmation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.steering.causes.asking import (
    DIRECTIONS,
    OwnAnswer,
    Question,
    TargetName,
    ask,
)
from moescope.steering.causes.confirm import Confirmed, confirm_set, halves_of_units
from moescope.steering.causes.keys import Mode
from moescope.steering.causes.search import Aim, FoundSet, Told, search_set
from moescope.steering.plan import SteeringPlan
from moescope.steering.rates import unit_of


@dataclass(frozen=True)
class SearchedPlan:
    """A search and what became of it on the other half.

    Attributes:
        found: the set, as searched.
        confirmed: on held-out units; None where nothing was found.
        plan: of the set, with both in its provenance; None where nothing was found.
        notes: on which prompts each part was measured.
    """

    found: FoundSet
    confirmed: Confirmed | None
    plan: SteeringPlan | None
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people to read: prompts, steps, confirmation."""
        found = self.found
        lines = list(self.notes)
        for number, one in enumerate(found.steps, start=1):
            layer, kind, expert = one.expert
            where = f"layer {layer}" if kind == "mlp" else f"layer {layer} ({kind})"
            lines.append(
                f"  {number:>2}  {where}, expert {expert:<4} loss {one.loss:>8.3f} "
                f"({one.change:+.3f}; estimated {one.estimate:+.3f})  cost {one.cost:+.4f}"
            )
        if found.left:
            said = ", ".join(f"{layer}/{expert}" for layer, _, expert in found.left)
            lines.append(f"joined, and not needed at the end (layer/expert): {said}")
        if self.confirmed is None:
            lines.append(
                f"no expert lowers the loss of {found.loss_before:.3f} by as much as counts, "
                f"within a cost of {found.budget:g}: there is no set to confirm, and no plan"
            )
        else:
            lines.append(self.confirmed.in_words())
        return lines


def search_and_confirm(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    neutral: Sequence[Prompt],
    target: TargetName,
    *,
    max_experts: int = 14,
    budget: float = 0.05,
    mode: Mode = "replace",
    bound: float = 10.0,
    num_tokens: int | None = 4,
    num_exact: int = 8,
    beam: int = 1,
    group: int = 1,
    most: int = 80,
    num_random: int = 20,
    seed: int = 0,
    name: str | None = None,
    known: Mapping[int, OwnAnswer] | None = None,
    tokens_per_batch: int = 1024,
    told: Told | None = None,
) -> SearchedPlan:
    """Search on half of the units, confirm on the other half.

    Args:
        bundle: model and tokenizer, unsteered.
        prompts: that the behavior is about.
        neutral: prompts that must be left alone; without any there is no budget.
        target: what is moved; see `moescope.steering.causes.asking`.
        max_experts: see `search_set`.
        budget: see `search_set`.
        mode: see `search_set`.
        bound: of `opening`: how far below 0 a prompt's value counts, in nats.
        num_tokens: of `opening`: tokens of each text that count.
        num_exact: see `search_set`.
        beam: see `search_set`.
        group: see `search_set`.
        most: prompts of each kind that the search uses, drawn with `seed`; the confirmation uses
            as many.
        num_random: random sets beside the confirmation.
        seed: of the halves, the draws and the random sets.
        name: of the plan.
        known: what the model answered by itself, by prompt id, where that was recorded.
        tokens_per_batch: see `search_set`.
        told: see `search_set`.

    Raises:
        InputError: no prompt can be asked, or all are of one unit.
    """
    units = [unit_of(prompt) for prompt in (*prompts, *neutral)]
    is_first = halves_of_units(units, [one.label for one in (*prompts, *neutral)], seed)
    if is_first.all() or not is_first.any():
        raise InputError("a search needs at least two units (pair_id), and these prompts are one")
    halves: list[tuple[Question, Question | None]] = []
    for mine in (is_first, ~is_first):
        about = [one for one, is_in in zip(prompts, mine, strict=False) if is_in]
        beside = [one for one, is_in in zip(neutral, mine[len(prompts) :], strict=True) if is_in]
        halves.append((
            ask(bundle, about, target, num_tokens=num_tokens, most=most, seed=seed, known=known),
            ask(bundle, beside, "own", most=most, seed=seed, known=known) if beside else None,
        ))  # fmt: skip
    (question, cost), (other, other_cost) = halves
    found = search_set(
        bundle, _aim(question, bound), None if cost is None else _aim(cost, bound),
        max_experts=max_experts, budget=budget, mode=mode, num_exact=num_exact, beam=beam,
        group=group, tokens_per_batch=tokens_per_batch, told=told,
    )  # fmt: skip
    notes = [f"searched: {question.note}", f"confirmed: {other.note}"]
    if cost is not None:
        notes.insert(1, f"cost: {cost.note}; budget {budget:g} nats a token")
    else:
        notes.insert(1, "cost: none, because no neutral prompt was given: there is no budget")
    if not found.steps:
        return SearchedPlan(found, None, None, tuple(notes))
    plan = found.plan(name=name, model=bundle.name, provenance={"target": target, "seed": seed})
    confirmed = confirm_set(
        bundle, plan, _aim(other, bound), other.units,
        None if other_cost is None else _aim(other_cost, bound),
        budget=budget, num_random=num_random, seed=seed, tokens_per_batch=tokens_per_batch,
    )  # fmt: skip
    kept = {
        "change": confirmed.change, "low": confirmed.low, "high": confirmed.high,
        "random": list(confirmed.random), "cost": confirmed.cost, "n": confirmed.n,
        "num_units": confirmed.num_units, "is_confirmed": confirmed.is_confirmed,
    }  # fmt: skip
    plan = plan.model_copy(update={"provenance": {**plan.provenance, "confirmation": kept}})
    return SearchedPlan(found, confirmed, plan, tuple(notes))


def _aim(question: Question, bound: float) -> Aim:
    """The question's target where it goes; log-probabilities end at 0 by themselves."""
    direction = DIRECTIONS[question.name]
    limit = -abs(bound) if question.name == "opening" else -np.inf
    if direction == "raise":
        limit = np.inf
    return Aim(question.rows, question.rendered, direction, limit)
