"""First-order effects against hand computation, finite differences, and planted truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescope.kernels.route import Edits, RoutingRule, select
from moescope.probe.demo.planted import PlantedModel, attention_refusal, expert_refusal
from moescope.probe.errors import InputError, ModelInputError, PlanError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.probe.routers import RouterSite, find_routers
from moescope.probe.zoo import tiny_model as zoo_model
from moescope.steering import SteeringPlan, steer
from moescope.steering.causes.attribution import Attribution, Mode, Removal, attribute
from moescope.steering.causes.keys import ExpertKey
from moescope.steering.causes.leaves import Leaf, Routed
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.targets import OpeningDifference, PromptLoss, TargetRow, target_rows
from moescope.steering.causes.unselected import Strength, attribute_forcing

#: Families with different rules: softmax before and after top-k, with and without normalization,
#: sigmoid with bias and groups, sparse mixer, 1-norm.
FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "dbrx")
TUPLES = tuple(family for family in FAMILIES if family != "dbrx")
Case = tuple[ModelBundle, list[TargetRow], list[RenderedPrompt]]


class Padding:
    """As much of a tokenizer as rows of ready token ids need."""

    pad_token_id = 0


def zoo_case(family: str) -> Case:
    """A tiny model in float64, and the loss on rows of token ids of unequal length."""
    tiny = zoo_model(family)
    tiny.model.set_experts_implementation("eager")  # grouped products know no float64
    bundle = ModelBundle(tiny.model.double(), Padding(), family, None, family)
    rendered = [
        RenderedPrompt(
            Prompt(prompt_id=at, text="-", set_name="s"), "-", tuple(ids[at:]), (), (), ()
        )
        for at, ids in enumerate(tiny.inputs["input_ids"].tolist())
    ]
    return bundle, target_rows(bundle, PromptLoss(), rendered), rendered


def measured(case: Case, *changes: dict[str, Any]) -> Any:
    """The target of each prompt under a plan, float64[P]."""
    bundle, rows, rendered = case
    with steer(bundle.model, SteeringPlan(interventions=changes)):
        return measure_target(bundle, rows, rendered)


def some(found: Attribution, number: int = 4) -> list[int]:
    """Experts with the largest effects, of different size and layer."""
    return np.argsort(-np.abs(found.values).max(1))[: 3 * number : 3].tolist()


def require_slopes(found: Any, at_step: Callable[[float], Any], size: float) -> int:
    """Effects must be slopes at 0; how many could be compared.

    Where two steps disagree something jumps between them (a later router's choice, the sparse
    mixer's threshold), and there is no slope to compare with.
    """
    wide, narrow = ((at_step(h) - at_step(-h)) / (2 * h) for h in (2e-3, 1e-3))
    smooth = np.abs(wide - narrow) < 1e-3 * size
    np.testing.assert_allclose(found[smooth], narrow[smooth], rtol=2e-3, atol=1e-3 * size)
    return int(smooth.sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_is_the_slope_of_scaling_the_expert_down(family: str) -> None:
    case = zoo_case(family)
    found = attribute(*case, num_checked=0)
    np.testing.assert_allclose(found.baseline, measured(case), rtol=1e-6)
    assert np.abs(found.values).max() > 1e-3
    size, compared = float(np.abs(found.values).max()), 0
    for at in some(found):
        layer, kind, expert = found.experts[at]
        scale = {"action": "scale", "layer": layer, "kind": kind, "experts": [expert]}

        def scaled(step: float, scale: dict[str, Any] = scale) -> Any:
            return measured(case, {**scale, "value": 1 - step})

        compared += require_slopes(found.values[at], scaled, size)
    assert compared >= 5


@contextmanager
def nudged(site: RouterSite, expert: int | None, edits: Edits, step: float) -> Iterator[None]:
    """A share of the way from tokens' weights to those that the rule gives under edits.

    Only tokens that select the expert, where one is given.
    """

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        logits, weights, ids = output[:3]
        bias = {} if site.bias is None else {"bias_E": site.bias}
        after, after_ids = select(logits, site.info.rule, edits, **bias)
        selects_T1 = torch.ones_like(ids[:, :1], dtype=torch.bool)
        if expert is not None:
            selects_T1 = (ids == expert).any(1, keepdim=True)
        moved = torch.cat([weights * (1 - step), after * step], dim=1)
        kept = torch.cat([weights, torch.zeros_like(after)], dim=1)
        both = torch.cat([ids, after_ids], dim=1)
        return (logits, torch.where(selects_T1, moved, kept), both, *output[3:])

    handle = site.router.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("mode", ["drop_renorm", "replace"])
@pytest.mark.parametrize("family", TUPLES)
def test_other_modes_are_slopes_towards_the_weights_of_the_rule(family: str, mode: Mode) -> None:
    case = zoo_case(family)
    found = attribute(*case, mode=mode, num_checked=0)
    sites = {(site.info.layer, site.info.kind): site for site in find_routers(case[0].model)}
    size, compared = float(np.abs(found.values).max()), 0
    for at in some(found):
        layer, kind, expert = found.experts[at]
        site = sites[layer, kind]
        only = torch.zeros(site.info.num_experts, dtype=torch.bool)
        only[expert] = True
        edits = Edits(drop_renorm=only) if mode == "drop_renorm" else Edits(mask_min=only)

        def moved(step: float, here: Any = (site, expert, edits)) -> Any:
            with nudged(*here, step):
                return measure_target(*case)

        compared += require_slopes(found.values[at], moved, size)
    assert compared >= 5


@pytest.mark.parametrize("strength", ["max", "natural"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_forcing_is_the_slope_towards_the_weights_under_force(
    family: str, strength: Strength
) -> None:
    case = zoo_case(family)
    site = find_routers(case[0].model)[-1]
    asked = [ExpertKey(site.info.layer, site.info.kind, expert) for expert in (0, 2, 3)]
    found = attribute_forcing(*case, strength=strength, experts=reversed(asked), experts_per_pass=2)
    assert found.experts == tuple(asked)
    size, compared = float(np.abs(found.values).max()), 0
    for key, values in zip(found.experts, found.values, strict=True):
        only = torch.zeros(site.info.num_experts, dtype=torch.bool)
        only[key.expert] = True
        edits = Edits(force_max=only) if strength == "max" else Edits(force_natural=only)

        def moved(step: float, edits: Edits = edits) -> Any:
            with nudged(site, None, edits, step):
                return measure_target(*case)

        compared += require_slopes(values, moved, size)
    assert compared >= 4


def leaf_of(
    logits: list[list[float]], rule: RoutingRule, mode: Mode
) -> tuple[Removal, Leaf, Tensor]:
    """A call of a router without a model: how experts are taken out, and the slots needed."""
    logits_TE = torch.tensor(logits)
    weights, ids = select(logits_TE, rule)
    site = RouterSite.__new__(RouterSite)
    object.__setattr__(site, "info", _Info(rule))
    routed = Routed(site, logits_TE, {}, None, weights, ids)
    removal = Removal(mode)
    slots = ids if removal.added is None else torch.cat([ids, removal.added(routed)], dim=1)
    return removal, Leaf(routed, torch.zeros(slots.shape), slots), slots


class _Info:
    """What of a layer's description taking out reads."""

    def __init__(self, rule: RoutingRule) -> None:
        self.rule = rule


def effects(logits: list[list[float]], rule: RoutingRule, mode: Mode, worth: list[float]) -> Any:
    """Effect by expert of the first token, given what a unit of weight of each is worth."""
    removal, leaf, slots = leaf_of(logits, rule, mode)
    found, ids = removal.effects(leaf, torch.tensor(worth)[slots], 0)
    return dict(zip(ids[0].tolist(), found[0].tolist(), strict=True))


def test_by_hand() -> None:
    """Three experts, logits ln 3, 0 and -1, two selected with weights 3/4 and 1/4."""
    rule = RoutingRule(num_experts=3, top_k=2, renormalize=True)
    logits, worth = [[math.log(3), 0.0, -1.0]], [2.0, 4.0, 7.0]
    assert effects(logits, rule, "drop", worth) == pytest.approx({0: -1.5, 1: -1.0})
    # Total worth 2.5; without 0 all weight is on 1, worth 4; without 1 on 0, worth 2.
    assert effects(logits, rule, "drop_renorm", worth) == pytest.approx({0: 1.5, 1: -0.5})
    # Without 0: experts 1 and 2 with weights 1 and 1/e over their sum.
    second = 1 / (1 + math.e)
    third = math.exp(-1) / (3 + math.exp(-1))
    assert effects(logits, rule, "replace", worth) == pytest.approx(
        {
            0: 4 * (1 - second) + 7 * second - 2.5,
            1: 2 * (1 - third) + 7 * third - 2.5,
        },
        rel=1e-5,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10_000), st.booleans())
