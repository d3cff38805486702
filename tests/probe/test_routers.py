"""Finding routers, and the proof: it passes on the real modules and catches wrong rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moescope.probe.errors import ModelInputError, RecordingError
from moescope.probe.routers import find_routers, require_moe_family, verify_routers
from moescope.probe.routers.families import FAMILIES

TINY = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
TOKENS = torch.arange(1, 25).reshape(1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TINY)
def test_every_family_is_proved(
    tiny_model: Callable[..., Any], family: str, dtype: torch.dtype
) -> None:
    model = tiny_model(family).to(dtype)
    sites = verify_routers(model, TOKENS)
    assert [site.info.layer for site in sites] == [0, 1, 2]
    assert all(site.info.verified for site in sites), [site.info.reason for site in sites]
    assert {(s.info.num_experts, s.info.top_k) for s in sites} == {(8, 2)}
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", TINY)
def test_a_wrong_rule_is_caught(
    tiny_model: Callable[..., Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = FAMILIES[family]
    wrong = replace(
        spec,
        read_rule=lambda *live: replace(
            spec.read_rule(*live), renormalize=not spec.read_rule(*live).renormalize
        ),
    )
    monkeypatch.setitem(FAMILIES, family, wrong)
    sites = verify_routers(tiny_model(family), TOKENS)
    assert all(not site.info.verified for site in sites)
    assert {site.info.reason for site in sites} == {
        "the rule gives other routing weights than the router did"
    }


def test_dense_layers_between_keep_their_index(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[0, 2])
    (site,) = verify_routers(model, TOKENS)
    assert (site.info.layer, site.info.moe_layer) == (1, 0)


def test_a_dense_model_and_an_unknown_family_are_named(tiny_model: Callable[..., Any]) -> None:
    from transformers import AutoConfig

    with pytest.raises(ModelInputError, match=r"'llama'\) is a dense model without routers"):
        require_moe_family(AutoConfig.for_model("llama"), "my-llama")
    with pytest.raises(ModelInputError, match="family 'gemma2', whose routing"):
        config = AutoConfig.for_model("gemma2")
        config.num_experts = 4
        require_moe_family(config, "my-gemma")
    dense = tiny_model("qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(RecordingError, match="no module of class Qwen3MoeTopKRouter"):
        find_routers(dense)


def test_a_router_that_is_bypassed_stops_with_its_layer(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    block = model.model.layers[1].mlp

    def fused(hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 0.5

    block.forward = fused
    with pytest.raises(RecordingError, match=r"layer 1 .*was not called"):
        verify_routers(model, TOKENS)


def test_experts_that_ignore_the_router_are_caught(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("mixtral")
    block = model.model.layers[2].mlp
    original = block.experts.forward
    block.experts.forward = lambda hidden, ids, weights: original(
        hidden, torch.zeros_like(ids) + torch.arange(2), torch.full_like(weights, 0.5)
    )
    sites = verify_routers(model, TOKENS)
    assert [site.info.verified for site in sites] == [True, True, False]
    assert sites[2].info.reason == "masking the most used expert does not change the output"
