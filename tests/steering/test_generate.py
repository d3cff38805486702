"""Side by side: unsteered answers are the model's own, steered ones those under `steer`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moescope.probe.errors import InputError
from moescope.probe.generation import Sampling, generate_answers
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt
from moescope.steering import SteeringPlan, steer
from moescope.steering.generate import compare

PROMPTS = [
    Prompt(prompt_id=at, text=text, set_name="typed")
    for at, text in enumerate(("Where is the ring?", "Hello", "What happened here in 1868?"))
]
PLAN = SteeringPlan(
    name="three",
    interventions=[
        {"action": "mask", "layer": 0, "experts": [0, 1, 2]},
        {"action": "force", "layer": 2, "experts": [4], "tokens": "generated"},
    ],
)


def test_both_sides_are_what_the_model_writes(tiny_bundle: Any) -> None:
    found = compare(tiny_bundle, PROMPTS, PLAN, max_new_tokens=8)
    rendered = [render_prompt(tiny_bundle.tokenizer, prompt) for prompt in PROMPTS]
    unsteered = generate_answers(tiny_bundle, rendered, max_new_tokens=8)
    with steer(tiny_bundle.model, PLAN):
        steered = generate_answers(tiny_bundle, rendered, max_new_tokens=8)
    assert [one.unsteered for one in found.answers] == unsteered
    assert [one.steered for one in found.answers] == steered
    assert unsteered != steered
    assert found.report is not None
    assert [row.share for row in found.report.rows] == [1.0, 1.0]
    assert [one.prompt for one in found.answers] == PROMPTS


def test_without_a_plan_there_is_one_side(tiny_bundle: Any) -> None:
    calls: list[tuple[int, int]] = []
    found = compare(
        tiny_bundle, PROMPTS, None, max_new_tokens=3,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (3, 3)
    assert found.report is None
    assert all(one.steered is None and not one.is_changed for one in found.answers)
    assert not any(line.startswith("steered") for line in found.lines())
    data = json.loads(json.dumps(found.to_json()))
    assert data["plan"] is None
    assert [one["steered"] for one in data["answers"]] == [None] * 3


def test_no_prompt_is_refused(tiny_bundle: Any) -> None:
    with pytest.raises(InputError, match="there is no prompt to answer"):
        compare(tiny_bundle, [], PLAN)


def test_an_empty_plan_writes_the_same(tiny_bundle: Any) -> None:
    found = compare(tiny_bundle, PROMPTS, SteeringPlan(), max_new_tokens=8)
    assert all(one.steered == one.unsteered for one in found.answers)
    assert found.lines()[-1].endswith("no token was in the plan's scope")


def test_sampling_draws_the_same_on_both_sides(tiny_bundle: Any) -> None:
    sampling = Sampling(do_sample=True, seed=3)
    found = compare(tiny_bundle, PROMPTS, SteeringPlan(), max_new_tokens=8, sampling=sampling)
    assert all(one.steered == one.unsteered for one in found.answers)


def test_the_comparison_is_told_in_lines_and_data(tiny_bundle: Any) -> None:
    found = compare(tiny_bundle, PROMPTS[:1], PLAN, max_new_tokens=4)
    lines = found.lines()
    assert lines[0] == "prompt     Where is the ring?"
    assert lines[1].startswith("unsteered  ")
    assert lines[2].startswith("steered    ")
    assert "requests held (100.0%)" in lines[-1]
    data = json.loads(json.dumps(found.to_json()))
    assert data["plan_id"] == PLAN.plan_id
    assert data["achieved"]["share"] == 1.0
    assert data["answers"][0]["prompt"] == "Where is the ring?"
