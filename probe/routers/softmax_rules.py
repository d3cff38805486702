"""Rules of routers that rank by a softmax, or by the raw logits.

Each function reads the rule of the routers named in it (transformers 5.23,
`models/<family>/modeling_<family>.py`) from router, block and text configuration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moescope.kernels.route import Groups, RoutingRule
from moescope.probe.errors import UnknownRoutingError
from moescope.probe.routers.reading import (
    flag,
    groups_of,
    hidden_dtype,
    number,
    rule_of,
    setting,
    value_of,
    whole,
)


def optionally_normalized(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """OLMoE, Qwen2-MoE, Qwen3-MoE, ...: `norm_topk_prob` decides; weights in the logits' dtype."""
    del block, config
    return rule_of(
        router,
        renormalize=flag(router, "norm_topk_prob"),
    )


def always_normalized(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Qwen3.5-MoE, Qwen3-VL-MoE, Hunyuan: weights always sum to 1, in the logits' dtype."""
    del block, config
    return rule_of(router, renormalize=True)


def normalized_in_float32(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Mixtral, MiniMax: weights always sum to 1 and stay in float32."""
    del block, config
    return rule_of(
        router,
        renormalize=True,
        weight_dtype="float32",
    )


def never_normalized(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Jamba: the probabilities themselves."""
    del block, config
    return rule_of(router, renormalize=False)


def greedy_or_grouped(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """DeepSeek-V2 and the two OCR models: `topk_method`; outside the groups weights are 0 too."""
    del block, config
    method = value_of(router, "topk_method")
    groups = None
    if method == "group_limited_greedy":
        groups = Groups(
            count=whole(router, "num_group"), kept=whole(router, "topk_group"), score="max",
            fill="0", masks_weights=True,
        )  # fmt: skip
    elif method != "greedy":
        raise UnknownRoutingError(
            f"{type(router).__name__}.topk_method is {method!r}; known are 'greedy' and "
            "'group_limited_greedy'"
        )
    return rule_of(
        router,
        renormalize=False,
        groups=groups,
        scale=number(router, "routed_scaling_factor"),
        sorted_ids=False,
    )


def mistral4(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Mistral 4: softmax in the logits' own dtype, groups whose others count as 0."""
    del block, config
    return rule_of(
        router,
        renormalize=flag(router, "norm_topk_prob"),
        epsilon=1e-20,
        groups=groups_of(router, fill="0"),
        scale=number(router, "routed_scaling_factor"),
        arithmetic="native",
        sorted_ids=False,
    )


def mistral_large4(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Mistral Large 4: as Mistral 4, always normalized, on float32 logits."""
    del block, config
    return rule_of(
        router,
        renormalize=True,
        epsilon=1e-20,
        groups=groups_of(router, fill="0"),
        scale=number(router, "routed_scaling_factor"),
        sorted_ids=False,
    )


def longcat(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """LongCat-Flash: selection bias; the last experts are identities."""
    del block, config
    classes = whole(router, "n_routed_experts")
    return RoutingRule(
        num_experts=classes,
        top_k=whole(router, "top_k"),
        renormalize=False,
        selection_bias="score",
        scale=number(router, "routed_scaling_factor"),
        sorted_ids=False,
        num_zero_experts=classes - whole(router, "num_experts"),
    )


def ernie(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Ernie 4.5: selection bias in `moe_statics`; the sum has a floor."""
    return rule_of(
        router,
        renormalize=True,
        selection_bias="score",
        epsilon=number(router, "norm_min"),
        epsilon_is_floor=True,
        weight_dtype=hidden_dtype(block, config),
    )


def of_the_chosen(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Aria, GPT-OSS: softmax of the K logits, in their own dtype."""
    del block, config
    return rule_of(
        router,
        renormalize=False,
        score="identity",
        weights="softmax_topk",
        arithmetic="native",
    )


def of_the_chosen_in_float32(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Granite, JetMoE: softmax of the K logits in float32, weights in the hidden states' dtype."""
    return rule_of(
        router,
        renormalize=False,
        score="identity",
        weights="softmax_topk",
        weight_dtype=hidden_dtype(block, config),
    )


def privacy_filter(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """OpenAI's privacy filter: divided by K here, times K in the block."""
    del block, config
    return rule_of(
        router,
        renormalize=False,
        score="identity",
        weights="softmax_topk",
        divided_by_top_k=True,
    )


def cohere2(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Cohere 2 MoE: softmax or sigmoid (`expert_selection_fn`) of the K logits."""
    del block, config
    function = value_of(router, "expert_selection_fn")
    if function == "softmax":
        return rule_of(router, renormalize=False, score="identity", weights="softmax_topk")
    if function == "sigmoid":
        return rule_of(
            router, renormalize=flag(router, "norm_topk_prob"), score="identity",
            weights="sigmoid_topk", arithmetic="native",
        )  # fmt: skip
    raise UnknownRoutingError(
        f"{type(router).__name__}.expert_selection_fn is {function!r}; known are 'softmax' and "
        "'sigmoid'"
    )


def phimoe(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Phi-3.5-MoE: the sparse mixer, as it is outside training."""
    del block, config
    return rule_of(
        router,
        renormalize=False,
        weights="sparsemixer",
        jitter=number(router, "router_jitter_noise"),
        arithmetic="native",
    )


def gemma4(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Gemma 4: the router returns probabilities; a learned factor per expert comes last."""
    del block, config
    own = value_of(router, "config")
    return RoutingRule(
        num_experts=int(setting(own, "num_experts", router)),
        top_k=int(setting(own, "top_k_experts", router)),
        renormalize=True,
        score="probabilities",
        weights="scaled_probability",
    )


def zaya(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Zaya: top-1 with a balancing bias; the last class uses no expert."""
    del block, config
    return RoutingRule(
        num_experts=whole(router, "num_router_classes"),
        top_k=whole(router, "top_k"),
        renormalize=False,
        selection_bias="score",
        arithmetic="native",
        has_skip=True,
    )


def dbrx(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """DBRX: the block selects, and divides by a p-norm where one is configured."""
    del config
    order = getattr(block, "moe_normalize_expert_weights", None)
    return RoutingRule(
        num_experts=int(value_of(router, "layer").out_features),
        top_k=whole(block, "top_k"),
        renormalize=order is not None,
        norm_order=None if order is None else float(order),
        arithmetic="native",
    )


def switch(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Switch: top-1, up to a capacity per expert and sequence."""
    return RoutingRule(
        num_experts=whole(router, "num_experts"),
        top_k=1,
        renormalize=False,
        capacity=whole(router, "expert_capacity"),
        weight_dtype=hidden_dtype(block, config),
    )


def nllb(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """NLLB: the best and the second-best expert, their weights normalized with a floor.

    Its two choices are not written anywhere as a number: `NllbMoeTop2Router` always makes two.
    """
    dtype = hidden_dtype(block, config)
    return RoutingRule(
        num_experts=whole(router, "num_experts"),
        top_k=2,
        renormalize=True,
        epsilon_is_floor=True,
        epsilon=torch.finfo(getattr(torch, dtype)).eps,
        weight_dtype=dtype,
    )


def doge(router: nn.Module, block: nn.Module, config: Any) -> RoutingRule:
    """Doge: the K best sums of two key halves, softmax over the chosen.

    E is the number of pairs of keys; a number of experts that is no square has some unused.
    """
    del router, config
    return RoutingRule(
        num_experts=whole(block, "num_keys") ** 2,
        top_k=whole(block, "top_k"),
        renormalize=flag(block, "norm_topk_prob"),
        score="identity",
        weights="softmax_topk",
        arithmetic="native",
    )
