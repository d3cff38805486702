"""Which family a configuration belongs to, and families that other packages add."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moescope.probe.errors import ModelInputError, RecordingError, UnknownRoutingError
from moescope.probe.routers import (
    find_routers,
    known_families,
    require_moe_family,
    verify_routers,
)
from moescope.probe.routers.families import FAMILIES
from moescope.probe.routers.registry import added_families
from moescope.probe.zoo import tiny_model as tiny_of_zoo

TOKENS = torch.arange(1, 25).reshape(1, -1)

#: A family of another package: Qwen3-MoE's modules under a model type of its own.
PACKAGE = """
from moescope.probe.routers import RouterSpec, TupleForm
from moescope.probe.routers.families import FAMILIES
from moescope.probe.routers.softmax_rules import optionally_normalized

SPEC = RouterSpec(
    family="someones_moe", router_class="Qwen3MoeTopKRouter", read_rule=optionally_normalized,
    form=TupleForm(),
)
TAKEN = FAMILIES["mixtral"]
NOTHING = 7


def both():
    return [SPEC]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs a package with one entry point, as pip does: a module and its metadata."""

    def with_entry(value: str) -> None:
        (tmp_path / "someones_package.py").write_text(PACKAGE, "utf-8")
        info = tmp_path / "someones_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: someones-package\nVersion: 1.0\n", "utf-8")
        (info / "entry_points.txt").write_text(
            f"[moescope.families]\nsomeones_moe = {value}\n", "utf-8"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "someones_package", raising=False)
        added_families.cache_clear()

    yield with_entry
    added_families.cache_clear()


def someones_model(tiny_model: Callable[..., Any]) -> Any:
    """A model whose configuration class is not of transformers."""
    from transformers import Qwen3MoeConfig

    class SomeonesConfig(Qwen3MoeConfig):
        model_type = "someones_moe"

    model = tiny_model("qwen3_moe")
    fields = model.config.to_dict()
    del fields["model_type"]
    model.config = SomeonesConfig(**fields)
    return model


@pytest.mark.parametrize("value", ["someones_package:SPEC", "someones_package:both"])
def test_an_entry_point_adds_a_family(
    value: str, install: Callable[[str], None], tiny_model: Callable[..., Any]
) -> None:
    model = someones_model(tiny_model)
    with pytest.raises(ModelInputError, match="family 'someones_moe', whose routing"):
        find_routers(model)
    install(value)
    assert set(known_families()) == {*FAMILIES, "someones_moe"}
    sites = verify_routers(model, TOKENS)
    assert [site.info.layer for site in sites] == [0, 1, 2]
    assert all(site.info.verified for site in sites)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("someones_package:TAKEN", "adds the model family 'mixtral', which is there already"),
        ("someones_package:NOTHING", "is 7, not a RouterSpec"),
        ("someones_package:absent", "cannot be loaded: module 'someones_package' has no"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_named(
    value: str, problem: str, install: Callable[[str], None]
) -> None:
    install(value)
    with pytest.raises(RecordingError, match=problem) as caught:
        known_families()
    assert value.partition(":")[0] in str(caught.value)


def test_a_vision_language_model_routes_as_its_text_model_does() -> None:
    from transformers import AutoConfig

    whole = AutoConfig.for_model("qwen3_vl_moe")
    assert require_moe_family(whole, "some-model").family == "qwen3_vl_moe"
    assert require_moe_family(whole.text_config, "its-text-model").family == "qwen3_vl_moe"


@pytest.mark.parametrize("family", ["gemma4", "doge", "granitemoeshared"])
def test_a_dense_model_of_a_family_with_routed_ones_is_dense(family: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in (("enable_moe_block", False), ("is_moe", False)):
            if hasattr(part, name):
                setattr(part, name, value)
        if family == "granitemoeshared":
            part.num_local_experts = 0
    with pytest.raises(ModelInputError, match="is a dense model without routers"):
        require_moe_family(config, "some-model")


UNKNOWN: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "renamed field": (
        "mixtral", lambda router: delattr(router, "top_k"), "MixtralTopKRouter has no `top_k`"
    ),
    "no number": (
        "deepseek_v3",
        lambda router: setattr(router, "routed_scaling_factor", "two"),
        "routed_scaling_factor is 'two', not a number",
    ),
    "method": (
        "deepseek_v2",
        lambda router: setattr(router, "topk_method", "noaux_tc"),
        "topk_method is 'noaux_tc'",
    ),
    "score": (
        "deepseek_v4",
        lambda router: setattr(router, "score_fn", torch.nn.ReLU()),
        "neither a sigmoid nor a sqrt-softplus",
    ),
    "function": (
        "cohere2_moe",
        lambda router: setattr(router, "expert_selection_fn", "entmax"),
        "expert_selection_fn is 'entmax'",
    ),
    "impossible": (
        "olmoe", lambda router: setattr(router, "top_k", 9), "8 experts cannot select 9"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_cannot_be_read_is_named_with_its_layer(what: str) -> None:
    family, spoil, problem = UNKNOWN[what]
    model = tiny_of_zoo(family).model
    site = find_routers(model)[-1]
    spoil(site.router)
    with pytest.raises(UnknownRoutingError) as caught:
        find_routers(model)
    assert problem in str(caught.value)
    assert f"layer {site.info.layer} ({site.info.module})" in str(caught.value)
