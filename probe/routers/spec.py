"""What we say about one model family's routers, and about one router of a live model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from moescope.kernels.route import RoutingRule


class RouterOutput(NamedTuple):
    """What the routers of the supported families return, in this order.

    Attributes:
        logits: raw router logits, float[T, E].
        weights: routing weights as used, float[T, K].
        expert_ids: selected experts, int64[T, K], in the router's own order.
    """

    logits: Tensor
    weights: Tensor
    expert_ids: Tensor


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How the routers of one family are found and read.

    Attributes:
        family: transformers' `model_type`.
        router_class: class name of the router module.
        experts_name: attribute of the router's parent that holds the routed experts.
        shared_name: attribute of the parent that holds shared experts, if any.
        read_rule: reads the selection rule from the live router module.
    """

    family: str
    router_class: str
    read_rule: Callable[[nn.Module], RoutingRule]
    experts_name: str = "experts"
    shared_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One routed layer.

    Attributes:
        layer: decoder layer index, as the model counts.
        kind: `mlp`, `attention`, `encoder` or `mtp`.
        moe_layer: ordinal from 0 among the routed layers of that kind.
        module: the router's name in the model.
        rule: how it selects.
        verified: whether attach-time checks passed; without them a layer cannot be steered.
        reason: why not, when `verified` is false.
    """

    layer: int
    kind: str
    moe_layer: int
    module: str
    num_experts: int
    top_k: int
    num_shared_experts: int
    rule: RoutingRule
    verified: bool = False
    reason: str | None = "not checked yet"


@dataclass(frozen=True)
class RouterSite:
    """A routed layer of a live model: what it is, its router, and its routed experts."""

    info: LayerInfo
    router: nn.Module
    experts: nn.Module
