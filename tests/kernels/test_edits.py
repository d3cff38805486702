"""Every edit of `select`, by hand and as properties over rules of all kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescope.kernels.route import (
    Edits,
    Groups,
    RoutingRule,
    routing_probabilities,
    select,
    selection_scores,
    shared_weights,
)

#: Softmax gives .1, .2, .3, .4.
LOGITS = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
PLAIN = RoutingRule(num_experts=4, top_k=2, renormalize=False)
NORMED = replace(PLAIN, renormalize=True)


def at(*experts: int, num: int = 4) -> Tensor:
    found = torch.zeros(num, dtype=torch.bool)
    found[list(experts)] = True
    return found


def value(number: float, *experts: int, other: float = 0.0) -> Tensor:
    return torch.where(at(*experts), number, other)


BY_HAND: dict[str, tuple[RoutingRule, Edits, list[int], list[float]]] = {
    # e^ln5 makes .5 of .1, and all sum to 1.4.
    "bias": (PLAIN, Edits(bias=value(math.log(5), 0)), [0, 3], [0.5 / 1.4, 0.4 / 1.4]),
    "bias down": (PLAIN, Edits(bias=value(-math.log(4), 3)), [2, 1], [0.3 / 0.7, 0.2 / 0.7]),
    "bias of selection": (PLAIN, Edits(bias_selection=value(0.25, 1)), [1, 3], [0.2, 0.4]),
    "drop": (PLAIN, Edits(drop=at(3)), [3, 2], [0.0, 0.3]),
    "drop, normalized before": (NORMED, Edits(drop=at(3)), [3, 2], [0.0, 3 / 7]),
    "drop_renorm": (NORMED, Edits(drop_renorm=at(3)), [3, 2], [0.0, 1.0]),
    "drop_renorm keeps the sum .7": (PLAIN, Edits(drop_renorm=at(3)), [3, 2], [0.0, 0.7]),
    "drop of one not selected": (PLAIN, Edits(drop_renorm=at(0)), [3, 2], [0.4, 0.3]),
    "all dropped": (NORMED, Edits(drop_renorm=at(2, 3)), [3, 2], [0.0, 0.0]),
    "all dropped, not normalized": (PLAIN, Edits(drop_renorm=at(2, 3)), [3, 2], [0.0, 0.0]),
    "scale": (PLAIN, Edits(scale=value(3, 3, other=1)), [3, 2], [1.2, 0.3]),
    # 1.2 and .3 brought back to .7 in sum.
    "scale_renorm": (PLAIN, Edits(scale_renorm=value(3, 3, other=1)), [3, 2], [0.56, 0.14]),
    "scale by 0 with the sum kept": (
        PLAIN, Edits(scale_renorm=value(0, 3, other=1)), [3, 2], [0.0, 0.7],
    ),
    "three experts": (NORMED, Edits(top_k=3), [3, 2, 1], [4 / 9, 3 / 9, 2 / 9]),
    "one expert": (NORMED, Edits(top_k=1), [3], [1.0]),
    "top_p of one": (PLAIN, Edits(top_p=0.39), [3], [0.4]),
    "top_p of two": (PLAIN, Edits(top_p=0.5), [3, 2], [0.4, 0.3]),
    "top_p of all": (NORMED, Edits(top_p=1.0), [3, 2, 1, 0], [0.4, 0.3, 0.2, 0.1]),
    "top_p up to a limit": (PLAIN, Edits(top_p=0.95, top_p_limit=3), [3, 2, 1], [0.4, 0.3, 0.2]),
    # The masked expert's probability stays among the others; .3 and .2 reach .45.
    "top_p without a masked expert": (
        PLAIN, Edits(top_p=0.45, mask_selection=at(3)), [2, 1], [0.3, 0.2],
    ),
    "top_p with a forced expert": (
        PLAIN, Edits(top_p=0.05, force_natural=at(0, 1)), [1, 0], [0.2, 0.1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    rule, edits, expected_ids, expected_weights = BY_HAND[name]
    weights, ids = select(LOGITS, rule, edits)
    assert ids.tolist() == [expected_ids]
    torch.testing.assert_close(weights, torch.tensor([expected_weights]))


def test_a_bias_in_standard_deviations_is_of_the_tokens_logits_in_float32() -> None:
    # Population standard deviation of 0, 2, 4, 6 is sqrt(5); twice that is 4.47, between 4 and 6.
    logits = torch.tensor([[0.0, 2.0, 4.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    weights, ids = select(logits, PLAIN, Edits(bias_std=value(2.0, 0)))
    assert ids[0].tolist() == [3, 0]
    z = torch.tensor([2 * math.sqrt(5), 2.0, 4.0, 6.0])
    torch.testing.assert_close(weights[0], torch.softmax(z, 0)[[3, 0]])
    torch.testing.assert_close(weights[1], torch.tensor([0.25, 0.25]))  # no spread, no bias
    _, ids = select(logits, PLAIN, Edits(bias_selection_std=value(0.5, 0)))
    assert ids[0].tolist() == [0, 3]  # 1.118 beats every probability
    coarse = torch.tensor([[256.0, 257.0, 0.0, 0.0]], dtype=torch.bfloat16)
    rule = replace(PLAIN, weight_dtype="float32")
    exact, _ = select(coarse.float(), rule, Edits(bias_std=value(0.01, 1)))
    found, _ = select(coarse, rule, Edits(bias_std=value(0.01, 1)))
    assert torch.equal(found, exact)


def test_the_number_of_experts_may_differ_by_token() -> None:
    logits = LOGITS.expand(3, 4)
    edits = Edits(top_k=torch.tensor([1, 3, 2]), max_top_k=3)
    weights, ids = select(logits, NORMED, edits)
    assert ids.tolist() == [[3, 2, 1]] * 3
    expected = [[1, 0, 0], [4 / 9, 3 / 9, 2 / 9], [4 / 7, 3 / 7, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected))
    edits = Edits(top_p=torch.tensor([0.95, torch.nan, 0.1]))
    weights, _ = select(logits, PLAIN, edits)
    expected = [[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0, 0], [0.4, 0, 0, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_after_top_k_are_normalized_over_what_a_token_uses(renormalize: bool) -> None:
    rule = replace(PLAIN, score="identity", weights="softmax_topk", renormalize=renormalize)
    weights, _ = select(LOGITS, rule, Edits(drop_renorm=at(3)))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0]]))
    weights, _ = select(LOGITS, rule, Edits(drop_renorm=at(2, 3)))
    assert weights.tolist() == [[0.0, 0.0]]
    edits = Edits(top_k=torch.tensor([3]), max_top_k=4)
    weights, ids = select(LOGITS, rule, edits)
    assert ids.tolist() == [[3, 2, 1, 0]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 9, 3 / 9, 2 / 9, 0.0]]))


def test_a_replay_takes_the_given_routing_and_nothing_else() -> None:
    logits = LOGITS.expand(3, 4)
    ids = torch.tensor([[0, 1], [1, 3], [2, -1]])
    weights = torch.tensor([[0.9, 0.8], [0.7, 0.6], [0.5, 0.0]])
    found_weights, found_ids = select(
        logits[:2], PLAIN, Edits(replay_ids=ids[:2], replay_weights=weights[:2])
    )
    assert torch.equal(found_ids, ids[:2]) and torch.equal(found_weights, weights[:2])
    rows = torch.tensor([False, True, True])
    edits = Edits(
        replay_ids=ids, replay_weights=weights, replay_rows=rows, mask_min=at(3), force_max=at(1)
    )
    found_weights, found_ids = select(logits, PLAIN, edits)
    own_weights, own_ids = select(logits[:1], PLAIN, Edits(mask_min=at(3), force_max=at(1)))
    assert torch.equal(found_ids[:1], own_ids) and torch.equal(found_weights[:1], own_weights)
    assert found_ids[1].tolist() == [1, 3]
    assert torch.equal(found_weights[1], weights[1])
    assert found_ids[2].tolist()[0] == 2 and found_ids[2].tolist()[1] in (0, 1)
    assert found_weights[2].tolist() == [0.5, 0.0]


def test_wider_replays_leave_other_tokens_their_number_of_experts() -> None:
    logits = LOGITS.expand(2, 4)
    edits = Edits(
        replay_ids=torch.tensor([[0, 1, 2], [0, 1, 2]]), replay_weights=torch.full((2, 3), 0.5),
        replay_rows=torch.tensor([True, False]),
    )  # fmt: skip
    weights, ids = select(logits, NORMED, edits)
    assert ids.tolist() == [[0, 1, 2], [3, 2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.5], [4 / 7, 3 / 7, 0.0]]))


# Groups: experts 0-1, 2-3, 4-5, 6-7; scores fall from expert 0 on.
FALLING = torch.linspace(3, -4, 8)[None]
GROUPED = RoutingRule(
    num_experts=8, top_k=2, renormalize=True, score="sigmoid", selection_bias="score",
    groups=Groups(count=4, kept=1, score="top2_sum", fill="-inf"),
)  # fmt: skip
NO_BIAS = torch.zeros(8)


@pytest.mark.parametrize("fill", ["-inf", "0"])
@pytest.mark.parametrize("via", ["mask_min", "mask_inf", "mask_selection"])
def test_a_group_with_too_few_experts_is_filled_from_outside_never_with_masked(
    fill: Any, via: str
) -> None:
    rule = replace(GROUPED, groups=Groups(count=4, kept=1, score="top2_sum", fill=fill))
    masked = at(0, 2, 4, 6, num=8)  # one of each group
    weights, ids = select(FALLING, rule, Edits(**{via: masked}), bias_E=NO_BIAS)
    assert not torch.isin(ids, torch.tensor([0, 2, 4, 6])).any()
    assert len(set(ids[0].tolist())) == 2
    assert torch.isfinite(weights).all()


def test_a_selection_mask_is_a_selection_bias_of_minus_infinity() -> None:
    logits = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(8, generator=torch.Generator().manual_seed(3)) * 0.3
    rule = replace(GROUPED, groups=Groups(count=2, kept=1, score="top2_sum", fill="-inf"))
    expected = select(logits, rule, bias_E=bias.masked_fill(at(1, num=8), -torch.inf))
    found = select(logits, rule, Edits(mask_selection=at(1, num=8)), bias_E=bias)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("strength", ["force_max", "force_natural"])
def test_a_force_beats_groups_and_bias(strength: str) -> None:
    bias = torch.zeros(8).masked_fill(at(7, num=8), -1000.0)
    weights, ids = select(FALLING, GROUPED, Edits(**{strength: at(7, num=8)}), bias_E=bias)
    assert ids[0].tolist() == [7, 0]
    own = torch.sigmoid(torch.tensor([3.01 if strength == "force_max" else -4.0, 3.0]))
    torch.testing.assert_close(weights[0], own / own.sum())


def test_weights_read_from_filled_scores_keep_those_of_forced_experts() -> None:
    """DeepSeek-V2 reads weights from scores that are 0 outside the groups."""
    groups = Groups(count=4, kept=1, score="max", fill="0", masks_weights=True)
    rule = RoutingRule(num_experts=8, top_k=3, renormalize=False, groups=groups)
    probabilities = torch.softmax(FALLING, -1)[0]
    weights, ids = select(FALLING, rule, Edits(force_natural=at(6, num=8)))
    assert ids[0, :3].tolist() == [6, 0, 1]
    torch.testing.assert_close(weights[0], probabilities[[6, 0, 1]])


def test_tables_keep_their_ids_and_edits_change_them() -> None:
    rule = replace(NORMED, from_table=True)
    table = torch.tensor([[0, 2]])

    def chosen(edits: Edits | None) -> list[int]:
        _, ids = select(LOGITS, rule, edits, table_ids_TK=table)
        return [int(one) for one in ids[0]]

    assert chosen(None) == [0, 2]
    assert chosen(Edits(bias=value(9.0, 3))) == [0, 2]
    assert chosen(Edits(mask_min=at(0))) == [2, 3]
    assert chosen(Edits(mask_fill_up=at(0))) == [0, 2]
    assert chosen(Edits(mask_selection=at(2, 3))) == [0, 1]
    assert chosen(Edits(force_natural=at(1))) == [1, 0]
    assert chosen(Edits(top_k=1)) == [0]
    assert chosen(Edits(drop=at(0))) == [0, 2]
    weights, _ = select(LOGITS, rule, Edits(drop_renorm=at(0)), table_ids_TK=table)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0]]))


def test_capacity_counts_what_is_selected_after_masks() -> None:
    rule = RoutingRule(num_experts=3, top_k=1, renormalize=False, capacity=1)
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3]])

    def served(edits: Edits | None) -> list[tuple[int, bool]]:
        weights, ids = select(logits, rule, edits, rows_per_sequence=2)
        return [(int(one), bool(weight > 0)) for one, weight in zip(ids, weights, strict=True)]

    assert served(None) == [(0, True), (0, False), (0, True), (2, True)]
    first_only = at(0, num=3) & torch.tensor([[True], [False], [True], [False]])
    assert served(Edits(mask_inf=first_only)) == [(1, True), (0, True), (1, True), (2, True)]


def test_a_skipped_token_has_weight_0_and_a_masked_skip_is_never_taken() -> None:
    rule = RoutingRule(num_experts=4, top_k=1, renormalize=False, has_skip=True)
    weights, _ = select(LOGITS, rule)
    assert weights.tolist() == [[0.0]]
    weights, ids = select(LOGITS, rule, Edits(mask_selection=at(3)))
    assert ids.tolist() == [[2]]
    torch.testing.assert_close(weights, torch.tensor([[0.3]]))


def test_inkling_gives_shared_experts_what_routed_ones_leave() -> None:
    rule = replace(PLAIN, score="sigmoid", weights="logsigmoid_shared", scale=2.0)
    shared = torch.tensor([[0.0]])
    z = torch.tensor([[1.0, 0.0, -1.0, -2.0]])
    sigmoid = torch.sigmoid(torch.tensor([1.0, 0.0, 0.0]))
    weights, ids = select(z, rule, shared_logits_TS=shared)
    gammas = shared_weights(z, ids, rule, shared_logits_TS=shared)
    torch.testing.assert_close(torch.cat([weights, gammas], 1)[0], 2 * sigmoid / sigmoid.sum())
    edits = Edits(force_max=at(3))
    weights, ids = select(z, rule, edits, shared_logits_TS=shared)
    gammas = shared_weights(z, ids, rule, edits, shared_logits_TS=shared)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(torch.cat([weights, gammas], 1).sum(), torch.tensor(2.0))


def test_probabilities_sum_to_1_and_scores_carry_the_bias() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    for score in ("softmax", "sigmoid", "sqrtsoftplus", "identity"):
        rule = replace(PLAIN, score=score)
        found = routing_probabilities(z, rule)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(), torch.tensor(1.0))
        assert found[0].tolist() == sorted(found[0].tolist())
    rule = replace(PLAIN, score="sigmoid", selection_bias="score")
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
    expected = torch.sigmoid(z.float()) + bias
    torch.testing.assert_close(selection_scores(z, rule, bias_E=bias), expected)
    with pytest.raises(ValueError, match="bias_E"):
        selection_scores(z, rule)


@st.composite
def rules(draw: st.DrawFn) -> RoutingRule:
    """Rules of every kind that a family could have, 8 experts."""
    score, weights = draw(st.sampled_from([
        ("softmax", "score"), ("sigmoid", "score"), ("sqrtsoftplus", "score"),
        ("identity", "softmax_topk"), ("identity", "sigmoid_topk"), ("softmax", "sparsemixer"),
        ("sigmoid", "logsigmoid_shared"), ("probabilities", "scaled_probability"),
    ]))  # fmt: skip
    has_groups = score in ("softmax", "sigmoid") and weights == "score" and draw(st.booleans())
    groups = None
    if has_groups:
        count = draw(st.sampled_from([2, 4]))
        groups = Groups(
            count=count, kept=draw(st.integers(1, count - 1)),
            score=draw(st.sampled_from(["top2_sum", "max"])),
            fill=draw(st.sampled_from(["-inf", "0"])),
        )  # fmt: skip
    biases = ["none", "score"] if weights == "score" else ["none"]
    most = 3 if groups is None else min(3, groups.kept * 8 // groups.count)
    return RoutingRule(
        num_experts=8, top_k=draw(st.integers(1, most)), score=score, weights=weights,
        renormalize=weights in ("score", "scaled_probability") and draw(st.booleans()),
        selection_bias=draw(st.sampled_from(biases)), groups=groups,
        epsilon=draw(st.sampled_from([0.0, 1e-20])), scale=draw(st.sampled_from([1.0, 1.7])),
        arithmetic=draw(st.sampled_from(["float32", "native"])),
        sorted_ids=draw(st.booleans()), jitter=0.01, weight_dtype="float32",
    )  # fmt: skip


def routed(
    rule: RoutingRule,
    seed: int,
    edits: Edits | None = None,
    *,
    rows: int = 24,
    before: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> tuple[Tensor, Tensor]:
    """`select` on random tokens with everything that the rule needs; `before` changes logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 8, generator=generator) * 2
    bias = torch.randn(8, generator=generator) * 0.5
    shared = torch.randn(rows, 2, generator=generator)
    logits = before(logits)
    if rule.score == "probabilities":
        logits = torch.softmax(logits, -1)
    inputs: dict[str, Any] = {}
    if rule.selection_bias != "none":
        inputs["bias_E"] = bias
    if rule.weights == "logsigmoid_shared":
        inputs["shared_logits_TS"] = shared
    if rule.weights == "scaled_probability":
        inputs["expert_scale_E"] = bias.exp()
    return select(logits, rule, edits, **inputs)


