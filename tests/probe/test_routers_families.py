"""Every family: found, read and proved on a tiny model of it, and no wrong rule passes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from moescope.kernels.route import RoutingRule
from moescope.probe.routers import find_routers, known_families, verify_routers
from moescope.probe.routers.families import FAMILIES
from moescope.probe.routers.spec import RouterSpec
from moescope.probe.zoo import TinyModel, families, tiny_model

pytestmark = pytest.mark.families

ROWS = [row for family in families() for row in family.rows]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Families whose layers can be recorded only, and why.
RECORD_ONLY = {
    "doge": "one block, so nothing between them can be replaced",
    "nllb_moe": "ignore which expert was chosen",
}


@cache
def built(row: str) -> TinyModel:
    return tiny_model(row)


def no_hooks(model: torch.nn.Module) -> bool:
    return not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_every_family_found_has_an_entry_and_the_other_way_round() -> None:
    found = {family.name for family in families() if family.reason is None}
    assert found == set(FAMILIES)
    assert len(found) >= 72


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_router_class_is_one_of_the_family(family: str) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for spec in (FAMILIES[family], *FAMILIES[family].variants):
        assert hasattr(module, spec.router_class) or spec.router_class == "Linear"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_every_layer_is_proved(row: str, dtype: str) -> None:
    tiny = tiny_model(row, dtype=DTYPES[dtype])
    sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    family = row.partition("+")[0]
    for site in sites:
        if family in RECORD_ONLY:
            assert not site.info.verified and RECORD_ONLY[family] in str(site.info.reason)
        else:
            assert site.info.verified, site.info.reason
    assert no_hooks(tiny.model)


@pytest.mark.parametrize("row", ROWS)
def test_every_routed_layer_is_found_once(row: str) -> None:
    """By the modules that a forward runs: each experts module that runs belongs to one router."""
    tiny = built(row)
    sites = find_routers(tiny.model)
    keys = [(site.info.layer, site.info.kind) for site in sites]
    assert len(set(keys)) == len(keys)
    for kind in {site.info.kind for site in sites}:
        ordinals = [site.info.moe_layer for site in sites if site.info.kind == kind]
        assert ordinals == list(range(len(ordinals)))
    ran: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: ran.add(name))
        for name, module in tiny.model.named_modules()
        if name.rpartition(".")[2] in ("experts", "down_embed", "input_linear")
    ]
    try:
        with torch.no_grad():
            tiny.model(**tiny.inputs)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in tiny.model.named_modules()}
    seen_by_us = {names[site.experts] for site in sites}
    assert {name for name in ran if "shared_mlp" not in name and "vision" not in name} == seen_by_us


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shared_experts_are_not_overlooked(family: str) -> None:
    """Modules with `shared` in their name are the shared experts (T5 calls its embedding so)."""
    model = built(family).model
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    has_some = any("shared" in name for name in names - {"shared"})
    assert {site.info.num_shared_experts > 0 for site in find_routers(model)} == {has_some}


def mutations(rule: RoutingRule) -> Iterator[tuple[str, RoutingRule]]:
    """Rules that are wrong in one thing that the returned ids or weights depend on."""
    if rule.selection_bias != "none":
        yield "bias", replace(rule, selection_bias="none")
    if rule.weights not in ("softmax_topk", "sparsemixer", "logsigmoid_shared"):
        yield "renormalization", replace(rule, renormalize=not rule.renormalize)
    if not rule.scale_in_block:
        yield "scale", replace(rule, scale=rule.scale * 1.01)
    if rule.groups is not None:
        yield "groups", replace(rule, groups=None)
        if rule.groups.kept + 1 < rule.groups.count:
            more = replace(rule.groups, kept=rule.groups.kept + 1)
            yield "groups kept", replace(rule, groups=more)
    if rule.top_k > 1 and not rule.from_table and rule.weights != "sparsemixer":
        yield "top-k", replace(rule, top_k=rule.top_k - 1)
    if rule.epsilon and rule.renormalize:
        yield "epsilon", replace(rule, epsilon=0.3, epsilon_is_floor=False)
    if rule.score in ("softmax", "sigmoid", "sqrtsoftplus") and rule.weights == "score":
        other = "sigmoid" if rule.score == "softmax" else "softmax"
        yield "score", replace(rule, score=other)
    if rule.capacity is not None and rule.capacity < 10:
        yield "capacity", replace(rule, capacity=rule.capacity + 1)
    if rule.has_skip:
        yield "skip", replace(rule, has_skip=False)
    if rule.num_zero_experts == 0 and rule.divided_by_top_k:
        yield "division", replace(rule, divided_by_top_k=False)


def with_rule(
    monkeypatch: pytest.MonkeyPatch, family: str, change: Callable[[RoutingRule], RoutingRule]
) -> None:
    """Let the entry of a family read a rule that is changed."""

    def changed(spec: RouterSpec) -> RouterSpec:
        def read(*live: Any) -> RoutingRule:
            return change(spec.read_rule(*live))

        return replace(spec, read_rule=read)

    spec = FAMILIES[family]
    entry = replace(changed(spec), variants=tuple(changed(one) for one in spec.variants))
    monkeypatch.setitem(FAMILIES, family, entry)


NEGATIVES = [row for row in ROWS if row.partition("+")[0] not in RECORD_ONLY and "whole" not in row]


@pytest.mark.parametrize("row", NEGATIVES)
def test_a_wrong_rule_is_caught(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = built(row)
    right = find_routers(tiny.model)
    names = sorted({name for site in right for name, _ in mutations(site.info.rule)})
    assert names
    for name in names:
        with monkeypatch.context() as patch:
            with_rule(
                patch,
                row.partition("+")[0],
                lambda rule, name=name: dict(mutations(rule)).get(name, rule),
            )
            wrong = {
                site.info.module
                for site in find_routers(tiny.model)
                if name in dict(mutations_of(right, site.info.module))
            }
            sites = verify_or_refuse(tiny)
        if sites is None:
            continue  # shapes or numbers of tokens do not fit, so nothing would be recorded
        passed = {site.info.module for site in sites if site.info.verified}
        # One layer alone may route alike by chance under a slightly wrong rule; not all of them.
        assert wrong and not wrong <= passed, f"{row}: {name}"
    assert no_hooks(tiny.model)


def mutations_of(sites: list[Any], module: str) -> Iterator[tuple[str, RoutingRule]]:
    return mutations(next(site.info.rule for site in sites if site.info.module == module))


def verify_or_refuse(tiny: TinyModel) -> list[Any] | None:
    from moescope.probe.errors import RecordingError

    try:
        return verify_routers(tiny.model, tiny.inputs["input_ids"])
    except RecordingError as error:
        assert "layer " in str(error)
        return None


@pytest.mark.parametrize(
    "family", sorted(name for name, spec in FAMILIES.items() if spec.bias is not None)
)
def test_a_bias_looked_for_in_the_wrong_place_is_caught(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, spec = built(family), FAMILIES[family]
    assert spec.bias is not None
    find = spec.bias

    def zeros(router: torch.nn.Module, block: torch.nn.Module) -> torch.Tensor | None:
        found = find(router, block)
        return None if found is None else torch.zeros_like(found)

    monkeypatch.setitem(FAMILIES, family, replace(spec, bias=zeros))
    sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    reasons = {site.info.reason for site in sites}
    assert "the rule selects other experts than the router did" in reasons
    monkeypatch.setitem(FAMILIES, family, replace(spec, bias=lambda router, block: None))
    sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    assert all("cannot be applied without bias_E" in str(site.info.reason) for site in sites)


@pytest.mark.parametrize(
    ("family", "changes", "shared"),
    [
        ("deepseek_v3", {"n_shared_experts": 3}, 3),
        ("afmoe", {"num_shared_experts": 2}, 2),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0}, 0),
        ("ernie4_5_moe", {"moe_num_shared_experts": 2}, 2),
        ("qwen2_moe", {}, 1),
        ("granitemoeshared", {}, 1),
        ("hunyuan_v1_moe", {}, 1),
        ("llama4", {}, 1),
        ("gemma4", {}, 0),
        ("mixtral", {}, 0),
    ],
)
def test_shared_experts_are_counted(family: str, changes: dict[str, int], shared: int) -> None:
    config = built(family).model.config.__class__.from_dict(
        built(family).model.config.to_dict() | changes
    )
    model = type(built(family).model)(config)
    assert {site.info.num_shared_experts for site in find_routers(model)} == {shared}


def test_zero_computation_and_skip_classes_count_as_classes() -> None:
    (site, *_) = find_routers(built("longcat_flash").model)
    assert (site.info.num_experts, site.info.rule.num_zero_experts) == (12, 4)
    (site, *_) = find_routers(built("zaya").model)
    assert site.info.num_experts == 9 and site.info.rule.has_skip


def test_kinds_tell_attention_encoder_and_decoder_apart() -> None:
    kinds = {
        family: [site.info.kind for site in find_routers(built(family).model)]
        for family in ("jetmoe", "switch_transformers", "nllb_moe", "olmoe")
    }
    assert sorted(kinds["jetmoe"]) == ["attention"] * 3 + ["mlp"] * 3
    assert kinds["switch_transformers"] == kinds["nllb_moe"] == ["encoder", "mlp"]
    assert kinds["olmoe"] == ["mlp"] * 3


def test_the_rule_is_read_anew_each_time() -> None:
    model = tiny_model("olmoe").model
    router = find_routers(model)[1].router
    router.norm_topk_prob = not router.norm_topk_prob
    rules = [site.info.rule.renormalize for site in find_routers(model)]
    assert rules[0] == rules[2] != rules[1]


def test_known_families_are_the_built_in_ones_here() -> None:
    assert set(FAMILIES) <= set(known_families())


@pytest.mark.parametrize(
    ("family", "idle_share", "names"),
    [
        ("mixtral", 6 / 8, ("gate_up_proj", "down_proj")),
        ("jetmoe", 6 / 8, ("input_linear.weight", "output_linear.weight")),
        ("doge", 12 / 16, ("down_embed.weight", "up_embed.weight")),
        ("zaya", 7 / 8, ("experts.gate_up_proj", "experts.down_proj")),
        ("switch_transformers", 7 / 8, ("wi.weight", "wo.weight")),
    ],
)
def test_the_experts_that_a_token_passes_over_are_all_counted(
    family: str, idle_share: float, names: tuple[str, ...]
) -> None:
    """By parameter names: every weight with one of these names in a routed block is an expert's."""
    model = built(family).model
    sites = find_routers(model)
    block_names = {name for name, one in model.named_modules() for s in sites if one is s.block}
    held = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.endswith(names) and any(name.startswith(f"{block}.") for block in block_names)
    )
    assert sum(site.idle_parameters for site in sites) == round(held * idle_share)
