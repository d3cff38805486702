"""Strategies: which experts of a table come into the plan, in which action, and what is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe import record
from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan, steer
from moescope.steering.check import LayerShape
from moescope.steering.derive import plan_from_contrast
from moescope.steering.plan_view import plan_table
from moescope.steering.strategies import STRATEGIES, make_plan, parse_settings

LAYERS = [LayerShape(layer, "mlp", 6, 2) for layer in (0, 1, 2)]


def table(*rows: tuple[int, int, float], column: str = "risk_difference") -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["layer", "expert", column])


def chosen(plan: SteeringPlan) -> list[tuple[str, int | None, tuple[int, ...]]]:
    return [(one.action, one.layer, one.experts) for one in plan.interventions]


def left_out(plan: SteeringPlan) -> list[tuple[int, int]]:
    found: Any = plan.provenance["left_out"]
    return [(one["layer"], one["expert"]) for one in found]


def notes(plan: SteeringPlan) -> str:
    found: Any = plan.provenance["notes"]
    return " | ".join(found)


RD = table((0, 1, 0.5), (1, 2, -0.4), (0, 3, 0.3), (2, 0, -0.6), (1, 0, 0.1), (2, 1, 0.0))


def test_steermoe_forces_set_one_and_masks_set_two() -> None:
    plan = make_plan(
        "steermoe", RD, layers=LAYERS, num_force=2, num_mask=1, tokens="generated", name="n",
        model="m", provenance={"table": "t.csv"},
    )  # fmt: skip
    assert chosen(plan) == [("force", 0, (1, 3)), ("mask", 2, (0,))]
    assert [one.setting for one in plan.interventions] == [
        "force max", "mask via min filling up",
    ]  # fmt: skip
    assert {one.tokens for one in plan.interventions} == {"generated"}
    assert (plan.name, plan.model) == ("n", "m")
    assert plan.provenance == {
        "table": "t.csv", "strategy": "steermoe",
        "source": "SteerMoE, arXiv 2509.09660, section 3",
        "parameters": {"num_force": 2, "num_mask": 1, "reverse": False},
        "ranked_by": "risk_difference", "confirmed_only": False,
        "chosen": [
            {"layer": 0, "expert": 1, "value": 0.5, "action": "force"},
            {"layer": 0, "expert": 3, "value": 0.3, "action": "force"},
            {"layer": 2, "expert": 0, "value": -0.6, "action": "mask"},
        ],
        "left_out": [], "notes": [], "capped": True,
    }  # fmt: skip
    assert SteeringPlan.parse(plan.to_json()) == plan


def test_steermoe_reversed_flips_all_signs() -> None:
    plan = make_plan("steermoe", RD, layers=LAYERS, num_force=2, num_mask=3, reverse=True)
    assert chosen(plan) == [
        ("force", 1, (2,)), ("force", 2, (0,)), ("mask", 0, (1, 3)), ("mask", 1, (0,)),
    ]  # fmt: skip
    flipped = RD.assign(risk_difference=-RD["risk_difference"])
    again = make_plan("steermoe", flipped, layers=LAYERS, num_force=2, num_mask=3)
    assert chosen(again) == chosen(plan)


def test_steermoe_skips_what_a_layer_has_no_room_for_and_does_not_replace_it() -> None:
    full = table((0, 0, 0.9), (0, 1, 0.8), (0, 2, 0.7), (1, 0, 0.1))
    plan = make_plan("steermoe", full, layers=LAYERS, num_force=3)
    assert chosen(plan) == [("force", 0, (0, 1))]
    assert left_out(plan) == [(0, 2)]
    assert "1 experts that were asked for are left out and not replaced" in notes(plan)
    loose = make_plan("steermoe", full, num_force=3)
    assert chosen(loose) == [("force", 0, (0, 1, 2))]
    assert loose.provenance["capped"] is False
    assert "without the model's layers" in notes(loose)


def test_steermoe_is_the_other_sign_of_plan_from_contrast() -> None:
    """There group a is to vanish, here set 1 is wanted; and there the next one fills up."""
    full = table((0, 0, 0.9), (0, 1, 0.8), (0, 2, 0.7), (1, 0, 0.1), (2, 3, -0.5))
    ours = plan_from_contrast(
        full.assign(risk_difference=-full["risk_difference"]), num_mask=1, num_force=3,
        layers=LAYERS, confirmed_only=False,
    )  # fmt: skip
    theirs = make_plan("steermoe", full, layers=LAYERS, num_mask=1, num_force=3)
    assert chosen(ours) == [("mask", 2, (3,)), ("force", 0, (0, 1)), ("force", 1, (0,))]
    assert chosen(theirs) == [("force", 0, (0, 1)), ("mask", 2, (3,))]


def test_steermoe_masks_may_leave_fewer_than_k_and_say_so() -> None:
    rows = table(*((0, expert, -0.1 * (expert + 1)) for expert in range(6)))
    enough = make_plan("steermoe", rows, layers=LAYERS, num_mask=4)
    assert chosen(enough) == [("mask", 0, (2, 3, 4, 5))]
    assert notes(enough) == ""
    plan = make_plan("steermoe", rows, layers=LAYERS, num_mask=5)
    assert chosen(plan) == [("mask", 0, (1, 2, 3, 4, 5))]
    assert notes(plan) == (
        "layer 0 keeps 1 of 6 experts and selects 2 per token, so masked experts take the other "
        "slots, as in the paper"
    )
    # Others' masks promise that no masked expert is selected.
    delta = rows.rename(columns={"risk_difference": "delta"})
    with pytest.raises(PlanError, match=r"5 of the 6 experts of layer 0 .* leaves 1, but 2 are"):
        make_plan("bandarkar-hard", delta, layers=LAYERS, tau=0.15, suppress=True)


def test_counts_give_the_risk_difference() -> None:
    counts = pd.DataFrame(
        {"layer": [0, 1], "expert": [1, 2], "a1": [8, 1], "d1": [2, 9], "a2": [1, 8], "d2": [9, 2]}
    )
    plan = make_plan("steermoe", counts, num_force=1, num_mask=1)
    assert chosen(plan) == [("force", 0, (1,)), ("mask", 1, (2,))]
    found: Any = plan.provenance["chosen"]
    assert [one["value"] for one in found] == pytest.approx([0.7, -0.7])
    with pytest.raises(PlanError, match=r"none of the columns .* nor the counts a1, d1, a2, d2"):
        make_plan("steermoe", counts.drop(columns="d2"), num_force=1)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(-3, 3)),
        unique_by=lambda row: row[:2], min_size=1, max_size=18,
    ),
    st.integers(0, 6), st.integers(0, 6), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_steermoe_agrees_with_a_transcription_of_its_algorithm(
    rows: list[tuple[int, int, int]], num_force: int, num_mask: int, reverse: bool, random: Any
) -> None:
    """Written from the paper's description; ties (many here) by layer, then expert."""
    shuffled = list(rows)
    random.shuffle(shuffled)
    frame = table(*((layer, expert, rd / 4) for layer, expert, rd in shuffled))
    order = sorted((-abs(rd), layer, expert, -rd if reverse else rd) for layer, expert, rd in rows)
    positive = [(layer, expert) for _, layer, expert, rd in order if rd > 0][:num_force]
    negative = [(layer, expert) for _, layer, expert, rd in order if rd < 0][:num_mask]
    forced: set[tuple[int, int]] = set()
    for layer, expert in positive:
        if sum(at == layer for at, _ in forced) < 2:
            forced.add((layer, expert))
    too_few = len(positive) < num_force or len(negative) < num_mask
    if too_few or num_force + num_mask == 0:
        with pytest.raises(PlanError):
            make_plan("steermoe", frame, layers=LAYERS, num_force=num_force, num_mask=num_mask,
                      reverse=reverse)  # fmt: skip
        return
    plan = make_plan("steermoe", frame, layers=LAYERS, num_force=num_force, num_mask=num_mask,
                     reverse=reverse)  # fmt: skip
    found = plan_table(plan)
    for action, expected in {"force": forced, "mask": set(negative)}.items():
        own = found[found["action"] == action]
        assert set(zip(own["layer"], own["expert"], strict=True)) == expected
    assert set(left_out(plan)) == set(positive) - forced