def dense(weights: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), 8).scatter_add(1, ids, weights)


seeds = st.integers(0, 10_000)
masks = st.sampled_from(["mask_min", "mask_inf", "mask_selection"])
forces = st.sampled_from(["force_max", "force_natural"])
few = settings(max_examples=60, deadline=None)


@given(rule=rules(), seed=seeds, via=masks, strength=forces, order=st.permutations(range(8)))
@few
def test_masked_never_and_forced_always_whatever_the_rule(
    rule: RoutingRule, seed: int, via: str, strength: str, order: list[int]
) -> None:
    forced, masked = order[:1], order[1 : 8 - rule.top_k + 1]
    edits = Edits(**{via: at(*masked, num=8), strength: at(*forced, num=8)})
    weights, ids = routed(rule, seed, edits)
    assert ids.shape == (24, rule.top_k)
    assert not torch.isin(ids, torch.tensor(masked)).any()
    assert (ids == forced[0]).any(-1).all()
    assert all(len(set(row)) == rule.top_k for row in ids.tolist())
    assert torch.isfinite(weights).all() and (weights >= 0).all()


@given(rule=rules(), seed=seeds, order=st.permutations(range(8)), num_masked=st.integers(1, 8))
@few
def test_filling_up_edits_the_logits_and_nothing_else_whatever_the_rule(
    rule: RoutingRule, seed: int, order: list[int], num_masked: int
) -> None:
    """The family's own selection of logits that were edited before it saw them."""
    masked = order[:num_masked]

    def lowest(logits: Tensor) -> Tensor:
        return torch.where(at(*masked, num=8), logits.amin(-1, keepdim=True) - 0.01, logits)

    weights, ids = routed(rule, seed, Edits(mask_fill_up=at(*masked, num=8)))
    found, expected = dense(weights, ids), dense(*routed(rule, seed, before=lowest))
    assert all(len(set(row)) == rule.top_k for row in ids.tolist())
    if rule.weights != "scaled_probability":  # whose factors tell tied experts apart
        for part in (found, expected):
            part[:, masked] = part[:, masked].sort(-1).values
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    if rule.selection_bias == "none" and rule.groups is None:
        in_need = max(0, rule.top_k - (8 - num_masked))
        assert (torch.isin(ids, torch.tensor(masked)).sum(-1) == in_need).all()
        never = routed(rule, seed, Edits(mask_min=at(*masked, num=8)))
        if not in_need:
            torch.testing.assert_close(dense(weights, ids), dense(*never))


