"""How a router turns logits into selected experts and routing weights, as data.

A rule says what a model family's own code does; `moescope.kernels.route.select` carries it out.
Covered here: softmax over all experts, then top-k, optionally renormalized (Mixtral, OLMoE,
Qwen2-MoE, Qwen3-MoE and their relatives).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """The selection rule of one router.

    Attributes:
        num_experts: routed experts E the router scores.
        top_k: experts selected per token, K.
        score: how logits become router scores; `softmax` over all experts, in float32.
        renormalize: whether the K weights are divided by their sum.
        weight_dtype: `logits` when weights are cast to the dtype of the logits, else `float32`.
    """

    num_experts: int
    top_k: int
    renormalize: bool
    score: Literal["softmax"] = "softmax"
    weight_dtype: Literal["logits", "float32"] = "logits"

    def __post_init__(self) -> None:
        """Refuse rules that no router can have."""
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"a router with {self.num_experts} experts cannot select {self.top_k} per token"
            )

    def to_json(self) -> dict[str, object]:
        """The rule as plain data, for `layers.rule` and `moescope doctor`."""
        return asdict(self)

    @property
    def description(self) -> str:
        """The rule in a few words, for people."""
        tail = "renormalized" if self.renormalize else "not renormalized"
        return f"{self.score} over {self.num_experts}, top-{self.top_k}, {tail}"
