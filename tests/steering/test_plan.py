"""Plan files: what is read, what is refused and in which words, and the identity of a plan."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.errors import PlanError
from moescope.steering import Intervention, SteeringPlan
from moescope.steering.plan import (
    Bias,
    FirstGenerated,
    Force,
    Mask,
    Replay,
    Scale,
    TopK,
    TopP,
    plan_schema,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
scopes = st.sampled_from(["all", "prompt", "generated", "last_prompt"]) | st.builds(
    FirstGenerated, first_generated=st.integers(1, 500)
)
several = st.lists(st.integers(0, 511), min_size=1, max_size=6, unique=True)
scoped = {
    "tokens": scopes,
    "kind": st.none() | st.sampled_from(["mlp", "attention"]),
    "prompt_ids": st.none() | several,
}
whole = scoped | {"layers": several}
common = scoped | {"layer": st.integers(0, 90), "experts": several}
amounts = st.floats(-1e6, 1e6)
interventions = st.one_of(
    st.builds(
        Mask, action=st.just("mask"), via=st.sampled_from(["min", "inf", "selection"]), **common
    ),
    st.builds(
        Mask, action=st.just("mask"), mode=st.sampled_from(["drop", "drop_renorm"]), **common
    ),
    st.builds(
        Force, action=st.just("force"), strength=st.sampled_from(["max", "natural"]), **common
    ),
    st.builds(
        Bias, action=st.just("bias"), value=amounts, unit=st.sampled_from(["logit", "std"]),
        on=st.sampled_from(["logit", "selection"]), **common,
    ),
    st.builds(
        Scale, action=st.just("scale"), value=amounts.map(abs), renormalize=st.booleans(), **common
    ),
    st.builds(Replay, action=st.just("replay"), run=st.just("base"), **whole),
    st.builds(TopK, action=st.just("top_k"), value=st.integers(1, 64), **whole),
    st.builds(TopP, action=st.just("top_p"), value=st.floats(1e-6, 1), **whole),
)  # fmt: skip
names = st.none() | st.text(st.characters(codec="utf-8"), max_size=12)
plans = st.builds(
    SteeringPlan,
    name=names,
    model=names,
    provenance=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), json_values),
    interventions=st.lists(interventions, max_size=4),
)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_every_plan_survives_its_file(plan: SteeringPlan) -> None:
    again = SteeringPlan.parse(plan.to_json())
    assert again == plan
    assert again.plan_id == plan.plan_id
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan


@given(plans)
@settings(max_examples=30, deadline=None)
def test_every_plan_meets_the_published_schema(plan: SteeringPlan) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(plan_schema()).validate(json.loads(plan.to_json()))


def test_the_schema_refuses_what_plans_refuse() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(plan_schema())
    good = {"action": "mask", "layer": 1, "experts": [2]}
    assert validator.is_valid({"interventions": [good]})
    for change in (
        {"action": "bias"}, {"layer": -1}, {"experts": []}, {"experts": [1, 1]}, {"via": "max"},
        {"tokens": "span"}, {"tokens": {"first_generated": 0}}, {"value": 3}, {"strength": "max"},
        {"layers": [2]}, {"prompt_ids": []}, {"action": "top_k", "value": 1},
    ):  # fmt: skip
        assert not validator.is_valid({"interventions": [good | change]}), change
    assert not validator.is_valid({"interventions": [{"layer": 1, "experts": [2]}]})
    assert not validator.is_valid({"version": 2, "interventions": []})
    assert not validator.is_valid({})


def test_the_plan_of_the_documents_is_read(tmp_path: Path) -> None:
    text = """{"version": 1, "name": "less-refusal", "model": "m", "provenance": {"n_a": 120},
     "interventions": [
       {"action": "mask", "layer": 12, "experts": [5, 9], "mode": "replace", "via": "min",
        "tokens": "all"},
       {"action": "force", "layer": 12, "experts": [3], "strength": "max",
        "tokens": {"first_generated": 8}}]}"""
    (tmp_path / "plan.json").write_text("\ufeff" + text)
    plan = SteeringPlan.read(tmp_path / "plan.json")
    assert plan.interventions == (
        Intervention(action="mask", layer=12, experts=[5, 9], mode="replace"),
        Intervention(action="force", layer=12, experts=[3], tokens={"first_generated": 8}),
    )
    assert [type(one) for one in plan.interventions] == [Mask, Force]
    plan.write(tmp_path / "again.json")
    assert SteeringPlan.read(tmp_path / "again.json") == plan


def test_every_action_of_the_documents_is_read() -> None:
    text = """{"version": 1, "name": "less-refusal", "interventions": [
       {"action": "mask",  "layer": 12, "experts": [5, 9], "mode": "drop_renorm"},
       {"action": "bias",  "layer": 20, "experts": [7], "value": 0.5, "unit": "std",
        "tokens": {"first_generated": 8}},
       {"action": "scale", "layer": 20, "experts": [7], "value": 4.0, "renormalize": false},
       {"action": "replay", "run": "base", "layers": [8, 9, 10]},
       {"action": "top_k", "layer": 3, "value": 4},
       {"action": "top_p", "layer": 3, "value": 0.4}]}"""
    mask, bias, scale, replay, top_k, top_p = SteeringPlan.parse(text).interventions
    assert isinstance(mask, Mask) and mask.mode == "drop_renorm"
    assert isinstance(bias, Bias) and (bias.value, bias.unit, bias.on) == (0.5, "std", "logit")
    assert isinstance(scale, Scale) and scale.value == 4.0
    assert isinstance(replay, Replay) and replay.on_layers == (8, 9, 10)
    assert replay.experts == top_k.experts == ()
    assert isinstance(top_k, TopK) and isinstance(top_p, TopP) and top_p.value == 0.4
    assert [one.setting for one in SteeringPlan.parse(text).interventions] == [
        "mask drop_renorm", "bias +0.5 std", "scale x4", "replay of base", "top_k 4", "top_p 0.4",
    ]  # fmt: skip
    assert Intervention(action="top_k", layer=np.int32(1), value=np.int64(3)).on_layers == (1,)


OTHER_ACTIONS = [
    ({"action": "bias", "experts": [1]}, "intervention 1 (bias): field 'value' is missing"),
    ({"action": "bias", "experts": [1], "value": "1"}, "field 'value' is '1': it must be a number"),
    ({"action": "bias", "experts": [1], "value": float("inf")}, "finite number"),
    ({"action": "bias", "experts": [1], "value": 1, "unit": "nat"}, "available: logit or std"),
    ({"action": "scale", "experts": [1], "value": -1}, "greater than or equal to 0"),
    ({"action": "top_k", "value": 0}, "greater than or equal to 1"),
    ({"action": "top_k", "value": 2, "experts": [1]}, "field 'experts' is not known here"),
    ({"action": "top_p", "value": 0}, "greater than 0"),
    ({"action": "top_p", "value": 1.5}, "less than or equal to 1"),
    ({"action": "replay"}, "intervention 1 (replay): field 'run' is missing"),
    ({"action": "replay", "run": "b", "layers": [1]}, "'layer' and 'layers' exclude each other"),
    ({"action": "replay", "run": "b", "layer": None}, "(replay): field 'layer' is missing"),
    ({"action": "replay", "run": "b", "layer": None, "layers": []}, "at least one layer"),
    (
        {"action": "mask", "experts": [1], "mode": "drop", "via": "inf"},
        "via 'inf' says how slots are refilled, and mode 'drop' refills none",
    ),
]


@pytest.mark.parametrize(("fields", "message"), OTHER_ACTIONS)
def test_malformed_interventions_of_other_actions_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        SteeringPlan(interventions=[{"layer": 3} | fields])
    assert message in str(caught.value)
    with pytest.raises(PlanError):
        Intervention(**({"layer": 3} | fields))


def test_intervention_makes_the_class_of_its_action_and_takes_numpy_integers() -> None:
    made = Intervention(action="mask", layer=np.int64(3), experts=np.array([4, 1]))
    assert isinstance(made, Mask)
    assert made.experts == (4, 1)
    assert all(type(expert) is int for expert in made.experts)
    assert (made.mode, made.via, made.tokens, made.kind) == ("replace", "min", "all", None)


def plan_with(**change: Any) -> SteeringPlan:
    return SteeringPlan(interventions=[{"action": "mask", "layer": 3, "experts": [1]} | change])


REFUSED = {
    "action": (
        "swap",
        "intervention 1: action 'swap' is not available; available: mask, force, bias, scale",
    ),
    "mode": (
        "skip",
        "intervention 1 (mask): mode 'skip' is not available; available: replace, drop_renorm",
    ),
    "via": ("max", "via 'max' is not available; available: min, inf or selection"),
    "layer": ("3", "field 'layer' is '3': it must be an integer"),
    "kind": (3, "field 'kind' is 3: it must be a valid string"),
    "experts": ([], "field 'experts' is []: it must name at least one expert"),
    "tokens": ("span", "field 'tokens' is 'span': it must be all, prompt, generated, last_prompt"),
    "strength": ("max", "field 'strength' is not known here; known: action, layer, layers, kind"),
    "prompt_ids": ([1, 1], "'prompt_ids' is [1, 1]: it must name each prompt once, and 1 is"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_available_is_refused_in_one_sentence(field: str) -> None:
    value, message = REFUSED[field]
    with pytest.raises(PlanError) as caught:
        plan_with(**{field: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer", -1, "greater than or equal to 0"),
        ("layer", True, "must be an integer"),
        ("layer", 2.0, "must be an integer"),
        ("experts", 3, "it must be a list"),
        ("experts", [1, 2, 1], "it must name each expert once, and 1 is there again"),
        ("experts", [2, -1], "'experts[1]' is -1"),
        ("tokens", {"first_generated": 0}, "with N at least 1"),
        ("tokens", {"first_generated": True}, "with N at least 1"),
        ("tokens", {"first_generated": 2, "x": 1}, "with N at least 1"),
        ("tokens", ["all"], "it must be all"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match="intervention 1") as caught:
        plan_with(**{field: value})
    assert message in str(caught.value)
    with pytest.raises(PlanError):
        Intervention(**({"action": "mask", "layer": 3, "experts": [1]} | {field: value}))


def test_the_number_of_the_intervention_and_further_errors_are_told() -> None:
    good = {"action": "force", "layer": 0, "experts": [1]}
    with pytest.raises(PlanError) as caught:
        SteeringPlan(interventions=[good, good, good | {"strength": "soft", "extra": 1}])
    assert str(caught.value).startswith("intervention 3 (force): strength 'soft' is not available")
    assert str(caught.value).endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 2 is not available; available: 1"),
        ({"author": "x"}, "field 'author' is not known here; known: version, name"),
        ({"name": 3}, "field 'name' is 3"),
        ({"interventions": {"action": "mask"}}, "it must be a list of interventions"),
        ({"interventions": [3]}, "an intervention is a JSON object, not 3"),
        ({"interventions": [{"layer": 1, "experts": [1]}]}, "field 'action' is missing"),
        ({"interventions": [{"action": "mask", "layer": 1}]}, "field 'experts' is missing"),
        ({"provenance": {"p": float("nan")}}, "it must be plain JSON, without NaN"),
        ({"provenance": [1]}, "it must be a JSON object"),
        ({"provenance": {"f": {1, 2}}}, "provenance"),
    ],
)
def test_a_malformed_plan_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        SteeringPlan(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1, column 2: this is not JSON"),
        ("[]", "a plan is a JSON object"),
        ("{}", "field 'interventions' is missing"),
        ('{"interventions": [], "name": "a", "name": "b"}', "field 'name' stands twice"),
        ('{"interventions": [], "provenance": {"x": Infinity}}', "Infinity is no JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"interventions": [{"action": "mask", "layer": 1}]}', "intervention 1 (mask)"),
    ],
)
def test_a_malformed_file_is_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        SteeringPlan.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"missing\.json: the plan file cannot be read"):
        SteeringPlan.read(tmp_path / "missing.json")
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(PlanError, match="JSON in UTF-8"):
        SteeringPlan.read(tmp_path / "latin.json")
    with pytest.raises(PlanError, match="cannot be written there"):
        SteeringPlan().write(tmp_path)


def test_the_id_depends_on_content_and_not_on_layout() -> None:
    plan = plan_with(experts=[1, 2])
    same = SteeringPlan.parse(
        '{"interventions":[{"experts":[2,1],"tokens":"all","layer":3,"via":"min","action":"mask"}]}'
    )
    assert same.plan_id == plan.plan_id
    others = [
        plan_with(experts=[1]),
        plan_with(experts=[1, 2], via="inf"),
        plan_with(experts=[1, 2], tokens="prompt"),
        plan_with(experts=[1, 2], layer=4),
        SteeringPlan(name="x", interventions=plan.interventions),
        SteeringPlan(provenance={"run": "r"}, interventions=plan.interventions),
    ]
    assert len({plan.plan_id, *(other.plan_id for other in others)}) == len(others) + 1
    assert len(plan.plan_id) == 16
    assert SteeringPlan(name="x").title == "x"
    assert plan.title == f"plan {plan.plan_id}"


#: Of a plain mask, as it has been since version 1.
PLAIN_ID = "a738db33a63f6459"


def test_masks_that_fill_up_say_so_and_all_others_keep_their_ids() -> None:
    plain, filled = plan_with(experts=[1]), plan_with(experts=[1], fill_up=True)
    assert plan_with(experts=[1], fill_up=False).plan_id == plain.plan_id == PLAIN_ID
    assert "fill_up" not in plain.to_json()
    assert filled.plan_id != plain.plan_id
    assert SteeringPlan.parse(filled.to_json()) == filled
    assert filled.to_dict()["interventions"][0]["fill_up"] is True
    assert filled.interventions[0].setting == "mask via min filling up"
    for other in ({"via": "inf"}, {"via": "selection"}, {"mode": "drop"}, {"mode": "drop_renorm"}):
        with pytest.raises(PlanError, match="only mode 'replace' via 'min' can mean"):
            plan_with(experts=[1], fill_up=True, **other)


def test_plans_are_made_without_torch() -> None:
    code = (
        "import sys, moescope.steering as steering, moescope.steering.check; "
        "steering.SteeringPlan(interventions=[]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