@given(rule=rules(), seed=seeds, name=st.sampled_from([
    "mask_fill_up", "mask_min", "mask_inf", "mask_selection", "force_max", "force_natural", "drop",
    "drop_renorm",
]))  # fmt: skip
@few
def test_an_edit_of_no_expert_changes_nothing(rule: RoutingRule, seed: int, name: str) -> None:
    plain, found = routed(rule, seed), routed(rule, seed, Edits(**{name: at(num=8)}))
    torch.testing.assert_close(dense(*found), dense(*plain), rtol=1e-5, atol=1e-6)


@given(rule=rules(), seed=seeds, via=masks, expert=st.integers(0, 7), row=st.integers(0, 23))
@few
def test_an_edit_of_one_token_leaves_the_others_alone(
    rule: RoutingRule, seed: int, via: str, expert: int, row: int
) -> None:
    where = torch.zeros(24, 8, dtype=torch.bool)
    where[row, expert] = True
    everywhere = routed(rule, seed, Edits(**{via: at(expert, num=8)}))
    one, plain = routed(rule, seed, Edits(**{via: where})), routed(rule, seed)
    assert torch.equal(dense(*one)[row], dense(*everywhere)[row])
    rest = torch.arange(24) != row
    torch.testing.assert_close(dense(*one)[rest], dense(*plain)[rest], rtol=1e-5, atol=1e-6)


