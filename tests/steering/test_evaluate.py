"""Evaluations: every number recomputed from the answers, and the truth of the demo model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from moescope.probe.errors import PlanError
from moescope.probe.models import ModelBundle, load_model
from moescope.probe.outcomes import OUTCOMES
from moescope.probe.prompts import Prompt, read_prompts
from moescope.probe.shipped import shipped_path
from moescope.steering import SteeringPlan
from moescope.steering.evaluate import evaluate_plan
from moescope.steering.evaluation import EvaluationResult
from moescope.steering.evaluation_store import store_evaluation
from moescope.steering.generate import compare

PLAN = SteeringPlan(
    name="half",
    interventions=[{"action": "mask", "layer": layer, "experts": [0, 1, 2]} for layer in range(3)],
)


def prompts() -> list[Prompt]:
    labels = ("sensitive", "neutral", "sensitive", "neutral", None)
    pairs = ("p0", "p0", "p1", "p1", None)
    return [
        Prompt(prompt_id=at, key=f"k{at}", text=f"What is thing {at}?", set_name=f"s{at % 2}",
               label=label, pair_id=pair, lang="en", expected="no such answer")
        for at, (label, pair) in enumerate(zip(labels, pairs, strict=True))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def result(tiny_bundle: Any) -> EvaluationResult:
    return evaluate_plan(tiny_bundle, PLAN, prompts(), num_controls=2, seed=5, max_new_tokens=6)


CONTROLS = [
    "control:random:5", "control:random:6", "control:load-matched:5", "control:load-matched:6",
]  # fmt: skip


def test_conditions_are_unsteered_steered_and_controls_of_each_kind_and_seed(
    result: EvaluationResult,
) -> None:
    names = [one.name for one in result.conditions]
    assert names == ["unsteered", "steered", *CONTROLS]
    assert any("no control from the bottom of the ranking" in note for note in result.notes)
    assert result.conditions[0].plan is None
    assert result.conditions[1].plan == PLAN
    for seed, one in zip((5, 6, 5, 6), result.conditions[2:], strict=True):
        assert one.plan is not None
        assert one.plan.provenance["seed"] == seed
        assert [len(part.experts) for part in one.plan.interventions] == [3, 3, 3]


def test_a_plan_without_experts_has_no_random_control_and_says_so(tiny_bundle: Any) -> None:
    one_expert = [{"action": "top_k", "layer": layer, "value": 1} for layer in range(3)]
    plan = SteeringPlan(name="one", interventions=one_expert)
    found = evaluate_plan(tiny_bundle, plan, prompts(), num_controls=2, max_new_tokens=3)
    assert [one.name for one in found.conditions] == ["unsteered", "steered"]
    assert any("random experts cannot be its control" in note for note in found.lines())
    assert found.value("steered", "all", "achieved") == 1.0


def test_every_rate_and_change_follows_from_the_judged_answers(result: EvaluationResult) -> None:
    groups = [prompt.label or "unlabelled" for prompt in prompts()]
    assert set(result.frame["group"]) == {"sensitive", "neutral", "unlabelled", "all"}
    before = result.conditions[0].judgements
    for condition in result.conditions:
        for group in set(groups):
            members = [at for at, found in enumerate(groups) if found == group]
            for outcome in OUTCOMES:
                hits = [condition.judgements[at].outcome == outcome for at in members]
                expected = sum(hits) / len(members)
                assert result.value(condition.name, group, outcome) == pytest.approx(expected)
                if condition.name == "unsteered":
                    continue
                change = expected - sum(before[at].outcome == outcome for at in members) / len(
                    members
                )
                found = result.value(condition.name, group, f"{outcome}_change")
                assert found == pytest.approx(change)
    rates = result.frame[result.frame["metric"].isin(OUTCOMES)]
    totals = rates.groupby(["condition", "group"])["value"].sum()
    assert totals.tolist() == pytest.approx([1.0] * len(totals))
    assert (rates["low"] <= rates["value"]).all()
    assert (rates["value"] <= rates["high"]).all()
    assert set(rates[rates["group"] == "sensitive"]["n"]) == {2}
    with pytest.raises(KeyError):
        result.value("unsteered", "all", "kl_first")


def test_side_effects_are_measured_on_neutral_prompts_of_steered_conditions(
    result: EvaluationResult,
) -> None:
    moved = result.frame[result.frame["metric"].isin(["kl_first", "kl_answer"])]
    assert set(moved["group"]) == {"neutral"}
    assert set(moved["condition"]) == {"steered", *CONTROLS}
    assert (moved["n"] == 2).all()
    assert (moved["value"] > 0).all()
    steered = result.conditions[1]
    mean = sum(one.first for one in steered.side_effects.values()) / 2
    assert result.value("steered", "neutral", "kl_first") == pytest.approx(mean)


def test_achieved_routing_is_told_for_each_plan(result: EvaluationResult) -> None:
    for condition in result.conditions[1:]:
        assert result.value(condition.name, "all", "achieved") == 1.0
        assert 0 < result.value(condition.name, "all", "held_anyway") < 1
        assert condition.report is not None
    assert result.conditions[0].report is None


def test_examples_are_the_answers_that_steering_changed(
    result: EvaluationResult, tiny_bundle: Any
) -> None:
    compared = compare(tiny_bundle, prompts(), PLAN, max_new_tokens=6)
    changed = [one for one in compared.answers if one.is_changed]
    assert changed
    assert [one.prompt_id for one in result.examples] == [one.prompt.prompt_id for one in changed]
    for example, one in zip(result.examples, changed, strict=True):
        assert one.steered is not None
        assert (example.before, example.after) == (one.unsteered.text, one.steered.text)
        assert example.prompt == one.prompt.text
        assert example.outcome_before == one.unsteered_outcome.outcome


def test_an_evaluation_repeats_itself(result: EvaluationResult, tiny_bundle: Any) -> None:
    again = evaluate_plan(tiny_bundle, PLAN, prompts(), num_controls=2, seed=5, max_new_tokens=6)
    both = [one.frame[one.frame["metric"] != "tokens_per_s"] for one in (again, result)]
    pd.testing.assert_frame_equal(*both)
    assert again.evaluation_id != result.evaluation_id


def test_speed_is_generated_tokens_over_seconds_of_each_condition(
    result: EvaluationResult,
) -> None:
    for one in result.conditions:
        num_tokens = sum(len(answer.token_ids) for answer in one.answers)
        speed = result.value(one.name, "all", "tokens_per_s")
        assert speed == pytest.approx(num_tokens / one.seconds)
        assert one.seconds > 0
    assert any(line.startswith("speed: ") for line in result.lines())


def test_given_controls_stand_beside_the_random_ones(tiny_bundle: Any) -> None:
    bottom = SteeringPlan(
        name="bottom", interventions=[{"action": "mask", "layer": 1, "experts": [6, 7]}]
    )
    calls: list[tuple[int, int]] = []
    found = evaluate_plan(
        tiny_bundle, PLAN, prompts(), num_controls=1, controls={"bottom": bottom},
        max_new_tokens=3, progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert [one.name for one in found.conditions] == [
        "unsteered", "steered", "control:random:0", "control:load-matched:0", "control:bottom",
    ]  # fmt: skip
    assert found.conditions[4].plan == bottom
    assert calls[-1] == (25, 25)
    compared = compare(tiny_bundle, prompts(), bottom, max_new_tokens=3)
    assert [one.text for one in found.conditions[4].answers] == [
        one.steered.text for one in compared.answers if one.steered is not None
    ]
    text = "\n".join(found.lines())
    assert "\n  random experts  " in text
    assert "\n  bottom of the ranking  " in text
    assert ", bottom of the ranking " in next(
        line for line in found.lines() if line.startswith("side effects")
    )


@pytest.mark.parametrize("name", ["", "random:0", "random:x", "load-matched:1"])
def test_controls_cannot_take_the_names_of_random_ones(tiny_bundle: Any, name: str) -> None:
    with pytest.raises(PlanError, match="a control cannot be named"):
        evaluate_plan(tiny_bundle, PLAN, prompts(), controls={name: PLAN})


def test_unsteered_answers_can_be_taken_from_an_earlier_evaluation(
    result: EvaluationResult, tiny_bundle: Any
) -> None:
    calls: list[tuple[int, int]] = []
    again = evaluate_plan(
        tiny_bundle, PLAN, prompts(), num_controls=2, seed=5, max_new_tokens=6,
        unsteered=result.conditions[0], progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (25, 25)
    both = [one.frame[one.frame["metric"] != "tokens_per_s"] for one in (again, result)]
    pd.testing.assert_frame_equal(*both)
    with pytest.raises(ValueError, match="same prompts"):
        evaluate_plan(tiny_bundle, PLAN, prompts()[:2], unsteered=result.conditions[0])


def test_progress_reaches_its_total_and_what_is_missing_is_noted(tiny_bundle: Any) -> None:
    calls: list[tuple[int, int]] = []
    found = evaluate_plan(
        tiny_bundle, PLAN, [replace(one, label="x") for one in prompts()[:2]], num_controls=1,
        max_new_tokens=2, progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (8, 8)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert "no prompt is in the group 'neutral': side effects were not measured" in found.notes
    assert any(note.startswith("fluency was not judged: 0 complied") for note in found.notes)
    assert found.lines()[-len(found.notes) :] == list(found.notes)


def test_plans_that_change_nothing_or_do_not_fit_are_refused_before_generating(
    tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model generated")

    monkeypatch.setattr(tiny_bundle.model, "generate", fail)
    with pytest.raises(PlanError, match="changes nothing"):
        evaluate_plan(tiny_bundle, SteeringPlan(), prompts())
    misfit = SteeringPlan(interventions=[{"action": "mask", "layer": 9, "experts": [1]}])
    with pytest.raises(PlanError, match="layer 9 has no router"):
        evaluate_plan(tiny_bundle, misfit, prompts())
    with pytest.raises(PlanError, match="layer 9 has no router"):
        compare(tiny_bundle, prompts(), misfit)


def test_the_text_shows_rates_with_the_band_of_the_controls(result: EvaluationResult) -> None:
    text = "\n".join(result.lines())
    assert "neutral, 2 prompts" in text
    assert "random experts (2 plans)" in text
    assert "side effects on neutral: KL in nats, first token " in text
    assert "\nrouting: " in text


def test_an_evaluation_is_stored_with_its_plans(result: EvaluationResult, tmp_path: Path) -> None:
    from moescope.probe.storage.store import Store

    path = tmp_path / "s.duckdb"
    store_evaluation(path, result)
    store_evaluation(path, replace(result, evaluation_id="second"))
    store = Store(path)
    rows = store.query("SELECT * FROM evaluations WHERE evaluation_id = ?", [result.evaluation_id])
    assert len(rows) == len(result.frame)
    for column in ("condition", "metric", "value", "low", "high", "n"):
        expected = result.frame[column].rename(column)
        pd.testing.assert_series_equal(rows[column], expected, check_dtype=False)
    details = [json.loads(text) for text in rows["details"]]
    assert [one["group"] for one in details] == result.frame["group"].tolist()
    assert details[0]["evaluated_plan_id"] == PLAN.plan_id
    assert details[0]["model"] == "tiny"
    assert set(rows["set_name"]) == {"s0+s1"}
    assert rows[rows["condition"] == "unsteered"]["plan_id"].isna().all()
    assert set(rows[rows["condition"] == "steered"]["plan_id"]) == {PLAN.plan_id}
    plans = store.query("SELECT plan_id, name, plan FROM plans")
    assert len(plans) == 5
    kept = {row.plan_id: SteeringPlan.parse(row.plan) for row in plans.itertuples()}
    assert kept[PLAN.plan_id] == PLAN
    assert all(plan_id == plan.plan_id for plan_id, plan in kept.items())


def demo_prompts(bundle: ModelBundle) -> list[Prompt]:
    """Pairs of English questions of which the model refuses the sensitive one."""
    pairs: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(["refusal"]):
        if prompt.lang == "en" and prompt.pair_id is not None:
            pairs.setdefault(prompt.pair_id, []).append(prompt)
    chosen = [prompt for pair in list(pairs.values())[:12] for prompt in pair]
    found = compare(bundle, chosen, None, max_new_tokens=24).answers
    refused = {one.prompt.pair_id for one in found if one.unsteered_outcome.outcome == "refused"}
    return [prompt for prompt in chosen if prompt.pair_id in refused]


def test_masking_the_tuned_experts_of_the_demo_model_brings_right_answers_back() -> None:
    torch.set_num_threads(1)
    bundle = load_model("demo", device="cpu")
    tuned = json.loads(shipped_path("models", "demo", "tuned_experts.json").read_text())["experts"]
    plan = SteeringPlan(
        name="tuned", model="demo",
        interventions=[
            {"action": "mask", "layer": int(layer), "experts": experts}
            for layer, experts in tuned.items()
        ],
    )  # fmt: skip
    chosen = demo_prompts(bundle)
    assert len(chosen) >= 8
    result = evaluate_plan(bundle, plan, chosen, num_controls=1, max_new_tokens=24)
    assert result.value("unsteered", "sensitive", "refused") >= 0.9
    assert result.value("steered", "sensitive", "refused") <= 0.1
    assert result.value("steered", "sensitive", "correct") >= 0.5
    assert result.value("steered", "sensitive", "broken") <= 0.1
    assert result.value("control:random:0", "sensitive", "refused") >= 0.6
    assert result.value("steered", "all", "achieved") == 1.0
