"""Controls that come with every evaluation: loads counted by hand, the bottom kept in the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moescope.probe.prompts import Prompt
from moescope.probe.recording import record
from moescope.probe.rendering import render_prompt
from moescope.probe.routers import find_routers
from moescope.steering import SteeringPlan
from moescope.steering.controls import bottom_control, load_matched_control, with_bottom
from moescope.steering.evaluate import evaluate_plan
from moescope.steering.generate import Asker, proved_sites
from moescope.steering.standard_controls import StandardControls, measured_load

PLAN = SteeringPlan(
    name="p",
    interventions=[
        {"action": "mask", "layer": 0, "experts": [1, 2]},
        {"action": "scale", "layer": 2, "experts": [4], "value": 2.0},
    ],
)


def ranking() -> pd.DataFrame:
    """Scores that grow with the expert's number, alternating in sign."""
    rows = [(layer, expert) for layer in range(3) for expert in range(8)]
    frame = pd.DataFrame(rows, columns=["layer", "expert"])
    return frame.assign(score=(frame["expert"] + 1) * (-1.0) ** frame["expert"])


@pytest.fixture(scope="module")
def infos(tiny_bundle: Any) -> list[Any]:
    return [site.info for site in find_routers(tiny_bundle.model)]


def test_the_bottom_of_the_ranking_travels_with_the_plan(infos: list[Any]) -> None:
    plan = SteeringPlan.parse(with_bottom(PLAN, infos, ranking()).to_json())
    controls = StandardControls(plan, infos, num_seeds=1, kinds=("bottom",))
    assert controls.names == ("bottom",)
    assert not controls.needs_load
    found = controls.plans(None)["bottom"]
    # Smallest |score| among the others: experts 0 and 3 of layer 0, expert 0 of layer 2.
    assert [one.experts for one in found.interventions] == [(0, 3), (0,)]
    assert found.interventions == bottom_control(PLAN, infos, 0, ranking()).interventions
    assert found.provenance["ranked_by"] == "score"


def test_a_ranking_without_enough_others_is_told_in_the_plan_and_in_the_evaluation(
    infos: list[Any],
) -> None:
    few = ranking()[lambda frame: frame["expert"].isin([1, 2, 4])]
    plan = with_bottom(PLAN, infos, few)
    assert "are wanted from the bottom" in plan.provenance["bottom"]["missing"]
    controls = StandardControls(plan, infos, num_seeds=1)
    assert controls.names == ("random:0", "load-matched:0")
    assert any("no control from the bottom" in note for note in controls.notes)


def test_loads_are_shares_of_slots_over_prompts_and_answers(tiny_bundle: Any) -> None:
    texts = ["a short one", "one that is quite a bit longer than the other", "x"]
    rendered = [
        render_prompt(tiny_bundle.tokenizer, Prompt(prompt_id=at, text=text, set_name="t"))
        for at, text in enumerate(texts)
    ]
    sites = proved_sites(tiny_bundle, rendered)
    asker = Asker(
        tiny_bundle, rendered, sites, max_new_tokens=4, tokens_per_batch=4096, num_rounds=1,
        progress=None,
    )  # fmt: skip
    answers, _ = asker.ask(None)
    load = measured_load(tiny_bundle, rendered, answers, sites)
    counts = np.zeros((3, 8))
    for prompt, answer in zip(rendered, answers, strict=True):  # one by one, nothing is padded
        with torch.inference_mode(), record(tiny_bundle.model, level="topk") as trace:
            row = [*prompt.token_ids, *answer.token_ids[:-1]]
            tiny_bundle.model(input_ids=torch.tensor([row]))
        for layer in range(3):
            counts[layer] += np.bincount(trace[layer].expert_ids.flatten().numpy(), minlength=8)
    expected = (counts / counts.sum(1, keepdims=True)).flatten()
    assert load["load"].to_numpy() == pytest.approx(expected)
    assert load[["layer", "expert"]].to_numpy().tolist() == [
        [layer, expert] for layer in range(3) for expert in range(8)
    ]


def test_an_evaluation_has_all_three_kinds_matched_by_its_own_loads(
    tiny_bundle: Any, infos: list[Any]
) -> None:
    prompts = [
        Prompt(prompt_id=at, text=f"What is thing {at}?", set_name="t", label=label)
        for at, label in enumerate(("sensitive", "neutral", "neutral"))
    ]
    plan = with_bottom(PLAN, infos, ranking())
    found = evaluate_plan(tiny_bundle, plan, prompts, num_controls=2, seed=3, max_new_tokens=3)
    names = [one.name.removeprefix("control:") for one in found.conditions[2:]]
    assert names == ["random:3", "random:4", "load-matched:3", "load-matched:4", "bottom"]
    rendered = [render_prompt(tiny_bundle.tokenizer, prompt) for prompt in prompts]
    load = measured_load(
        tiny_bundle, rendered, found.conditions[0].answers, find_routers(tiny_bundle.model)
    )
    matched = found.conditions[4].plan
    assert matched is not None
    assert matched.interventions == load_matched_control(plan, infos, 3, load).interventions
    assert not any("bottom" in note for note in found.notes)
    text = "\n".join(found.lines())
    for words in ("random experts (2 plans)", "random experts, matched on load (2 plans)",
                  "bottom of the ranking"):  # fmt: skip
        assert words in text


def test_no_seeds_mean_no_controls(infos: list[Any]) -> None:
    controls = StandardControls(PLAN, infos, num_seeds=0)
    assert (controls.names, controls.notes, controls.plans(None)) == ((), (), {})