def delta_table() -> pd.DataFrame:
    """Two languages; in German two experts are above 0.3, in Thai another one."""
    rows = [
        ("de", 0, 1, 0.5), ("de", 0, 2, 0.2), ("de", 1, 3, 0.31), ("de", 2, 0, -0.4),
        ("th", 0, 1, 0.1), ("th", 0, 2, 0.7), ("th", 1, 3, 0.3), ("th", 2, 0, 0.0),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["value", "layer", "expert", "delta"])
    return frame.assign(kind="mlp", above=frame["delta"] > 0.3)


def test_bandarkar_soft_raises_experts_above_tau() -> None:
    frame = delta_table()
    plan = make_plan("bandarkar-soft", frame, layers=LAYERS, value="de")
    assert chosen(plan) == [("bias", 0, (1,)), ("bias", 1, (3,))]
    assert {one.setting for one in plan.interventions} == {"bias +0.5 std"}
    assert plan.provenance["parameters"] == {
        "tau": None, "strength": 0.5, "suppress": False, "on": "logit", "value": "de",
    }  # fmt: skip
    both = make_plan(
        "bandarkar-soft", frame, layers=LAYERS, value="de", tau=0.35, suppress=True, strength=2.0,
        on="selection",
    )  # fmt: skip
    assert [(one.layer, one.setting) for one in both.interventions] == [
        (0, "bias +2 std on selection"), (2, "bias -2 std on selection"),
    ]  # fmt: skip
    assert "at most 1 standard deviation" in notes(both)
    assert chosen(make_plan("bandarkar-soft", frame, layers=LAYERS, value="th")) == [
        ("bias", 0, (2,))
    ]
    middle = make_plan("bandarkar-soft", frame, value="de", layer_range=(1, 1))
    assert chosen(middle) == [("bias", 1, (3,))]
    told: Any = middle.provenance["parameters"]
    assert told["layer_range"] == [1, 1]


