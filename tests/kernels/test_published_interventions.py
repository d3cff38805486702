"""The interventions of papers, written down from their formulas alone, against `select`.

SteerMoE (arXiv 2509.09660), soft and hard steering of Bandarkar et al. (arXiv 2510.04694), MoTE:
on random logits, in float64, for the kinds of routers on which they are defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescope.kernels.route import Edits, RoutingRule, select

T, E, K = 400, 32, 4

#: What a router does with its logits: `(weights[T, E] or scores, how K of them are weighted)`.
Router = Callable[[Tensor], tuple[Tensor, Tensor]]


def softmax_then_topk(z: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """OLMoE (not renormalized), Qwen3-MoE, Mixtral (renormalized)."""
    top = torch.softmax(z, -1).topk(K, -1)
    weights = top.values / top.values.sum(-1, keepdim=True) if renormalize else top.values
    return weights, top.indices


def topk_then_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """gpt-oss, Granite."""
    top = z.topk(K, -1)
    return torch.softmax(top.values, -1), top.indices


def sigmoid_topk(z: Tensor) -> tuple[Tensor, Tensor]:
    """GLM, DeepSeek-V3 without bias and groups."""
    top = torch.sigmoid(z).topk(K, -1)
    return top.values / top.values.sum(-1, keepdim=True), top.indices


def topk_then_sigmoid(z: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4."""
    top = z.topk(K, -1)
    return torch.sigmoid(top.values), top.indices


ROUTERS: dict[str, tuple[Router, dict[str, Any]]] = {
    "softmax": (lambda z: softmax_then_topk(z, False), {"renormalize": False}),
    "softmax renormalized": (lambda z: softmax_then_topk(z, True), {"renormalize": True}),
    "softmax of the chosen": (
        topk_then_softmax,
        {"renormalize": False, "score": "identity", "weights": "softmax_topk"},
    ),
    "sigmoid renormalized": (sigmoid_topk, {"renormalize": True, "score": "sigmoid"}),
    "sigmoid of the chosen": (
        topk_then_sigmoid,
        {"renormalize": False, "score": "identity", "weights": "sigmoid_topk"},
    ),
}
SHIFT_INVARIANT = ("softmax", "softmax renormalized", "softmax of the chosen")
SETS = [([3], []), ([], [5, 9]), ([1, 7], [0, 2, 30, 31]), ([4, 8, 15, 16], list(range(17, 32)))]
#: Masks that leave 4, 3, 1 and none of 32, beside those.
NARROW = [([], list(range(28))), ([], list(range(29))), ([3], [0, 1, 2, *range(4, 32)]),
          ([], list(range(32)))]  # fmt: skip


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(T, E, generator=torch.Generator().manual_seed(seed))


def where(experts: list[int]) -> Tensor | None:
    if not experts:
        return None
    found = torch.zeros(E, dtype=torch.bool)
    found[experts] = True
    return found


