"""KL along unsteered answers: against token-by-token decoding, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from moescope.probe.generation import Answer
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.probe.routers import verify_routers
from moescope.steering import SteeringPlan, steer
from moescope.steering.side_effects import divergences

ANSWERS = [Answer((70, 71, 72, 256), "x", True), Answer((80,), "y", False),
           Answer((90, 91), "z", False)]  # fmt: skip


@pytest.fixture(scope="module")
def rendered(tiny_bundle: Any) -> list[RenderedPrompt]:
    texts = ("Where is the ring?", "Hi", "What happened in the town in 1868?")
    return [
        render_prompt(tiny_bundle.tokenizer, Prompt(prompt_id=at, text=text, set_name="t"))
        for at, text in enumerate(texts)
    ]


def plan(**change: Any) -> SteeringPlan:
    fields = {"action": "mask", "layer": 1, "experts": [0, 1, 2, 3], **change}
    return SteeringPlan(interventions=[fields])


def stepwise(
    bundle: Any, prompt: RenderedPrompt, answer: Answer, steered: SteeringPlan | None
) -> torch.Tensor:
    """Next-token log-probabilities, decoding by hand with a cache: float32[A, V]."""
    from transformers import DynamicCache

    def run() -> torch.Tensor:
        cache = DynamicCache(config=bundle.model.config)
        ids = torch.tensor([prompt.token_ids])
        found = [bundle.model(input_ids=ids, past_key_values=cache).logits[0, -1]]
        for token in answer.token_ids[:-1]:
            output = bundle.model(input_ids=torch.tensor([[token]]), past_key_values=cache)
            found.append(output.logits[0, -1])
        return torch.stack(found).log_softmax(-1)

    with torch.no_grad():
        if steered is None:
            return run()
        with steer(bundle.model, steered):
            return run()


def found(
    bundle: Any, rendered: Sequence[RenderedPrompt], chosen: SteeringPlan, **options: Any
) -> list[tuple[float, float]]:
    sites = verify_routers(bundle.model, torch.tensor([rendered[0].token_ids]))
    result = divergences(bundle, chosen, rendered, ANSWERS, sites=sites, **options)
    assert [one.num_tokens for one in result] == [4, 1, 2]
    return [(one.first, one.answer) for one in result]


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated", "last_prompt"])
@pytest.mark.parametrize("tokens_per_batch", [1, 1000])
def test_divergences_equal_decoding_one_by_one(
    tiny_bundle: Any, rendered: list[RenderedPrompt], tokens: str, tokens_per_batch: int
) -> None:
    chosen = plan(tokens=tokens)
    result = found(tiny_bundle, rendered, chosen, tokens_per_batch=tokens_per_batch)
    for pair, prompt, answer in zip(result, rendered, ANSWERS, strict=True):
        before = stepwise(tiny_bundle, prompt, answer, None)
        after = stepwise(tiny_bundle, prompt, answer, chosen)
        kl_A = (before.exp() * (before - after)).sum(-1)
        assert pair == pytest.approx((float(kl_A[0]), float(kl_A.mean())), abs=2e-5)
    if tokens == "generated":
        assert [first for first, _ in result] == pytest.approx([0.0] * 3, abs=1e-6)
        assert result[1][1] == pytest.approx(0.0, abs=1e-6)
        assert result[0][1] > 0.01
    else:
        assert min(first for first, _ in result) > 0.001


def test_an_unchanged_model_has_exactly_none(
    tiny_bundle: Any, rendered: list[RenderedPrompt]
) -> None:
    assert found(tiny_bundle, rendered, SteeringPlan()) == [(0.0, 0.0)] * 3
    outside = plan(tokens={"first_generated": 1}, experts=[7])
    first_only = found(tiny_bundle, rendered, outside)
    assert [first for first, _ in first_only] == [0.0] * 3
    assert divergences(tiny_bundle, plan(), [], [], sites=[]) == []
