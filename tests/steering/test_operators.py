"""Plans turned into router edits: hand-computed cases and the formula of SteerMoE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moescope.kernels.route import RoutingRule, select
from moescope.steering import Intervention
from moescope.steering.interventions import known_fields
from moescope.steering.operators import OPERATORS, edits_of
from moescope.steering.plan import Force, Mask

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
RULE = RoutingRule(num_experts=4, top_k=2, renormalize=True)
PLAIN = RoutingRule(num_experts=4, top_k=2, renormalize=False)


def where(*experts: int, num_experts: int = 4) -> Tensor:
    found = torch.zeros(num_experts, dtype=torch.bool)
    found[list(experts)] = True
    return found


def steered(rule: RoutingRule, *requests: tuple[dict[str, object], tuple[int, ...]]) -> object:
    edits = edits_of(
        (Intervention(layer=0, experts=experts, **fields), where(*experts))
        for fields, experts in requests
    )
    weights, ids = select(LOGITS, rule, edits)
    return ids[0].tolist(), [round(float(weight), 4) for weight in weights[0]]


def test_every_action_of_the_plan_format_has_an_operator() -> None:
    assert set(OPERATORS) == set(known_fields())
    shown = {
        one.setting: OPERATORS[one.action].shown_by(one)
        for one in (
            Intervention(action="mask", layer=0, experts=[1]),
            Intervention(action="force", layer=0, experts=[1]),
            Intervention(action="bias", layer=0, experts=[1], value=-0.5, unit="std"),
            Intervention(action="scale", layer=0, experts=[1], value=0),
            Intervention(action="scale", layer=0, experts=[1], value=4, renormalize=True),
            Intervention(action="top_k", layer=0, value=1),
            Intervention(action="top_p", layer=0, value=0.25),
            Intervention(action="replay", layers=[0, 1], run="base"),
        )
    }
    assert shown == {
        "mask via min": "not selected", "force max": "selected", "bias -0.5 std": "not selected",
        "scale x0": "not selected", "scale x4 renormalized": "selected", "top_k 1": "number",
        "top_p 0.25": "probability", "replay of base": "replayed",
    }  # fmt: skip


def test_hand_computed_masks() -> None:
    # Unsteered: experts 0 and 1 at 2 and 1, so weights 1/(1 + e^-1) = .7311 and .2689.
    assert steered(RULE) == ([0, 1], [0.7311, 0.2689])
    # Expert 0 out: 1 and 2 at 1 and 0, the same ratio, however the logit is put aside.
    for via in ("min", "inf", "selection"):
        request = ({"action": "mask", "via": via}, (0,))
        assert steered(RULE, request) == ([1, 2], [0.7311, 0.2689])
    # Not renormalized the way matters: e, 1 and e^-1 for experts 1 to 3, and for expert 0
    # e^-1.01 by min (sum 4.4504), 0 by inf (sum 4.0862), e^2 by selection (sum 11.4752).
    assert steered(PLAIN, ({"action": "mask", "via": "min"}, (0,))) == ([1, 2], [0.6108, 0.2247])
    assert steered(PLAIN, ({"action": "mask", "via": "inf"}, (0,))) == ([1, 2], [0.6652, 0.2447])
    assert steered(PLAIN, ({"action": "mask", "via": "selection"}, (0,))) == (
        [1, 2],
        [0.2369, 0.0871],
    )


def test_hand_computed_forces() -> None:
    # At max + 0.01 expert 3 is first: weights e^.01/(e^.01 + 1) = .5025 and .4975.
    request = ({"action": "force"}, (3,))
    assert steered(RULE, request) == ([3, 0], [0.5025, 0.4975])
    # With its own weight: e^-1 against e^2, so .0474 and .9526; forced ones come first.
    request = ({"action": "force", "strength": "natural"}, (3,))
    assert steered(RULE, request) == ([3, 0], [0.0474, 0.9526])


def test_edits_of_one_kind_unite_and_kinds_stay_apart() -> None:
    edits = edits_of([
        (Intervention(action="mask", layer=0, experts=[0]), where(0)),
        (Intervention(action="mask", layer=0, experts=[2]), where(2)),
        (Intervention(action="force", layer=0, experts=[3], strength="natural"), where(3)),
        (Intervention(action="mask", layer=0, experts=[1], via="inf"), torch.eye(4).bool()[1:3]),
    ])  # fmt: skip
    assert edits.mask_min is not None
    assert edits.mask_min.tolist() == [True, False, True, False]
    assert edits.force_natural is not None
    assert edits.force_natural.tolist() == [False, False, False, True]
    assert edits.mask_inf is not None
    assert edits.mask_inf.shape == (2, 4)
    assert edits.force_max is None
    assert edits.mask_selection is None
    assert list(edits_of([]).present()) == []


def steermoe(
    logits_TE: Tensor, forced: list[int], masked: list[int], top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """SteerMoE as published: scores edited in log-softmax space, then the untouched router."""
    scores_TE = torch.log_softmax(logits_TE.double(), dim=-1)
    highest_T1 = scores_TE.max(dim=-1, keepdim=True).values
    lowest_T1 = scores_TE.min(dim=-1, keepdim=True).values
    scores_TE[:, forced] = highest_T1 + 0.01
    scores_TE[:, masked] = lowest_T1 - 0.01
    probs_TE = torch.softmax(scores_TE, dim=-1)
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, ids_TK


#: Without and with more masked than a plan may without fill_up: 3 and 0 of 32 left for 4 slots.
SETS = [([3], []), ([], [5, 9]), ([1, 7], [0, 2, 30, 31]), ([], list(range(29))),
        ([30, 31], list(range(30))), ([], list(range(32)))]  # fmt: skip


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("forced", "masked", "fill_up"),
    [(*one, fill_up) for one in SETS for fill_up in (False, True) if fill_up or len(one[1]) < 29],
)
def test_min_masks_and_max_forces_are_steermoe(
    renormalize: bool, forced: list[int], masked: list[int], fill_up: bool
) -> None:
    generator = torch.Generator().manual_seed(len(forced) + 10 * len(masked))
    logits_TE = 3 * torch.randn(500, 32, generator=generator)
    rule = RoutingRule(num_experts=32, top_k=4, renormalize=renormalize, weight_dtype="float32")
    requests = []
    if forced:
        made = Intervention(action="force", layer=0, experts=forced)
        assert isinstance(made, Force)
        requests.append((made, where(*forced, num_experts=32)))
    if masked:
        made = Intervention(action="mask", layer=0, experts=masked, fill_up=fill_up)
        assert isinstance(made, Mask)
        requests.append((made, where(*masked, num_experts=32)))
    weights_TK, ids_TK = select(logits_TE, rule, edits_of(requests))
    expected_weights_TK, expected_ids_TK = steermoe(logits_TE, forced, masked, 4, renormalize)
    dense, expected = torch.zeros(2, 500, 32, dtype=torch.float64)
    dense.scatter_(1, ids_TK, weights_TK.double())
    expected.scatter_(1, expected_ids_TK, expected_weights_TK)
    # Masked experts tie: which of them fill up is the sort's affair, with what weight is not.
    filled_T = (expected[:, masked] > 0).sum(1)
    assert torch.equal((dense[:, masked] > 0).sum(1), filled_T)
    assert (filled_T == max(0, 4 - (32 - len(masked)))).all()
    for part in (dense, expected):
        part[:, masked] = part[:, masked].sort(dim=1).values
    assert (dense - expected).abs().max() < 1e-6
    assert torch.equal(dense > 0, expected > 0)


def test_hand_computed_fill_up() -> None:
    # One expert left for two slots: 2 takes one, and the other goes to a masked one at
    # -1 - 0.01; e^0 against e^-1.01 is .7330 against .2670.
    ids, weights = steered(RULE, ({"action": "mask", "fill_up": True}, (0, 1, 3)))
    assert ids[0] == 2 and ids[1] in (0, 1, 3)
    assert weights == [0.733, 0.267]
    # Two are left for two slots: nothing differs from the mask that never gives in.
    request = {"action": "mask", "fill_up": True}, (0, 1)
    assert steered(RULE, request) == steered(RULE, ({"action": "mask"}, (0, 1)))
