"""Composing plans keeps what each asks for; the opposite of a plan turns every request around."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape, check_shape
from moescope.steering.compose import compose, invert

LAYERS = [LayerShape(layer, "mlp", 8, 2) for layer in (0, 1, 2)]


def plan(name: str, *interventions: dict[str, Any], model: str | None = None) -> SteeringPlan:
    return SteeringPlan(name=name, interventions=interventions, model=model)


def mask(experts: list[int], layer: int = 0, **more: Any) -> dict[str, Any]:
    return {"action": "mask", "layer": layer, "experts": experts, **more}


def force(experts: list[int], layer: int = 0, **more: Any) -> dict[str, Any]:
    return {"action": "force", "layer": layer, "experts": experts, **more}


def on(action: str, layer: int = 0, **more: Any) -> dict[str, Any]:
    return {"action": action, "layer": layer, **more}


def requests(of: SteeringPlan) -> set[tuple[Any, ...]]:
    """What a plan asks for, expert by expert."""
    return {
        (layer, expert, one.setting, str(one.tokens), one.prompt_ids)
        for one in of.interventions
        for layer in one.on_layers
        for expert in one.experts or (None,)
    }


def test_equal_interventions_are_asked_for_once_and_experts_put_together() -> None:
    a = plan("a", mask([1, 5]), on("bias", experts=[3], value=0.5), model="demo")
    b = plan(
        "b", mask([5, 2]), mask([4], layer=1), on("bias", experts=[3], value=0.5),
        mask([6], tokens="generated"), mask([7], via="inf"),
    )  # fmt: skip
    both = compose([a, b], layers=LAYERS)
    assert [(one.action, one.layer, one.experts) for one in both.interventions] == [
        ("mask", 0, (1, 2, 5)), ("bias", 0, (3,)), ("mask", 1, (4,)), ("mask", 0, (6,)),
        ("mask", 0, (7,)),
    ]  # fmt: skip
    assert (both.name, both.model) == ("a + b", "demo")
    origins: Any = both.provenance["composed_of"]
    assert [(one["name"], one["plan_id"]) for one in origins] == [
        ("a", a.plan_id), ("b", b.plan_id),
    ]  # fmt: skip
    assert SteeringPlan.parse(both.to_json()) == both
    assert compose([a, b], name="c").name == "c"


def test_what_differs_in_the_last_digit_stays_apart() -> None:
    values = [plan(str(e), on("bias", experts=[e], value=0.5 + e * 1e-9)) for e in (0, 1)]
    found = [one.model_dump() for one in compose(values, layers=LAYERS).interventions]
    assert [(one["experts"], one["value"]) for one in found] == [((0,), 0.5), ((1,), 0.5 + 1e-9)]


def test_layers_and_kinds_written_otherwise_are_the_same() -> None:
    a = plan("a", {"action": "mask", "layers": [0, 1], "experts": [1]})
    b = plan("b", mask([1], layer=1, kind="mlp"), mask([2], layer=0))
    both = compose([a, b])
    assert [(one.layer, one.experts) for one in both.interventions] == [(0, (1, 2)), (1, (1,))]
    replayed = plan("r", {"action": "replay", "layers": [1, 2], "run": "base"})
    assert requests(compose([replayed, replayed])) == requests(replayed)
    prompts = [
        plan(name, mask([1], prompt_ids=ids)) for name, ids in (("x", [3, 5]), ("y", [5, 3]))
    ]
    assert len(compose(prompts).interventions) == 1
    apart = [plan("x", mask([1], prompt_ids=[3])), plan("y", mask([2], prompt_ids=[4]))]
    assert requests(compose(apart)) == requests(apart[0]) | requests(apart[1])


def test_routers_of_one_layer_are_kept_apart() -> None:
    a, b = plan("a", mask([1], kind="mlp")), plan("b", mask([1, 2], kind="attention"))
    for layers in (None, [*LAYERS, LayerShape(0, "attention", 4, 1)]):
        both = compose([a, b], layers=layers)
        assert [(one.kind, one.experts) for one in both.interventions] == [
            ("mlp", (1,)), ("attention", (1, 2)),
        ]  # fmt: skip
    with pytest.raises(PlanError, match=r"several routers \(attention, mlp\); name one"):
        compose([a, b, plan("c", mask([3]))])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (mask([4]), force([4]), "expert 4 of layer 0 is asked for force max here and for mask via"),
        (mask([4]), force([4], tokens="generated"), "on generated tokens from number 1, expert 4"),
        (mask([4]), force([4], prompt_ids=[7]), "on prompt tokens of prompt 7, expert 4"),
        (mask([4]), mask([4], mode="drop"), "mask drop here and for mask via min"),
        (
            on("bias", experts=[4], value=0.5), on("bias", experts=[4], value=0.6),
            r"bias \+0.6 logit here and for bias \+0.5 logit",
        ),
        (
            on("bias", experts=[4], value=0.5),
            on("bias", experts=[4], value=0.5, tokens="prompt"),
            "asked for bias",
        ),
        (on("top_k", value=1), on("top_k", value=2), "top_k 2 here and for top_k 1"),
        (on("replay", run="base"), mask([1]), "mask via min here and for replay of base"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_in_one_sentence(a: Any, b: Any, message: str) -> None:
    for layers in (None, LAYERS):
        with pytest.raises(PlanError, match=message) as caught:
            compose([plan("a", a), plan("b", b)], layers=layers)
        assert str(caught.value).startswith("a + b cannot be composed: ")
        assert "\n" not in str(caught.value)


def test_what_does_not_overlap_is_no_contradiction() -> None:
    a = plan("a", mask([4], tokens="prompt"), mask([1], layer=2))
    b = plan("b", force([4], tokens="generated"), force([1]))
    assert requests(compose([a, b], layers=LAYERS)) == requests(a) | requests(b)


def test_numbers_of_experts_are_judged_where_the_model_is_known() -> None:
    a, b = plan("a", mask([0, 1, 2, 3])), plan("b", mask([4, 5, 6]))
    assert compose([a, b]).interventions[0].experts == (0, 1, 2, 3, 4, 5, 6)
    with pytest.raises(PlanError, match=r"a . b cannot be composed: .* 7 of 8 experts are masked"):
        compose([a, b], layers=LAYERS)
    with pytest.raises(PlanError, match=r"plan 'c', intervention 1 .*: layer 5 has no router"):
        compose([plan("c", mask([1], layer=5))], layers=LAYERS)


def test_what_cannot_be_composed_at_all() -> None:
    with pytest.raises(PlanError, match="for different models"):
        compose([plan("a", mask([1]), model="x"), plan("b", mask([2]), model="y")])
    with pytest.raises(PlanError, match="nothing to compose"):
        compose([])


EXPERTS = st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True)
TOKENS = st.sampled_from(["all", "prompt", "generated", "last_prompt", {"first_generated": 2}])
ONE = st.one_of(
    st.builds(mask, EXPERTS, st.integers(0, 2), tokens=TOKENS),
    st.builds(force, EXPERTS, st.integers(0, 2), tokens=TOKENS),
    st.builds(
        lambda experts, layer, value: on("bias", layer, experts=experts, value=value / 4),
        EXPERTS, st.integers(0, 2), st.integers(-4, 4),
    ),
)  # fmt: skip
PLANS = st.builds(lambda interventions: plan("p", *interventions), st.lists(ONE, max_size=3))


def fits(one: SteeringPlan) -> bool:
    try:
        check_shape(one, LAYERS)
    except PlanError:
        return False
    return True


@given(PLANS, PLANS)
@settings(max_examples=40, deadline=None)
def test_a_composition_asks_for_what_its_parts_ask_for(a: SteeringPlan, b: SteeringPlan) -> None:
    assume(fits(a) and fits(b))
    assert requests(compose([a, a], layers=LAYERS)) == requests(a)
    try:
        both = compose([a, b], layers=LAYERS)
    except PlanError:
        with pytest.raises(PlanError):
            compose([b, a], layers=LAYERS)
        return
    assert requests(both) == requests(a) | requests(b) == requests(compose([b, a], layers=LAYERS))
    assert fits(both)


@given(PLANS)
@settings(max_examples=40, deadline=None)
def test_the_opposite_of_the_opposite_is_the_plan(one: SteeringPlan) -> None:
    back = invert(invert(one))
    assert back.interventions == one.interventions
    assert SteeringPlan.parse(invert(one).to_json()) == invert(one)


def test_each_action_has_its_opposite() -> None:
    one = plan(
        "p", mask([1], via="inf", tokens="generated"), mask([2], mode="drop_renorm"),
        {"action": "force", "layers": [1, 2], "experts": [3], "strength": "natural"},
        on("bias", experts=[4], value=-0.5, unit="std", on="selection", prompt_ids=[3]),
        on("scale", experts=[5], value=4, renormalize=True), model="demo",
    )  # fmt: skip
    found = invert(one, strength="natural", layers=LAYERS)
    assert [(item.setting, item.on_layers, item.experts) for item in found.interventions] == [
        ("force natural", (0,), (1,)), ("force natural", (0,), (2,)),
        ("mask via min", (1, 2), (3,)), ("bias +0.5 std on selection", (0,), (4,)),
        ("scale x0.25 renormalized", (0,), (5,)),
    ]  # fmt: skip
    assert [item.tokens for item in found.interventions] == [
        item.tokens for item in one.interventions
    ]
    assert found.interventions[3].prompt_ids == (3,)
    assert (found.name, found.model) == ("opposite of p", "demo")
    origin: Any = found.provenance["opposite_of"]
    assert origin["plan_id"] == one.plan_id
    assert found.provenance["mapping"] == {
        "mask": "force natural", "force": "mask replace", "bias v": "bias -v",
        "scale v": "scale 1/v",
    }  # fmt: skip
    assert invert(one).interventions[0].setting == "force max"
    nothing = plan("p", on("bias", experts=[1], value=0))
    assert "-0.0" not in invert(nothing).to_json()


@pytest.mark.parametrize(
    ("one", "setting"),
    [
        (on("top_k", value=1), "top_k 1"), (on("top_p", value=0.5), "top_p 0.5"),
        (on("replay", run="base"), "replay of base"),
        (on("scale", experts=[1], value=0), "scale x0"),
        (on("scale", experts=[1], value=1e-310), "scale x1e-310"),
    ],
)  # fmt: skip
def test_what_has_no_opposite_is_refused(one: Any, setting: str) -> None:
    with pytest.raises(PlanError, match=f"p has no opposite: intervention 2 is {setting}, and"):
        invert(plan("p", mask([1]), one))


def test_masks_of_more_than_k_have_no_opposite_in_a_known_model() -> None:
    wide = plan("p", mask([0, 1, 2]))
    assert invert(wide).interventions[0].experts == (0, 1, 2)
    with pytest.raises(PlanError, match="3 experts are forced, but only 2 are selected"):
        invert(wide, layers=LAYERS)