def test_tau_itself_is_not_above_tau() -> None:
    frame = table((0, 0, 0.5), (0, 1, 0.25), (1, 0, -0.25), (1, 1, -0.5), column="effect")
    plan = make_plan("bandarkar-hard", frame, tau=0.25, suppress=True)
    assert chosen(plan) == [("force", 0, (0,)), ("mask", 1, (1,))]


def test_equal_numbers_below_tau_go_by_layer_and_expert_too() -> None:
    frame = table((2, 0, -0.5), (0, 3, -0.5), (0, 1, -0.5), (1, 4, 0.9), column="effect")
    plan = make_plan("bandarkar-soft", frame, tau=0.25, suppress=True)
    told: Any = plan.provenance["chosen"]
    assert [(one["layer"], one["expert"]) for one in told] == [(1, 4), (0, 1), (0, 3), (2, 0)]


def test_bandarkar_hard_forces_at_most_k_and_tells_the_others() -> None:
    frame = table((1, 5, 0.5), (1, 4, 0.6), (1, 3, 0.5), (2, 0, 0.4), column="delta")
    plan = make_plan("bandarkar-hard", frame, layers=LAYERS, tau=0.3)
    assert chosen(plan) == [("force", 1, (3, 4)), ("force", 2, (0,))]
    assert {one.setting for one in plan.interventions} == {"force max"}
    assert left_out(plan) == [(1, 5)]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "holds several values; name one of de, th"),
        ({"value": "fr"}, "no value 'fr'; it has de, th"),
        ({"value": "de", "suppress": True}, "suppress needs tau"),
        ({"value": "de", "tau": 0.9}, "no one of 4 experts has a delta above tau 0.9; .* is 0.5"),
        ({"value": "de", "tau": -1.0}, "tau is -1; it must be at least 0"),
        ({"value": "de", "strength": 0.0}, "strength is 0 .* must be over 0"),
        ({"value": "de", "layer_range": (2, 1)}, "layers 2-1 are no range"),
    ],
)
def test_what_bandarkar_cannot_do_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan("bandarkar-soft", delta_table(), layers=LAYERS, **parameters)
    unsplit = table((0, 0, 0.5), column="delta")
    with pytest.raises(PlanError, match="no column 'above', so name tau"):
        make_plan("bandarkar-soft", unsplit)
    with pytest.raises(PlanError, match="not split by a field"):
        make_plan("bandarkar-soft", unsplit, tau=0.1, value="de")