@given(rule=rules(), seed=seeds, expert=st.integers(0, 7), factor=st.floats(0, 8))
@few
def test_weights_change_as_asked_and_selections_do_not(
    rule: RoutingRule, seed: int, expert: int, factor: float
) -> None:
    weights, ids = routed(rule, seed)
    is_it = ids == expert
    dropped = routed(rule, seed, Edits(drop=at(expert, num=8)))
    assert torch.equal(dropped[1], ids)
    assert torch.equal(dropped[0], weights.masked_fill(is_it, 0))
    scale = torch.where(at(expert, num=8), factor, 1.0)
    scaled = routed(rule, seed, Edits(scale=scale))
    assert torch.equal(scaled[1], ids)
    torch.testing.assert_close(scaled[0], torch.where(is_it, weights * factor, weights))
    for edits in (Edits(scale_renorm=scale), Edits(drop_renorm=at(expert, num=8))):
        found = routed(rule, seed, edits)
        assert torch.equal(found[1], ids)
        assert torch.isfinite(found[0]).all()
        something = found[0].sum(-1) > 0
        assume(rule.weights != "scaled_probability")  # its factors come after normalization
        total = weights.sum(-1)[something]
        torch.testing.assert_close(found[0].sum(-1)[something], total, rtol=1e-4, atol=1e-6)


