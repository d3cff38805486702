"""`select` against hand-computed cases and against the formulas it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.kernels.route import Edits, RoutingRule, select, selection_scores

LOGITS = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))


def rule(renormalize: bool = True, top_k: int = 2, num_experts: int = 4) -> RoutingRule:
    return RoutingRule(num_experts=num_experts, top_k=top_k, renormalize=renormalize)


def where(*experts: int, num_experts: int = 4) -> torch.Tensor:
    mask = torch.zeros(num_experts, dtype=torch.bool)
    mask[list(experts)] = True
    return mask


def test_softmax_topk_by_hand() -> None:
    weights, ids = select(LOGITS, rule(renormalize=False))
    assert ids.tolist() == [[3, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]]))
    weights, _ = select(LOGITS, rule())
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7]]))


def test_selection_mask_lets_the_next_expert_in_with_its_own_score() -> None:
    weights, ids = select(LOGITS, rule(renormalize=False), Edits(mask_selection=where(3)))
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.3, 0.2]]))


def test_infinite_mask_takes_the_expert_out_of_the_softmax() -> None:
    weights, ids = select(LOGITS, rule(renormalize=False), Edits(mask_inf=where(3)))
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.3, 0.2]]) / 0.6)


def test_minimum_mask_and_maximum_force_follow_steermoe() -> None:
    """arXiv 2509.09660: on s = log_softmax(z), max + 0.01 and min - 0.01, then softmax."""
    torch.manual_seed(0)
    logits = torch.randn(50, 8) * 3
    forced, masked = where(5, num_experts=8), where(0, 3, num_experts=8)
    s = torch.log_softmax(logits, dim=-1)
    high, low = s.amax(-1, keepdim=True) + 0.01, s.amin(-1, keepdim=True) - 0.01
    s = torch.where(masked, low, torch.where(forced, high, s))
    probabilities = torch.softmax(s, dim=-1)
    expected = probabilities.topk(3, dim=-1)

    weights, ids = select(logits, rule(False, 3, 8), Edits(force_max=forced, mask_min=masked))

    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(weights, expected.values)
    assert (ids[:, 0] == 5).all()
    # Where an unedited expert was the largest, the forced one now beats it by a factor e^0.01.
    natural = ~torch.isin(logits.argmax(-1), torch.tensor([0, 3, 5]))
    ratio = (weights[:, 0] / weights[:, 1])[natural]
    assert len(ratio) > 20
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.01005))


def test_natural_force_keeps_the_weight_of_its_own_score() -> None:
    weights, ids = select(LOGITS, rule(renormalize=False), Edits(force_natural=where(0)))
    assert ids.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.1, 0.4]]))


def test_edits_may_differ_by_token() -> None:
    per_token = torch.stack([where(3), where()])
    _, ids = select(LOGITS.expand(2, 4), rule(), Edits(mask_inf=per_token))
    assert ids.tolist() == [[2, 1], [3, 2]]


def test_empty_edits_change_nothing_to_the_bit() -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    plain, empty = select(logits, rule(True, 2, 8)), select(logits, rule(True, 2, 8), Edits())
    assert torch.equal(plain[0], empty[0]) and torch.equal(plain[1], empty[1])


@given(
    seed=st.integers(0, 10_000), top_k=st.integers(1, 4), renormalize=st.booleans(),
    via=st.sampled_from(["mask_min", "mask_inf", "mask_selection"]),
    force=st.sampled_from(["force_max", "force_natural"]),
)  # fmt: skip
@settings(deadline=None)
def test_masked_never_forced_always(
    seed: int, top_k: int, renormalize: bool, via: str, force: str
) -> None:
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) * 4
    edits = Edits(**{via: where(1, 6, num_experts=8), force: where(4, num_experts=8)})
    weights, ids = select(logits, rule(renormalize, top_k, 8), edits)
    assert not torch.isin(ids, torch.tensor([1, 6])).any()
    assert (ids == 4).any(dim=-1).all()
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    assert all(len(set(row)) == top_k for row in ids.tolist())
    if renormalize:
        torch.testing.assert_close(weights.sum(-1), torch.ones(16))


def test_scores_are_a_softmax_in_float32() -> None:
    scores = selection_scores(LOGITS.to(torch.bfloat16), rule())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(-1), torch.ones(1))


def test_a_rule_that_no_router_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot select 5"):
        rule(top_k=5)