def dense(weights: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros(T, E, dtype=torch.float64).scatter(1, ids, weights.double())


def selected(ids: Tensor) -> Tensor:
    return torch.zeros(T, E).scatter(1, ids, 1.0)


def ours(name: str, z: Tensor, edits: Edits, **more: Any) -> tuple[Tensor, Tensor]:
    rule = RoutingRule(num_experts=E, top_k=K, weight_dtype="float32", **ROUTERS[name][1] | more)
    return select(z, rule, edits)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(selected(found[1]), selected(expected[1]))
    torch.testing.assert_close(dense(*found), dense(*expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
@pytest.mark.parametrize(("forced", "masked"), SETS)
def test_steermoe(name: str, forced: list[int], masked: list[int]) -> None:
    """Section 3: log-softmax scores, forced to max + 0.01, masked to min - 0.01, both of before."""
    z = logits(len(forced) + 10 * len(masked))
    scores = torch.log_softmax(z.double(), -1)
    highest, lowest = scores.max(-1, keepdim=True).values, scores.min(-1, keepdim=True).values
    scores[:, forced] = highest + 0.01
    scores[:, masked] = lowest - 0.01
    found = ours(name, z, Edits(force_max=where(forced), mask_min=where(masked)))
    assert_same(found, ROUTERS[name][0](scores))


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
@given(
    seed=st.integers(0, 2**31), spread=st.floats(0.1, 6),
    roles=st.lists(st.sampled_from([-1, -1, -1, 0, 1]), min_size=E, max_size=E)
    | st.sampled_from([[1 if e in forced else -1 if e in masked else 0 for e in range(E)]
                       for forced, masked in SETS + NARROW]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_steermoe_fills_up_with_masked_experts(
    name: str, seed: int, spread: float, roles: list[int]
) -> None:
    """The same with however few left: the untouched router takes the best of what there is."""
    forced = [expert for expert, role in enumerate(roles) if role > 0][:K]
    masked = [expert for expert, role in enumerate(roles) if role < 0]
    z = spread * torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    scores = torch.log_softmax(z.double(), -1)
    highest, lowest = scores.max(-1, keepdim=True).values, scores.min(-1, keepdim=True).values
    scores[:, forced] = highest + 0.01
    scores[:, masked] = lowest - 0.01
    weights, ids = ours(name, z, Edits(force_max=where(forced), mask_fill_up=where(masked)))
    theirs = ROUTERS[name][0](scores)
    num_filled = max(0, K - (E - len(masked)))
    assert (torch.isin(ids, torch.tensor(masked)).sum(-1) == num_filled).all()
    # Masked experts tie; which of them come in, no paper says. Their weights are compared.
    found, expected = dense(weights, ids), dense(*theirs)
    for part in (found, expected):
        part[:, masked] = part[:, masked].sort(-1).values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_steermoe_forces_take_the_top_weight_by_a_hundredth() -> None:
    """A forced expert's weight is e^0.01 times that of the best natural one."""
    z = logits(0)
    weights, ids = ours("softmax", z, Edits(force_max=where([3])))
    natural = (z.argmax(-1) != 3) & (ids[:, 0] == 3)
    assert natural.sum() > T // 2
    ratio = weights[natural, 0] / weights[natural, 1]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.0100502), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("strength", [0.5, -0.5, 1.0])
def test_bandarkar_soft(name: str, strength: float) -> None:
    """z + strength * std(z), the population standard deviation of the token's logits."""
    z, experts = logits(1), [2, 11, 19]
    steered = z.double().clone()
    spread = ((steered - steered.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True).sqrt()
    steered[:, experts] += strength * spread
    at = where(experts)
    assert at is not None
    assert_same(ours(name, z, Edits(bias_std=at * strength)), ROUTERS[name][0](steered))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(("forced", "masked"), SETS)
def test_bandarkar_hard(name: str, forced: list[int], masked: list[int]) -> None:
    """max(z) + e and min(z) - e, with e so small that it only breaks ties; ours is e = 0.01."""
    z = logits(2)
    highest = z.double().max(-1, keepdim=True).values
    lowest = z.double().min(-1, keepdim=True).values
    found = ours(name, z, Edits(force_max=where(forced), mask_min=where(masked)))
    steered = z.double().clone()
    steered[:, forced], steered[:, masked] = highest + 0.01, lowest - 0.01
    assert_same(found, ROUTERS[name][0](steered))
    noise = 1e-6 * torch.rand(T, E, generator=torch.Generator().manual_seed(3)).double()
    steered[:, forced] = (highest + noise)[:, forced]
    steered[:, masked] = (lowest - noise)[:, masked]
    weights, ids = ROUTERS[name][0](steered)
    assert torch.equal(selected(found[1]), selected(ids))
    assert (dense(*found) - dense(weights, ids)).abs().max() < 0.011


def test_bandarkar_on_a_router_with_a_selection_bias() -> None:
    """There the amount is added to the selection score, and weights stay those of the logits."""
    z, experts, strength = logits(4), [2, 11], 0.25
    bias = 0.1 * torch.randn(E, generator=torch.Generator().manual_seed(5))
    scores = torch.sigmoid(z.double())
    choice = scores + bias
    choice[:, experts] += strength * z.double().std(-1, correction=0, keepdim=True)
    ids = choice.topk(K, -1).indices
    weights = scores.gather(1, ids)
    at = where(experts)
    assert at is not None
    rule = RoutingRule(
        num_experts=E, top_k=K, renormalize=True, score="sigmoid", selection_bias="score"
    )
    found = select(z, rule, Edits(bias_selection_std=at * strength), bias_E=bias)
    assert_same(found, (weights / weights.sum(-1, keepdim=True), ids))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("suppressed", [[3], [0, 5, 9, 14, 20, 27], list(range(20))])
def test_mote_suppression(name: str, suppressed: list[int]) -> None:
    """The K of the router, weight 0 for the suppressed, the others sharing all of the weight."""
    z = logits(6)
    weights, ids = ROUTERS[name][0](z.double())
    total = weights.sum(-1, keepdim=True)
    left = weights.masked_fill(torch.isin(ids, torch.tensor(suppressed)), 0)
    rest = left.sum(-1, keepdim=True)
    expected = torch.where(rest > 0, left / rest * total, 0.0)
    found = ours(name, z, Edits(drop_renorm=where(suppressed)))
    assert torch.equal(selected(found[1]), selected(ids))
    torch.testing.assert_close(dense(*found), dense(expected, ids), rtol=1e-5, atol=1e-7)
    emptied = rest[:, 0] == 0
    assert (found[0][emptied] == 0).all()
    if len(suppressed) == 20:
        assert emptied.any()


def test_mote_keeps_a_routers_scale() -> None:
    z = logits(7)
    weights, ids = sigmoid_topk(z.double())
    left = weights.masked_fill(ids == 3, 0)
    expected = 1.7 * left / left.sum(-1, keepdim=True)
    found = ours("sigmoid renormalized", z, Edits(drop_renorm=where([3])), epsilon=1e-20, scale=1.7)
    torch.testing.assert_close(dense(*found), dense(expected, ids), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [2.0, 64.0])
def test_rice(factor: float) -> None:
    """The weight of a selected expert times a factor, nothing else."""
    z = logits(8)
    weights, ids = softmax_then_topk(z.double(), True)
    expected = torch.where(ids == 3, factor * weights, weights)
    at = where([3])
    assert at is not None
    found = ours("softmax renormalized", z, Edits(scale=torch.where(at, factor, 1.0)))
    torch.testing.assert_close(dense(*found), dense(expected, ids), rtol=1e-5, atol=1e-7)