@given(rule=rules(), seed=seeds, number=st.integers(1, 8))
@few
def test_another_number_of_experts_takes_the_same_ones_first(
    rule: RoutingRule, seed: int, number: int
) -> None:
    # Outside the groups all count the same there, so that "the best" is anyone.
    assume(rule.groups is None or rule.groups.fill == "-inf")
    _, ids = routed(rule, seed)
    weights, more = routed(rule, seed, Edits(top_k=number))
    assert more.shape == (24, number)
    assert torch.isfinite(weights).all()
    for own, found in zip(ids.tolist(), more.tolist(), strict=True):
        assert len(set(found)) == number
        assert set(own) <= set(found) or set(found) <= set(own)
    counts = torch.full((24,), number)
    by_token = routed(rule, seed, Edits(top_k=counts, max_top_k=8))
    torch.testing.assert_close(dense(*by_token), dense(weights, more), rtol=1e-5, atol=1e-6)


def test_top_p_goes_on_where_a_sum_is_p_itself() -> None:
    rule = RoutingRule(num_experts=4, top_k=2, renormalize=False, score="probabilities")
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    weights, ids = select(scores, rule, edits=Edits(top_p=0.5))
    assert ids[0][weights[0] > 0].tolist() == [0, 1]
    weights, ids = select(scores, rule, edits=Edits(top_p=0.49))
    assert ids[0][weights[0] > 0].tolist() == [0]


