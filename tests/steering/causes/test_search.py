"""Sets of experts: the planted one is found and confirmed, and where none causes it none is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moescope.probe.demo.planted import PlantedModel, attention_refusal, expert_refusal
from moescope.probe.errors import InputError, PlanError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.routers import find_routers
from moescope.steering.apply import steer
from moescope.steering.causes.asking import OwnAnswer, ask
from moescope.steering.causes.confirm import confirm_set, halves_of_units
from moescope.steering.causes.found import search_and_confirm
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.search import Aim, removal_plan, search_set
from moescope.steering.causes.targets import LogitDifference, target_rows
from moescope.steering.derive import random_plan


def planted_prompts(planted: PlantedModel) -> tuple[list[Prompt], list[Prompt]]:
    """Sensitive and neutral prompts; a pair is a topic in one phrasing."""
    prompts = [
        Prompt(
            prompt_id=at, text=text, set_name="planted", label=label, expected=answer,
            pair_id=f"{answer}-{len(text.split())}-{at % 6}",
        )
        for at, (text, label, answer) in enumerate(
            zip(planted.prompts, planted.labels, planted.answers, strict=True)
        )
    ]  # fmt: skip
    return (
        [one for one in prompts if one.label == "sensitive"],
        [one for one in prompts if one.label == "neutral"],
    )


def bundle_of(planted: PlantedModel) -> ModelBundle:
    return ModelBundle(planted.model, planted.tokenizer, "planted", None, "qwen3_moe")


@pytest.mark.parametrize("mode", ["replace", "drop", "drop_renorm"])
def test_the_planted_expert_is_the_set_and_is_confirmed(mode: Any) -> None:
    planted = expert_refusal(layer=2, expert=3)
    sensitive, neutral = planted_prompts(planted)
    found = search_and_confirm(
        bundle_of(planted), sensitive, neutral, "opening", mode=mode, num_random=6, num_tokens=1,
        max_experts=4,
    )  # fmt: skip
    assert found.found.experts == ((2, "mlp", 3),)
    assert found.confirmed is not None and found.confirmed.is_confirmed
    assert found.confirmed.n + len(found.found.steps) > 10
    assert all(abs(one) < 1e-3 for one in found.confirmed.random)
    assert found.plan is not None
    assert found.plan.provenance["confirmation"]["is_confirmed"] is True
    (mask,) = found.plan.interventions
    assert (mask.layer, mask.experts) == (2, (3,))
    assert "confirmed on" in found.lines()[-1]


def test_where_attention_refuses_no_set_is_found_and_no_plan_offered() -> None:
    planted = attention_refusal()
    sensitive, neutral = planted_prompts(planted)
    found = search_and_confirm(
        bundle_of(planted), sensitive, neutral, "opening", num_tokens=1, num_random=3
    )
    assert found.found.steps == ()
    assert found.plan is None and found.confirmed is None
    assert "there is no set to confirm, and no plan" in found.lines()[-1]
    with pytest.raises(PlanError, match="there is no plan"):
        found.found.plan()


def test_a_random_set_is_not_confirmed_on_the_planted_model() -> None:
    planted = expert_refusal(layer=1, expert=5)
    bundle = bundle_of(planted)
    sensitive, _ = planted_prompts(planted)
    question = ask(bundle, sensitive, "opening", num_tokens=1)
    aim = Aim(question.rows, question.rendered, "lower", -5.0)
    infos = [site.info for site in find_routers(bundle.model)]
    plan = random_plan(removal_plan([(1, "mlp", 5)], "replace"), infos, 0)
    found = confirm_set(bundle, plan, aim, question.units, None, budget=0.05, num_random=4, seed=1)
    assert not found.is_confirmed
    assert "within chance" in found.reason


@pytest.fixture(scope="module")
def tiny_aims(tiny_bundle: Any) -> tuple[Aim, Aim]:
    """Two logit differences of a random model, on prompts of unequal length."""
    prompts = [
        Prompt(prompt_id=at, text="why " * (1 + at % 4) + str(at), set_name="t") for at in range(8)
    ]
    from moescope.probe.rendering import render_prompt

    rendered = [render_prompt(tiny_bundle.tokenizer, one) for one in prompts]
    lower = target_rows(tiny_bundle, LogitDifference(65, 66), rendered)
    keep = target_rows(tiny_bundle, LogitDifference(70, 71), rendered)
    return Aim(lower, rendered, "lower"), Aim(keep, rendered, "lower")


def test_each_step_lowers_the_loss_keeps_the_budget_and_is_what_its_plan_measures(
    tiny_bundle: Any, tiny_aims: tuple[Aim, Aim]
) -> None:
    aim, cost = tiny_aims
    found = search_set(tiny_bundle, aim, cost, max_experts=5, budget=0.05, num_exact=4)
    assert 1 <= len(found.steps) <= 5
    losses = [found.loss_before, *(one.loss for one in found.steps)]
    assert losses == sorted(losses, reverse=True)
    assert found.cost <= 0.05
    assert all(one.num_tried <= 4 for one in found.steps)
    with steer(tiny_bundle.model, found.plan()):
        values = measure_target(tiny_bundle, aim.rows, aim.rendered)
        costs = measure_target(tiny_bundle, cost.rows, cost.rendered)
    unsteered = measure_target(tiny_bundle, cost.rows, cost.rendered)
    assert found.loss == pytest.approx(values.mean(), abs=1e-4)
    assert found.cost == pytest.approx(costs.mean() - unsteered.mean(), abs=1e-4)
    frame = found.frame()
    assert frame["step"].tolist() == list(range(1, len(found.steps) + 1))
    assert (frame["change"] < 0).all()


def test_a_budget_is_kept_one_expert_is_the_best_one_and_wider_searches_do_no_worse(
    tiny_bundle: Any, tiny_aims: tuple[Aim, Aim]
) -> None:
    aim, cost = tiny_aims
    free = search_set(tiny_bundle, aim, None, max_experts=3, num_exact=24)
    tight = search_set(tiny_bundle, aim, cost, max_experts=3, num_exact=24, budget=0.0)
    assert tight.cost <= 0.0
    single = search_set(tiny_bundle, aim, None, max_experts=1, num_exact=24)
    by_hand = min(
        _loss_without(tiny_bundle, aim, (layer, "mlp", expert))
        for layer in range(3)
        for expert in range(8)
    )
    assert single.loss == pytest.approx(by_hand, abs=1e-4)
    beam = search_set(tiny_bundle, aim, None, max_experts=3, num_exact=24, beam=3)
    assert beam.loss <= free.loss + 1e-4
    grouped = search_set(tiny_bundle, aim, None, max_experts=4, num_exact=8, group=2)
    assert 1 <= len(grouped.steps) <= 4
    assert grouped.loss < grouped.loss_before


def _loss_without(bundle: Any, aim: Aim, expert: tuple[int, str, int]) -> float:
    with steer(bundle.model, removal_plan([expert], "replace")):
        return float(aim.loss(measure_target(bundle, aim.rows, aim.rendered)))


def test_values_count_up_to_the_bound_and_raising_is_lowering_the_opposite() -> None:
    values = np.array([[3.0, -9.0], [-1.0, 1.0]])
    assert Aim((), (), "lower", -5.0).loss(values).tolist() == [-1.0, 0.0]
    assert Aim((), (), "raise", 2.0).loss(values).tolist() == [3.5, 0.0]
    assert Aim((), (), "raise", np.inf).loss(values).tolist() == [3.0, 0.0]


def test_halves_hold_whole_units_of_every_stratum() -> None:
    units = [f"u{at // 3}" for at in range(60)]
    strata = [("a", "b")[at // 30] for at in range(60)]
    first = halves_of_units(units, strata, 3)
    for unit in set(units):
        assert (
            len({bool(is_in) for is_in, one in zip(first, units, strict=True) if one == unit}) == 1
        )
    assert first[:30].sum() == first[30:].sum() == 15
    assert (halves_of_units(units, strata, 3) == first).all()


def test_questions_take_only_prompts_that_can_be_asked() -> None:
    planted = expert_refusal()
    bundle = bundle_of(planted)
    sensitive, neutral = planted_prompts(planted)
    opening = ask(bundle, [*sensitive, *neutral], "opening", num_tokens=1)
    assert {one.label for one in opening.prompts} == {"sensitive"}
    assert f"{len(sensitive)} prompts (those refused" in opening.note
    own = ask(bundle, [*sensitive, *neutral], "own", most=5, seed=2)
    assert len(own.prompts) == 5 and {one.label for one in own.prompts} == {"neutral"}
    assert "5 prompts (those answered; 32 of 72 looked at)" in own.note
    said = {one.prompt_id: OwnAnswer("busy", "correct") for one in sensitive}
    assert len(ask(bundle, sensitive, "own", known=said).prompts) == len(sensitive)
    with pytest.raises(InputError, match="there is none"):
        ask(bundle, neutral, "opening")
    free = search_and_confirm(bundle, sensitive, [], "opening", num_tokens=1, num_random=3)
    assert any("there is no budget" in note for note in free.notes)
    assert free.confirmed is not None and "without a budget" in free.confirmed.reason
    single = [sensitive[0], neutral[0]]
    with pytest.raises(InputError, match="at least two units"):
        search_and_confirm(bundle, single[:1], [], "opening")


def test_numbers_that_make_no_sense_are_refused(
    tiny_bundle: Any, tiny_aims: tuple[Aim, Aim]
) -> None:
    for wrong in ({"max_experts": 0}, {"beam": 0}, {"group": 0}, {"num_exact": 0}):
        with pytest.raises(PlanError, match="must be at least 1"):
            search_set(tiny_bundle, tiny_aims[0], None, **{"max_experts": 2, **wrong})
