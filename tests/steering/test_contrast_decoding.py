"""Self-contrast decoding: its scores by hand, one rank at the experts, its cache, its refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moescope.probe import record
from moescope.probe.errors import InputError, MoescopeError, PlanError
from moescope.probe.generation import pad_left
from moescope.probe.zoo import tiny_model as tiny_of_zoo
from moescope.steering import SteeringPlan, steer
from moescope.steering.contrast_decoding import (
    SelfContrast,
    contrast_scores,
    contrasting,
    only_rank,
)

PROMPTS = ([7, 91, 33, 120, 5], [201, 14])
PAD = 257


@pytest.fixture(scope="module")
def qwen(tiny_model: Any) -> Any:
    return tiny_model("qwen3_moe", norm_topk_prob=True, eos_token_id=None)


@pytest.fixture(scope="module")
def olmoe(tiny_model: Any) -> Any:
    return tiny_model("olmoe", eos_token_id=None)


def inputs() -> dict[str, Any]:
    batch = pad_left(PROMPTS, PAD)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def generate(model: Any, **more: Any) -> list[list[int]]:
    settings = inputs() | {"do_sample": False, "max_new_tokens": 5, "pad_token_id": PAD} | more
    found: Tensor = model.generate(**settings)
    return found[:, 5:].tolist()


def hooks_of(model: Any) -> list[Any]:
    return [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()] + [
        "generate" in model.__dict__
    ]


@contextmanager
def widths(model: Any) -> Iterator[list[int]]:
    """Tokens that each forward of the model reads."""
    seen: list[int] = []

    def hook(_module: Any, _args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def test_scores_by_hand() -> None:
    strong = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weak = torch.tensor([[1.0, -2.0, 0.0, 5.0]])
    found = contrast_scores(strong, weak, alpha=0.1, beta=0.5)
    # ln 0.1 = -2.303: the bound is -0.303, so the last one is out.
    assert found.tolist() == [[2.5, 2.5, 0.0, -math.inf]]


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=8),
    st.integers(0, 2**31),
    st.floats(0.01, 1),
    st.floats(0, 3),
)
def test_the_best_strong_token_stays_and_only_implausible_ones_go(
    strong: list[float], seed: int, alpha: float, beta: float
) -> None:
    z = torch.tensor([strong], dtype=torch.float64)
    weak = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
    found = contrast_scores(z, weak, alpha=alpha, beta=beta)
    kept = found > -math.inf
    assert kept[0, z.argmax()]
    share = (z - z.max()).exp()
    assert kept[share > alpha * (1 + 1e-9)].all()
    assert not kept[share < alpha * (1 - 1e-9)].any()
    assert torch.allclose(found[kept], (z + beta * (z - weak))[kept])


@pytest.mark.parametrize("rank", [None, 0, 1, 6])
def test_every_token_uses_the_expert_of_one_rank(qwen: Any, olmoe: Any, rank: int | None) -> None:
    for model in (qwen, olmoe):
        for weight in ("renormalized", "own"):
            with torch.no_grad(), record(model) as trace, only_rank(model, rank, weight=weight):
                model(**inputs())
            for layer in (0, 1, 2):
                probs = trace[layer].logits.softmax(-1)
                expected = probs.sort(dim=-1, descending=True)
                wanted = 2 if rank is None else rank
                assert torch.equal(trace[layer].expert_ids[:, 0], expected.indices[:, wanted])
                assert trace[layer].expert_ids.shape[1] == 1
                is_one = weight == "renormalized" or model is qwen
                weights = torch.ones(10) if is_one else expected.values[:, wanted]
                assert torch.allclose(trace[layer].weights[:, 0], weights)


@pytest.mark.parametrize(
    ("family", "factor"),
    [("deepseek_v3", None), ("gpt_oss", 1.0), ("phimoe", 1.0), ("longcat_flash", None)],
)
def test_other_routing_rules_have_ranks_too(family: str, factor: float | None) -> None:
    tiny = tiny_of_zoo(family)
    with torch.no_grad(), record(tiny.model) as own:
        tiny.model(**tiny.inputs)
    first = own.layers[0]
    with torch.no_grad(), record(tiny.model) as trace, only_rank(tiny.model, 0):
        tiny.model(**tiny.inputs)
    scale = first.rule.scale if factor is None and not first.rule.scale_in_block else 1.0
    used = trace[first.layer].weights.amax(-1)
    assert torch.allclose(used, torch.full_like(used, scale))
    chosen = own[first.layer].expert_ids
    assert (chosen == trace[first.layer].expert_ids[:, :1]).any(-1).all()


def test_the_weak_forward_reads_one_token_with_its_cache_and_all_without(qwen: Any) -> None:
    with widths(qwen) as seen, contrasting(qwen):
        cached = generate(qwen)
    assert seen == [5, 5, 1, 1, 1, 1, 1, 1, 1, 1]
    with widths(qwen) as seen, contrasting(qwen, use_cache=False):
        plain = generate(qwen, use_cache=False)
    assert seen == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    assert plain == cached


def test_without_discount_greedy_choice_is_the_models_own(qwen: Any) -> None:
    own = generate(qwen)
    with contrasting(qwen, SelfContrast(beta=0.0)):
        assert generate(qwen) == own
    with contrasting(qwen, SelfContrast(alpha=1.0, beta=3.0)):
        assert generate(qwen) == own


def test_sampling_several_sequences_of_each_prompt_repeats_with_its_seed(qwen: Any) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        with contrasting(qwen):
            drawn.append(generate(qwen, do_sample=True, num_return_sequences=3))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 6


def test_a_second_call_begins_anew(qwen: Any) -> None:
    with contrasting(qwen):
        assert generate(qwen) == generate(qwen)


def test_nothing_is_left_behind_also_on_failure(qwen: Any) -> None:
    hooks = hooks_of(qwen)
    own = generate(qwen)
    with contrasting(qwen):
        generate(qwen)
    assert hooks_of(qwen) == hooks
    plan = SteeringPlan(interventions=[{"action": "mask", "layer": 1, "experts": [0]}])
    with pytest.raises(PlanError, match="steered by"), steer(qwen, plan), contrasting(qwen):
        generate(qwen)
    assert hooks_of(qwen) == hooks
    with pytest.raises(RuntimeError), only_rank(qwen):
        raise RuntimeError
    assert hooks_of(qwen) == hooks
    assert generate(qwen) == own


def test_what_cannot_be_done_is_refused_before_a_token_is_made(qwen: Any) -> None:
    for wrong in ({"rank": -1}, {"alpha": 0.0}, {"alpha": 1.5}, {"beta": -1.0}, {"weight": "half"}):
        with pytest.raises(PlanError):
            SelfContrast(**wrong)
    with pytest.raises(PlanError, match="no rank 8"), contrasting(qwen, SelfContrast(rank=8)):
        pass
    with widths(qwen) as seen, contrasting(qwen):
        with pytest.raises(InputError, match="num_beams"):
            generate(qwen, num_beams=2)
        with pytest.raises(InputError, match="attention_mask"):
            generate(qwen, attention_mask=None)
        with pytest.raises(InputError, match="pixel_values"):
            generate(qwen, pixel_values=torch.zeros(1))
        with pytest.raises(InputError, match="token ids"):
            qwen.generate(inputs_embeds=torch.zeros(1, 2, 32))
    assert not seen


@pytest.mark.parametrize("family", ["switch_transformers", "doge"])
def test_routers_without_ranks_are_refused(family: str) -> None:
    with pytest.raises(PlanError), contrasting(tiny_of_zoo(family).model):
        pass


def test_dense_models_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(MoescopeError), contrasting(LlamaForCausalLM(config)):
        pass
