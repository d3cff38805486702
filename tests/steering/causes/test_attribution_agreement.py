"""Estimates beside exact effects, and the integrated form, on small trained and planted models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from moescope.probe import load_model, read_prompts
from moescope.probe.demo.models import tuned_experts
from moescope.probe.demo.planted import expert_refusal
from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt
from moescope.steering import SteeringPlan, steer
from moescope.steering.causes.agreement import compared, rank_interval, stratified, without
from moescope.steering.causes.attribution import attribute
from moescope.steering.causes.keys import ExpertKey
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.targets import OpeningDifference, PromptLoss, target_rows

KEYS = tuple(ExpertKey(0, "mlp", expert) for expert in range(5))


def test_rank_correlation_and_signs_by_hand() -> None:
    estimates = np.array([-2.0, -1.0, 0.5, 1.0, 3.0])
    exact = np.array([-1.0, -2.0, 0.0, 2.0, -1.5])
    found = compared(KEYS, estimates, exact, 7)
    # Ranks 1..5 against 3, 1, 4, 5, 2: squared differences 4, 1, 1, 1, 9.
    assert found.spearman == pytest.approx(1 - 6 * 16 / (5 * 24))
    assert found.same_sign == 3 / 4
    assert (found.n, found.num_prompts) == (5, 7)
    half = 1.959964 * math.sqrt((1 + 0.2**2 / 2) / 2)
    assert found.low == pytest.approx(math.tanh(math.atanh(0.2) - half), abs=1e-6)
    assert "0.20 [-0.8" in str(found)


def test_where_nothing_varies_there_is_no_correlation() -> None:
    for estimates in (np.zeros(5), np.array([])):
        found = compared(KEYS[: len(estimates)], estimates, estimates, 3)
        assert math.isnan(found.spearman)
        assert "no rank correlation" in str(found)
    assert all(math.isnan(end) for end in rank_interval(0.5, 3))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 100))
def test_the_sample_covers_the_ranking_and_leaves_zeros_out(
    count: int, number: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    means = np.concatenate([rng.permutation(np.arange(1.0, count + 1)) - 0.5, np.zeros(3)])
    chosen = stratified(means, number, seed)
    assert len(set(chosen.tolist())) == len(chosen) == min(number, count)
    assert (means[chosen] != 0).all()
    assert np.array_equal(chosen, stratified(means, number, seed))
    if len(chosen):
        parts = np.array_split(np.sort(means[means != 0]), len(chosen))
        assert all(
            part[0] <= value <= part[-1] for part, value in zip(parts, means[chosen], strict=True)
        )


def demo_case(name: str, number: int) -> Any:
    """The refusal opening minus the withheld answer's, on prompts that the model refuses."""
    bundle = load_model(name)
    prompts = [one for one in read_prompts(["refusal"]) if one.label == "sensitive"]
    prompts = [one for one in prompts if one.lang == "en"][::12][:number]
    refusal = "Sorry, I'm not able to tell you that."
    target = OpeningDifference(first={one.prompt_id: refusal for one in prompts})
    rendered = [render_prompt(bundle.tokenizer, one) for one in prompts]
    return bundle, target_rows(bundle, target, rendered), rendered


@pytest.fixture(scope="module", params=["demo", "demo-random"])
def demo(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, demo_case(request.param, 8)


def test_estimates_rank_as_exact_effects_and_find_tuned_experts(demo: tuple[str, Any]) -> None:
    name, case = demo
    found = attribute(*case, num_checked=16)
    assert found.agreement is not None
    assert found.agreement.n == 16
    assert found.agreement.spearman > 0.6
    for key, exact in zip(found.agreement.experts[:1], found.agreement.exact[:1], strict=True):
        with steer(case[0].model, without(SteeringPlan(), key, "drop")):
            steered = measure_target(*case)
        assert exact == pytest.approx((steered - measure_target(*case)).mean(), abs=1e-5)
    tuned = {(layer, expert) for layer, own in tuned_experts(name).items() for expert in own}
    lowest = [found.experts[at] for at in np.argsort(found.means)[:5]]
    assert sum((key.layer, key.expert) in tuned for key in lowest) >= 4


def test_the_integrated_form_follows_large_effects(demo: tuple[str, Any]) -> None:
    _, case = demo
    first = attribute(*case, num_checked=0)
    half = attribute(*case, num_checked=0, integrated_steps=4, seed=1)
    largest = np.argsort(-np.abs(first.means))[:12]
    exact = []
    baseline = measure_target(*case)
    np.testing.assert_allclose(half.baseline, baseline, atol=1e-4)
    for at in largest:
        with steer(case[0].model, without(SteeringPlan(), first.experts[at], "drop")):
            exact.append((measure_target(*case) - baseline).mean())

    assert spearmanr(half.means[largest], exact).statistic > 0.8
    assert np.corrcoef(half.means[largest], exact)[0, 1] > 0.9


@pytest.mark.parametrize("mode", ["drop", "drop_renorm", "replace"])
def test_the_integrated_form_comes_nearer_to_a_cause_that_a_norm_bends(mode: Any) -> None:
    """The planted expert writes so much that the final norm holds the target up till late."""
    planted = expert_refusal()
    assert planted.refusal_expert is not None
    bundle = ModelBundle(planted.model, planted.tokenizer, "planted", None, "qwen3_moe")
    prompts = [
        Prompt(prompt_id=at, text=text, set_name="s", expected=answer)
        for at, (text, answer) in enumerate(zip(planted.prompts, planted.answers, strict=True))
    ][:6]
    rendered = [render_prompt(bundle.tokenizer, one) for one in prompts]
    target = OpeningDifference(
        first={one.prompt_id: planted.refusal for one in prompts}, num_tokens=1
    )
    rows = target_rows(bundle, target, rendered)
    at = planted.refusal_expert[0] * 8 + planted.refusal_expert[1]
    found = attribute(bundle, rows, rendered, mode=mode, integrated_steps=8, num_checked=0)
    first = attribute(bundle, rows, rendered, mode=mode, num_checked=0)
    with steer(bundle.model, without(SteeringPlan(), found.experts[at], mode)):
        exact = (measure_target(bundle, rows, rendered) - found.baseline).mean()
    assert abs(found.means[at] - exact) < abs(first.means[at] - exact)
    assert found.means[at] < -1


def test_passes_are_counted_and_asked_for(tiny_bundle: Any) -> None:
    prompts = [Prompt(prompt_id=at, text="abc" * (at + 1), set_name="s") for at in range(3)]
    rendered = [render_prompt(tiny_bundle.tokenizer, one) for one in prompts]
    case = tiny_bundle, target_rows(tiny_bundle, PromptLoss(), rendered), rendered
    done: list[tuple[int, int]] = []
    options: dict[str, Any] = {"integrated_steps": 2, "num_checked": 0}
    one = attribute(*case, **options, progress=lambda *at: done.append(at))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert one.cost == 9
    apart = attribute(*case, **options, tokens_per_batch=1)
    np.testing.assert_allclose(one.values, apart.values, atol=1e-4)
    other = attribute(*case, **options, seed=1)
    assert np.abs(one.values - other.values).max() > 1e-6
    with pytest.raises(InputError, match="at least 1 pass"):
        attribute(*case, integrated_steps=0)
