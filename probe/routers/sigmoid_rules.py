"""Rules of routers that score with a sigmoid or a sqrt-softplus.

Each function reads the rule of the routers named in it (transformers 5.23,
`models/<family>/modeling_<family>.py`) from router, block and text configuration.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moescope.kernels.route import RoutingRule
from moescope.probe.routers.reading import (
    flag,
    groups_of,
    hidden_dtype,
    number,
    rule_of,
    score_of,
)


def deepseek_v3(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """DeepSeek-V3 and the many that follow it: bias for choosing, groups by their two best."""
    del block, config
    return _plain(
        router,
        renormalize=flag(router, "norm_topk_prob"),
        groups=groups_of(router, fill="-inf"),
        epsilon=1e-20,
        scale=number(router, "routed_scaling_factor"),
        sorted_ids=False,
    )


def axk2(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """A.X K2: as DeepSeek-V3, but experts outside the groups count as 0 and can still win."""
    return replace(deepseek_v3(router, block, config), groups=groups_of(router, fill="0"))


def beam(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Beam: as DeepSeek-V3, sorted, and the scale is applied after the experts."""
    del config
    return _plain(
        router,
        renormalize=flag(router, "norm_topk_prob"),
        groups=groups_of(router, fill="-inf"),
        epsilon=1e-20,
        scale=number(block, "routed_scaling_factor"),
        scale_in_block=True,
    )


def _plain(router: nn.Module, **more: Any) -> RoutingRule:
    """A selection bias and a sigmoid, always normalized, unless told otherwise."""
    fields: dict[str, Any] = {"renormalize": True, "score": "sigmoid", "selection_bias": "score"}
    return rule_of(router, **(fields | more))


def afmoe(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """AFMoE: the block hands the bias to the router."""
    del block, config
    return _plain(router, epsilon=1e-20, scale=number(router, "route_scale"))


def hy_v3(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Hunyuan 3: the block hands the bias to the router."""
    del block, config
    return _plain(
        router, epsilon=1e-20, scale=number(router, "router_scaling_factor"), sorted_ids=False
    )


def scored_by_name(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """DeepSeek-V4 and Inkling 2: `score_fn`, in the dtype that the logits have."""
    del block, config
    return _plain(
        router,
        score=score_of(router),
        epsilon=1e-20,
        scale=number(router, "routed_scaling_factor"),
        arithmetic="native",
        sorted_ids=False,
    )


def from_table(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """DeepSeek-V4's hash layers: ids by token id, weights from the scores."""
    return replace(scored_by_name(router, block, config), selection_bias="none", from_table=True)


def muse_spark(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Muse Spark: an epsilon of its own; logits are already multiplied."""
    del block, config
    return _plain(
        router,
        epsilon=number(router, "norm_topk_prob_eps"),
        scale=number(router, "routed_scaling_factor"),
        sorted_ids=False,
    )


def minimax_m2(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """MiniMax M2: weights in float32, no epsilon; the block hands the bias to the router."""
    del block, config
    return _plain(router, sorted_ids=False, weight_dtype="float32")


def scaled_in_block(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """MiniMax M3-VL and Step 3.7: as MiniMax M2, and the block scales after the experts."""
    return replace(
        minimax_m2(router, block, config),
        scale=number(block, "routed_scaling_factor"),
        scale_in_block=True,
    )


def laguna(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Laguna: capped float32 logits; the block scales after the experts."""
    return _plain(
        router,
        scale=number(block, "routed_scaling_factor"),
        scale_in_block=True,
        weight_dtype=hidden_dtype(block, config),
    )


def lfm2(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """LFM2-MoE: the logits' own dtype; bias and normalization are both optional."""
    del block, config
    return _plain(
        router,
        renormalize=flag(router, "norm_topk_prob"),
        selection_bias="score" if flag(router, "use_expert_bias") else "none",
        epsilon=1e-6,
        scale=number(router, "routed_scaling_factor"),
        arithmetic="native",
    )


def flint(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Flint: neither bias nor epsilon."""
    del block, config
    return _plain(router, renormalize=flag(router, "norm_topk_prob"), selection_bias="none")


def kolibri(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Kolibri: the bias is added to the logits; sigmoid of the chosen."""
    del block, config
    return _plain(
        router,
        renormalize=flag(router, "norm_topk_prob"),
        score="identity",
        weights="sigmoid_topk",
        selection_bias="logit",
    )


def inkling(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Inkling: routed and shared experts are normalized together."""
    return _plain(
        router,
        renormalize=False,
        weights="logsigmoid_shared",
        scale=number(router, "route_scale"),
        sorted_ids=False,
        weight_dtype=hidden_dtype(block, config),
    )


def llama4(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Llama 4: sigmoid of the chosen logits; the weights scale what the experts get."""
    del block, config
    return _plain(
        router,
        renormalize=False,
        score="identity",
        weights="sigmoid_all",
        selection_bias="none",
    )
