"""The supported model families: one entry each, read from the live router module.

All of these score with a softmax over all experts in float32 and then take the top k
(transformers 5.23, `models/<family>/modeling_<family>.py`, class `*TopKRouter`); they differ in
whether the k weights are renormalized and in which dtype they are returned. A family that is not
here is refused by name: routing is never guessed.
"""

from __future__ import annotations

from torch import nn

from moescope.kernels.route import RoutingRule
from moescope.probe.routers.spec import RouterSpec


def _optional_renormalization(router: nn.Module) -> RoutingRule:
    """OLMoE, Qwen2-MoE, Qwen3-MoE: `norm_topk_prob` decides; weights in the logits' dtype."""
    return RoutingRule(
        num_experts=_whole_number(router, "num_experts"),
        top_k=_whole_number(router, "top_k"),
        renormalize=bool(router.norm_topk_prob),
        weight_dtype="logits",
    )


def _always_renormalized(router: nn.Module) -> RoutingRule:
    """Mixtral: weights always sum to 1 and stay in float32."""
    return RoutingRule(
        num_experts=_whole_number(router, "num_experts"),
        top_k=_whole_number(router, "top_k"),
        renormalize=True,
        weight_dtype="float32",
    )


def _whole_number(router: nn.Module, name: str) -> int:
    value = getattr(router, name)
    if not isinstance(value, int):
        raise TypeError(f"{type(router).__name__}.{name} is {value!r}, not a whole number")
    return value


FAMILIES: dict[str, RouterSpec] = {
    spec.family: spec
    for spec in (
        RouterSpec(
            family="mixtral", router_class="MixtralTopKRouter", read_rule=_always_renormalized
        ),
        RouterSpec(
            family="olmoe", router_class="OlmoeTopKRouter", read_rule=_optional_renormalization
        ),
        RouterSpec(
            family="qwen2_moe",
            router_class="Qwen2MoeTopKRouter",
            read_rule=_optional_renormalization,
            shared_name="shared_expert",
        ),
        RouterSpec(
            family="qwen3_moe",
            router_class="Qwen3MoeTopKRouter",
            read_rule=_optional_renormalization,
        ),
    )
}
