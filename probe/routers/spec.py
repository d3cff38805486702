"""What we say about one model family's routers, and about one router of a live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from moescope.kernels.route import RoutingRule


class RouterOutput(NamedTuple):
    """What one call of a router decided, in one form for all families.

    Attributes:
        logits: what the rule starts from, float[T, E]: raw logits, or probabilities where the
            rule's score is `probabilities`.
        weights: routing weights as used, float[T, K].
        expert_ids: selected experts, int64[T, K], in the router's own order.
    """

    logits: Tensor
    weights: Tensor
    expert_ids: Tensor


class RouterForm(Protocol):
    """How the routers of some families hand over what they decided, and how to change it.

    T is the number of rows that passed the router: tokens, padding included.
    """

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """The decision in what the router module returned; nothing is selected again."""
        ...

    def inputs(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> dict[str, Any]:
        """What `select` needs beside logits and rule, by the name of its keyword argument.

        `bias_E`, and where the rule needs them `table_ids_TK`, `shared_logits_TS` and
        `expert_scale_E` (Gemma 4's per_expert_scale; Inkling's global_scale expanded to [E]), all
        tensors, and the number `rows_per_sequence` (Switch, whose capacity is per sequence).
        """
        ...

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """The router's output with another selection, weights float[T, K'], ids int64[T, K']."""
        ...

    def arrived(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Ids and weights in the experts' inputs, or None where they cannot be read there.

        It is a second source beside `read`, so nothing of the router may be used. The id of a slot
        with weight 0 says nothing: who was dropped is not always handed to the experts.
        """
        ...

    def counted(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Tokens that each expert receives, int64[E], from the experts' inputs alone.

        It can be read for some forms that hand no ids to the experts; slots with weight 0 that the
        experts pass over are not counted. None where it cannot be read either.
        """
        ...


def _mlp(name: str) -> str:
    """The kind of most routed layers."""
    del name
    return "mlp"


def _always(value: Any) -> bool:
    """Every module, or every configuration."""
    del value
    return True


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How the routers of one family are found and read.

    Attributes:
        family: the family's folder in transformers, `models/<family>`.
        router_class: class name of the router module.
        read_rule: reads the selection rule from the live router, the block around it, and the
            text configuration, in this order of trust; raises UnknownRoutingError naming what it
            cannot read.
        form: how the router hands over its decision.
        model_types: `model_type` of the whole model and of its text part, where one of them
            differs from `family`.
        experts_name: attribute of the router's parent that holds the routed experts.
        more_experts: further attributes of it with weights of the same experts.
        shared_name: attribute of the parent that holds the shared experts, if any; they count as
            one where no number is configured.
        shared_count: configuration field with the number of shared experts in `shared_name`.
        shared_beside: whether `shared_name` is on the layer around the block instead.
        bias: finds the live selection bias tensor float[E] from router and block, where the rule
            has one.
        kind: kind of the routed layer, from the router's module name.
        covers: whether a router of this class with this module name routes text tokens; the others
            (experts for image patches) are left alone.
        is_routed: whether a model with this configuration has routed layers at all.
        variants: further router classes of the same family.
        record_only: why routers of this family can be recorded but not steered, if so.
    """

    family: str
    router_class: str
    read_rule: Callable[[nn.Module, nn.Module, Any], RoutingRule]
    form: RouterForm
    model_types: tuple[str, ...] = ()
    experts_name: str = "experts"
    more_experts: tuple[str, ...] = ()
    shared_name: str | None = None
    shared_count: str | None = None
    shared_beside: bool = False
    bias: Callable[[nn.Module, nn.Module], Tensor | None] | None = None
    kind: Callable[[str], str] = _mlp
    covers: Callable[[str], bool] = _always
    is_routed: Callable[[Any], bool] = _always
    variants: tuple[RouterSpec, ...] = ()
    record_only: str | None = None


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
        implementation: what computes the experts: `eager`, another implementation of transformers
            (`grouped_mm`, ...), the class of quantised experts, or a kernel in their place.
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
    implementation: str = "eager"


@dataclass(frozen=True)
class RouterSite:
    """A routed layer of a live model.

    Attributes:
        info: what it is.
        router: the module whose output is the decision.
        experts: the module that gets the decision; the block itself where there is none.
        block: the module around both.
        form: how the router hands over its decision.
        find_bias: gives the live selection bias float[E]; None where the rule has none.
        record_only: why it can be recorded but not steered, where the family as a whole cannot.
        more_experts: other modules with weights of the same experts.
    """

    info: LayerInfo
    router: nn.Module
    experts: nn.Module
    block: nn.Module
    form: RouterForm
    find_bias: Callable[[], Tensor | None] = field(default=lambda: None)
    record_only: str | None = None
    more_experts: tuple[nn.Module, ...] = ()

    @property
    def expert_modules(self) -> tuple[nn.Module, ...]:
        """Every module that holds weights of the routed experts."""
        return (self.experts, *self.more_experts)

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that one token does not select."""
        held = sum(one.numel() for module in self.expert_modules for one in module.parameters())
        rule = self.info.rule
        real = rule.num_experts - rule.num_zero_experts - int(rule.has_skip)
        return round(held * max(0, real - rule.top_k) / real)

    @property
    def where(self) -> str:
        """The layer as error messages name it."""
        return f"layer {self.info.layer} ({self.info.module})"

    @property
    def bias(self) -> Tensor | None:
        """The selection bias of this moment, float[E], or None."""
        return self.find_bias()