def test_drop_renorm_is_the_published_formula(top_k: int, seed: int, renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rule = RoutingRule(num_experts=6, top_k=top_k, renormalize=renormalize)
    logits = torch.randn(1, 6, generator=generator)
    worth = torch.randn(6, generator=generator).double()
    weights, ids = select(logits, rule)
    total = weights.double().sum()
    found = effects(logits.tolist(), rule, "drop_renorm", worth.tolist())
    mean = (weights[0].double() * worth[ids[0]]).sum() / total
    for weight, expert in zip((weights[0].double() / total), ids[0].tolist(), strict=True):
        formula = -total * weight / (1 - weight) * (worth[expert] - mean)
        assert found[expert] == pytest.approx(float(formula), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("mode", ["drop", "drop_renorm", "replace"])
def test_under_a_base_plan_effects_are_those_on_the_steered_model(mode: Mode) -> None:
    """One plan on the routers of this and other layers, by scope; slopes as of the plan alone."""
    case = zoo_case("mixtral")
    first, *_, last = (site.info.layer for site in find_routers(case[0].model))
    base: tuple[dict[str, Any], ...] = (
        {"action": "mask", "layer": first, "experts": [0, 1]},
        {"action": "mask", "layer": last, "experts": [2], "mode": "drop", "tokens": "last_prompt"},
        {"action": "scale", "layer": last, "experts": [1], "value": 0.5},
    )
    plan = SteeringPlan(interventions=base)
    found = attribute(*case, mode=mode, base_plan=plan, num_checked=0)
    np.testing.assert_allclose(found.baseline, measured(case, *base), rtol=1e-6)
    plain = attribute(*case, mode=mode, num_checked=0)
    assert np.abs(found.values - plain.values).max() > 1e-3
    gone = [
        at for at, key in enumerate(found.experts) if key in [(first, "mlp", 0), (first, "mlp", 1)]
    ]
    assert np.all(found.values[gone] == 0)
    if mode != "drop":
        return
    size, compared = float(np.abs(found.values).max()), 0
    for at in some(found):
        layer, _, expert = found.experts[at]
        scale = {"action": "scale", "layer": layer, "experts": [expert]}
        if (layer, expert) == (last, 1):
            continue

        def scaled(step: float, scale: dict[str, Any] = scale) -> Any:
            return measured(case, *base, {**scale, "value": 1 - step})

        compared += require_slopes(found.values[at], scaled, size)
    assert compared >= 3


def planted_case(planted: PlantedModel, label: str = "sensitive") -> Case:
    """How much likelier a refusal is than the answer, on some prompts of a label."""
    bundle = ModelBundle(planted.model, planted.tokenizer, "planted", None, "qwen3_moe")
    prompts = [
        Prompt(prompt_id=at, text=text, set_name="s", expected=answer)
        for at, (text, own, answer) in enumerate(
            zip(planted.prompts, planted.labels, planted.answers, strict=True)
        )
        if own == label
    ][:12]
    rendered = [render_prompt(bundle.tokenizer, one) for one in prompts]
    first = {one.prompt_id: planted.refusal for one in prompts}
    target = OpeningDifference(first=first, num_tokens=1)
    return bundle, target_rows(bundle, target, rendered), rendered


@pytest.mark.parametrize("mode", ["drop", "drop_renorm", "replace"])
def test_the_planted_expert_is_the_only_cause(mode: Mode) -> None:
    planted = expert_refusal()
    assert planted.refusal_expert is not None
    layer, expert = planted.refusal_expert
    found = attribute(*planted_case(planted), mode=mode)
    means = dict(zip(found.experts, found.means, strict=True))
    own = means.pop(ExpertKey(layer, "mlp", expert))
    # Renormalized without it, the other experts of the token write nothing either.
    assert own < -1
    others = [value for key, value in means.items() if key.layer != layer]
    assert np.abs(others).max() < 1e-4
    if mode == "drop":
        assert np.abs(list(means.values())).max() < 1e-4
    assert found.agreement is not None
    at = found.agreement.experts.index(ExpertKey(layer, "mlp", expert))
    assert found.agreement.exact[at] < -1


def test_where_attention_refuses_no_expert_is_a_cause() -> None:
    found = attribute(*planted_case(attention_refusal()))
    assert np.abs(found.values).max() < 1e-5
    assert found.agreement is not None
    assert math.isnan(found.agreement.spearman)


def test_forcing_the_planted_expert_makes_neutral_prompts_refuse() -> None:
    planted = expert_refusal()
    assert planted.refusal_expert is not None
    layer, expert = planted.refusal_expert
    case = planted_case(planted, label="neutral")
    found = attribute_forcing(*case)
    means = dict(zip(found.experts, found.means, strict=True))
    assert means.pop(ExpertKey(layer, "mlp", expert)) > 1
    others = [value for key, value in means.items() if key.layer != layer]
    assert np.abs(others).max() < 1e-4
    force = {"action": "force", "layer": layer, "experts": [expert]}
    assert (measured(case, force) - measured(case)).mean() > 1


def test_batches_make_no_difference_and_the_model_is_left_as_it_was(tiny_bundle: Any) -> None:
    prompts = [Prompt(prompt_id=at, text="x" * (3 + 5 * at), set_name="s") for at in range(4)]
    rendered = [render_prompt(tiny_bundle.tokenizer, one) for one in prompts]
    case = tiny_bundle, target_rows(tiny_bundle, PromptLoss(), rendered), rendered
    model = tiny_bundle.model
    before = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    done: list[tuple[int, int]] = []
    one = attribute(*case, tokens_per_batch=1, num_checked=0, progress=lambda *at: done.append(at))
    many = attribute(*case, tokens_per_batch=4096, num_checked=0)
    np.testing.assert_allclose(one.values, many.values, atol=1e-4)
    assert done == [(number, 4) for number in (1, 2, 3, 4)]
    after = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    assert before == after
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_table_draws_units(tiny_bundle: Any) -> None:
    experts = (ExpertKey(0, "mlp", 0), ExpertKey(0, "mlp", 1))
    values = np.array([[1.0, 1.0, 3.0, 3.0], [0.0, 2.0, 0.0, 2.0]])
    found = Attribution(experts, values, np.zeros(4), "m", 3.0)
    frame = found.frame(["a", "a", "b", "b"])
    wanted = ["layer", "kind", "expert", "estimate", "low", "high", "n", "num_units"]
    assert list(frame.columns) == wanted
    assert frame.estimate.tolist() == [2.0, 1.0]
    assert frame.n.tolist() == [4, 4]
    assert frame.num_units.tolist() == [2, 2]
    assert (frame.low[0], frame.high[0]) == (1.0, 3.0)
    assert (frame.low[1], frame.high[1]) == (1.0, 1.0)
    assert found.frame(["a"] * 4).low.isna().all()
    with pytest.raises(InputError, match="1 units were given for 4 prompts"):
        found.frame(["a"])


def test_what_cannot_be_estimated_is_refused() -> None:
    bundle, rows, rendered = zoo_case("llama4")
    with pytest.raises(ModelInputError, match="mode 'drop' can"):
        attribute(bundle, rows, rendered, mode="replace")
    case = zoo_case("mixtral")
    layer = find_routers(case[0].model)[0].info.layer
    replay = SteeringPlan(interventions=[{"action": "replay", "layer": layer, "run": "r"}])
    with pytest.raises(PlanError, match="replays a run"):
        attribute(*case, base_plan=replay)
    with pytest.raises(InputError, match="there is no expert 99 in layer"):
        attribute_forcing(*case, experts=[ExpertKey(layer, "mlp", 99)])
    far = SteeringPlan(interventions=[{"action": "mask", "layer": 99, "experts": [0]}])
    with pytest.raises(PlanError, match="99"):
        attribute(*case, base_plan=far)