@given(rule=rules(), seed=seeds, share=st.floats(0.01, 1))
@few
def test_top_p_takes_the_fewest_experts_that_exceed_it(
    rule: RoutingRule, seed: int, share: float
) -> None:
    assume(rule.weights != "sigmoid_topk")  # distant sigmoids can be 0 in float32
    # Outside the groups all count the same there, so that "the best" is anyone.
    assume(rule.groups is None or rule.groups.fill == "-inf")
    weights, ids = routed(rule, seed, Edits(top_p=share))
    counts = (weights > 0).sum(-1)
    assert (counts >= 1).all()
    weights_1, ids_1 = routed(rule, seed, Edits(top_k=counts, max_top_k=8))
    torch.testing.assert_close(dense(weights_1, ids_1), dense(weights, ids), rtol=1e-5, atol=1e-6)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(24, 8, generator=generator) * 2
    if rule.score == "probabilities":
        logits = torch.softmax(logits, -1)
    probable = routing_probabilities(logits, rule)
    for row in range(24):
        used = ids[row][weights[row] > 0]
        assert probable[row, used].sum() >= share - 1e-5
        assert probable[row, used[:-1]].sum() < share + 1e-5


@pytest.mark.parametrize("edits", [
    Edits(mask_inf=at(1)), Edits(force_max=at(0)), Edits(drop_renorm=at(2, 3)),
    Edits(top_k=torch.tensor([1]), max_top_k=3), Edits(scale_renorm=value(2, 3, other=1)),
])  # fmt: skip
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "late"])
def test_gradients_stay_finite(score: Any, edits: Edits) -> None:
    late = {"score": "identity", "weights": "softmax_topk"}
    rule = replace(NORMED, **(late if score == "late" else {"score": score}))
    logits = LOGITS.clone().requires_grad_()
    weights, _ = select(logits, rule, edits)
    (weights**2).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