SCORES = table((1, 1, 0.3), (0, 5, 0.3), (0, 2, 0.3), (2, 4, 0.9), (2, 3, -0.9), column="score")


def test_mote_switches_off_or_stimulates_the_largest_scores() -> None:
    plan = make_plan("mote-suppress", SCORES, layers=LAYERS, num_experts=3)
    assert chosen(plan) == [("mask", 0, (2, 5)), ("mask", 2, (4,))]
    assert {one.setting for one in plan.interventions} == {"mask drop_renorm"}
    plan = make_plan("mote-stimulate", SCORES, layers=LAYERS, num_experts=2)
    assert chosen(plan) == [("force", 0, (2,)), ("force", 2, (4,))]
    assert {one.setting for one in plan.interventions} == {"force natural"}
    plan = make_plan("mote-stimulate", SCORES, num_experts=1, force="max")
    assert plan.interventions[0].setting == "force max"
    message = "5 experts are to be masked, but the table has 4 experts with a positive score; ask"
    with pytest.raises(PlanError, match=message):
        make_plan("mote-suppress", SCORES, num_experts=5)
    with pytest.raises(PlanError, match="asked for no experts"):
        make_plan("mote-suppress", SCORES, num_experts=0)


def test_rice_scales_the_two_highest_scores() -> None:
    plan = make_plan("rice", SCORES, layers=LAYERS, beta=64)
    assert chosen(plan) == [("scale", 0, (2,)), ("scale", 2, (4,))]
    assert {one.setting for one in plan.interventions} == {"scale x64"}
    plan = make_plan("rice", SCORES, beta=2, num_experts=1, renormalize=True)
    assert plan.interventions[0].setting == "scale x2 renormalized"
    for wrong in ({}, {"beta": None}):
        with pytest.raises(PlanError, match="'rice' needs beta"):
            make_plan("rice", SCORES, **wrong)
    with pytest.raises(PlanError, match="factor over 0"):
        make_plan("rice", SCORES, beta=0.0)


