"""What level `usage` keeps of a layer: sums over tokens, on the router's device until read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moescope.probe.routers import LayerInfo, RouterOutput
from moescope.probe.scores import router_probs
from moescope.probe.transfer import to_cpu


@dataclass
class LayerUsage:
    """Sums over the tokens of one layer; tensors of E, on the router's device while recording.

    Attributes:
        tokens: tokens that passed the router.
        num_tokens: tokens that selected each expert, int64[E].
        weight_sum: sum of its routing weights over them, float64[E].
        prob_sum: sum of the router's probabilities over all tokens, float64[E].
    """

    tokens: Tensor
    num_tokens: Tensor
    weight_sum: Tensor
    prob_sum: Tensor

    @classmethod
    def of(cls, output: RouterOutput, info: LayerInfo, is_token: Tensor | None) -> LayerUsage:
        """The sums of one call of a router."""
        logits_TE, weights_TK, ids_TK = output
        probs_TE = router_probs(logits_TE, info.rule).double()
        keep_T = torch.ones_like(ids_TK[:, 0], dtype=torch.bool) if is_token is None else is_token
        weights_TK = torch.where(keep_T[:, None], weights_TK.double(), 0.0)
        empty_E = torch.zeros_like(probs_TE[0])
        counts_TK = keep_T[:, None].expand_as(ids_TK).double()
        return cls(
            tokens=keep_T.sum(),
            num_tokens=empty_E.index_add(0, ids_TK.reshape(-1), counts_TK.reshape(-1)).long(),
            weight_sum=empty_E.index_add(0, ids_TK.reshape(-1), weights_TK.reshape(-1)),
            prob_sum=torch.where(keep_T[:, None], probs_TE, 0.0).sum(0),
        )

    def plus(self, other: LayerUsage | None) -> LayerUsage:
        """Both together."""
        if other is None:
            return self
        return LayerUsage(
            self.tokens + other.tokens,
            self.num_tokens + other.num_tokens,
            self.weight_sum + other.weight_sum,
            self.prob_sum + other.prob_sum,
        )

    def on_cpu(self) -> LayerUsage:
        """The same on the CPU."""
        return LayerUsage(*to_cpu([self.tokens, self.num_tokens, self.weight_sum, self.prob_sum]))
