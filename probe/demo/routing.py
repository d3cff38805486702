"""Hooks on the demo model's routers: random expert dropout, load balance, usage, masks.

Training needs gradients through the routers and other experts left out at every step, which
steering does not, so these hooks are the trainer's own. Selection itself is `select`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moescope.kernels.route import Edits, RoutingRule, select

Routed = tuple[Tensor, Tensor, Tensor]


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router of every layer of a Qwen3-MoE model."""
    return [layer.mlp.gate for layer in model.model.layers]


def routing_rule(model: PreTrainedModel) -> RoutingRule:
    """The selection rule of a Qwen3-MoE model."""
    config = model.config
    return RoutingRule(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
    )


@dataclass
class RouterTraining:
    """Expert dropout and load balance while training.

    Attributes:
        rule: the model's routing rule.
        dropout: probability that an expert is left out of a batch in a layer.
        generator: of the dropout draws.
        is_token: bool[T] of the current batch: which rows are tokens, not padding.
        losses: load balance loss of every layer in the current batch.
    """

    rule: RoutingRule
    dropout: float
    generator: torch.Generator
    is_token: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)

    def begin(self, is_token: Tensor) -> None:
        """Start a batch whose rows `is_token` (bool[B, S]) are tokens."""
        self.is_token = is_token.reshape(-1)
        self.losses.clear()

    def route(self, layer: int, logits_TE: Tensor) -> Routed:
        """Routing of one layer with some experts left out."""
        num_experts = self.rule.num_experts
        dropped_E = torch.rand(num_experts, generator=self.generator) < self.dropout
        if num_experts - int(dropped_E.sum()) < self.rule.top_k:
            dropped_E.zero_()
        weights_TK, ids_TK = select(logits_TE, self.rule, Edits(mask_inf=dropped_E))
        self.losses.append(self._balance(logits_TE, ids_TK))
        return logits_TE, weights_TK, ids_TK

    def _balance(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Load balance loss (Switch Transformer, equation 4): 1 when the load is even."""
        assert self.is_token is not None
        probs_E = torch.softmax(logits_TE[self.is_token], -1).mean(0)
        ids = ids_TK[self.is_token].flatten()
        load_E = torch.bincount(ids, minlength=self.rule.num_experts) / ids.numel()
        return self.rule.num_experts * (load_E * probs_E).sum()


@contextmanager
def training_routers(model: PreTrainedModel, state: RouterTraining) -> Iterator[None]:
    """Route by `state` while the block runs."""
    with ExitStack() as stack:
        for layer, router in enumerate(routers(model)):

            def hook(_: nn.Module, __: object, output: Routed, layer: int = layer) -> Routed:
                return state.route(layer, output[0])

            stack.callback(router.register_forward_hook(hook).remove)
        yield


@contextmanager
def masked_experts(model: PreTrainedModel, plan: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Mask experts by layer (mode `replace`, via `min`) while the block runs."""
    rule = routing_rule(model)
    with ExitStack() as stack:
        for layer, router in enumerate(routers(model)):
            if not plan.get(layer):
                continue
            mask_E = torch.zeros(rule.num_experts, dtype=torch.bool)
            mask_E[list(plan[layer])] = True

            def hook(_: nn.Module, __: object, out: Routed, mask_E: Tensor = mask_E) -> Routed:
                weights_TK, ids_TK = select(out[0], rule, Edits(mask_min=mask_E))
                return out[0], weights_TK, ids_TK

            stack.callback(router.register_forward_hook(hook).remove)
        yield


@contextmanager
def counted_usage(
    model: PreTrainedModel, counts_LE: Tensor, is_token: list[Tensor]
) -> Iterator[None]:
    """Add up how many tokens each expert got, into `counts_LE`, rows of `is_token[-1]` only."""
    with ExitStack() as stack:
        for layer, router in enumerate(routers(model)):

            def hook(_: nn.Module, __: object, out: Routed, layer: int = layer) -> None:
                ids = out[2][is_token[-1]].flatten()
                counts_LE[layer] += torch.bincount(ids, minlength=counts_LE.shape[1])

            stack.callback(router.register_forward_hook(hook).remove)
        yield