def test_the_plan_of_every_strategy_and_its_controls_hold_in_a_model(tiny_bundle: Any) -> None:
    """On a random model of 3 layers, 8 experts, top-2: promises are kept at every token."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        [{"layer": layer, "expert": expert} for layer in range(3) for expert in range(8)]
    )
    frame["score"] = frame["delta"] = frame["risk_difference"] = rng.normal(size=len(frame))
    frame["load"] = rng.random(len(frame))
    frame["candidate"] = frame["above"] = frame["score"] > 0.8
    layers = [LayerShape(layer, "mlp", 8, 2) for layer in range(3)]
    needed: dict[str, dict[str, Any]] = {
        "steermoe": {"num_force": 3, "num_mask": 6}, "rice": {"beta": 4.0},
        "keep": {"per_layer": 4}, "mote-suppress": {"num_experts": 4},
        "mote-stimulate": {"num_experts": 4},
    }  # fmt: skip
    inputs = tiny_bundle.tokenizer(["a prompt"], return_tensors="pt")
    unsteered = tiny_bundle.model(**inputs).logits
    controls = [name for name, one in STRATEGIES.items() if one.takes == "plan"]
    for name in STRATEGIES.keys() - controls:
        plan = make_plan(name, frame, layers=layers, **needed.get(name, {}))
        others = [make_plan(one, frame, layers=layers, of=plan, seed=1) for one in controls]
        for made in (plan, *others):
            with steer(tiny_bundle.model, made) as report:
                tiny_bundle.model(**inputs)
            promises = {one.action for one in made.interventions} & {"mask", "force"}
            assert report.share == (1.0 if promises else None), (name, made.title)
        with steer(tiny_bundle.model, plan):
            steered = tiny_bundle.model(**inputs).logits
        assert not steered.equal(unsteered), name


def test_a_slot_that_a_masked_expert_fills_did_not_hold(tiny_bundle: Any) -> None:
    """7 of 8 masked with top-2: at every token one slot goes to a masked expert, and is told."""
    layers = [LayerShape(layer, "mlp", 8, 2) for layer in range(3)]
    rows = table(*((1, expert, -0.1 * (expert + 1)) for expert in range(8) if expert != 5))
    plan = make_plan("steermoe", rows, layers=layers, num_mask=7)
    inputs = tiny_bundle.tokenizer(["a prompt"], return_tensors="pt")
    num_tokens = inputs["input_ids"].numel()
    with steer(tiny_bundle.model, plan) as report, record(tiny_bundle.model) as trace:
        tiny_bundle.model(**inputs)
    assert (trace[1].expert_ids == 5).sum(-1).eq(1).all()
    (row,) = report.rows
    assert (row.requested, row.achieved) == (7 * num_tokens, 6 * num_tokens)
    assert row.setting == "mask via min filling up"
    # A control keeps the setting, on whichever experts.
    control = make_plan("random", of=plan, layers=layers, seed=1)
    assert {one.setting for one in control.interventions} == {row.setting}


def test_the_registry_says_what_there_is() -> None:
    assert list(STRATEGIES) == [
        "steermoe", "bandarkar-soft", "bandarkar-hard", "mote-suppress", "mote-stimulate", "rice",
        "esft", "keep", "random", "load-matched", "bottom",
    ]  # fmt: skip
    for name, strategy in STRATEGIES.items():
        assert strategy.name == name
        assert strategy.description.endswith(".")
        assert strategy.source
        for parameter in strategy.parameters:
            assert parameter.help
            assert parameter.default is None or not parameter.required
    for name, message in {
        "steer": "strategy 'steer' is not available; available: steermoe, bandarkar-soft",
        "random": "'random' is a control; name the plan",
        "rice": "'rice' needs a table",
    }.items():
        with pytest.raises(PlanError, match=message):
            make_plan(name, beta=2) if name == "rice" else make_plan(name)
    with pytest.raises(PlanError, match="no parameter 'mask'; it has num_force, num_mask"):
        make_plan("steermoe", RD, mask=3)
    with pytest.raises(PlanError, match="force 'much' is not available; available: natural, max"):
        make_plan("mote-stimulate", RD, force="much")


def test_settings_as_typed_become_parameters() -> None:
    typed = ["num-force=2", "num_mask = 1", "reverse=yes"]
    assert parse_settings("steermoe", typed) == {"num_force": 2, "num_mask": 1, "reverse": True}
    assert parse_settings("bandarkar-soft", ["tau=0.4", "on=selection"]) == {
        "tau": 0.4, "on": "selection",
    }  # fmt: skip
    for strategy, setting, message in (
        ("steermoe", "tau=1", "'tau=1' is no setting of strategy 'steermoe'; .* num_force, num_m"),
        ("steermoe", "reverse", "'reverse' is no setting"),
        ("steermoe", "num_mask=many", "num_mask is 'many'; it must be a whole number"),
        ("bandarkar-soft", "on=all", "on is 'all'; it is one of logit, selection"),
        ("none", "a=b", "strategy 'none' is not available"),
    ):
        with pytest.raises(PlanError, match=message):
            parse_settings(strategy, [setting])
    with pytest.raises(PlanError, match="num_mask is set twice"):
        parse_settings("steermoe", ["num_mask=1", "num-mask=2"])
