"""Counting what steering did, on the device, from what routers decided and what was handed on.

Letters: T tokens, E experts, K experts per token, I interventions on one router.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moescope.kernels.route import Edits, RoutingRule, routing_probabilities
from moescope.probe.routers import RouterOutput
from moescope.steering.operators import OPERATORS
from moescope.steering.plan import Intervention, Mask, TopK, TopP

#: Rounding of a sum of float32 probabilities that were added up in another order.
_ROUNDING = 1e-5


class Counter:
    """Counts of the interventions on one router.

    Attributes:
        interventions: I of them.
        experts_IE: bool[I, E], the experts of each.
    """

    def __init__(
        self, interventions: Sequence[Intervention], experts_IE: Tensor, rule: RoutingRule
    ) -> None:
        self.interventions = tuple(interventions)
        self.experts_IE = experts_IE
        self.rule = rule
        shown = [OPERATORS[one.action].shown_by(one) for one in self.interventions]
        self.wants_selected_I = torch.tensor([one != "not selected" for one in shown])
        self.sizes_I = torch.tensor([max(1, len(one.experts)) for one in self.interventions])
        self.drops_I = torch.tensor(
            [isinstance(one, Mask) and one.mode != "replace" for one in self.interventions]
        )
        self.has_drops = bool(self.drops_I.any())

    def to(self, device: torch.device) -> None:
        """Keep what is needed on the router's device."""
        if self.experts_IE.device != device:
            for name in ("experts_IE", "wants_selected_I", "sizes_I", "drops_I"):
                setattr(self, name, getattr(self, name).to(device))

    def count(
        self,
        rows_TI: Tensor,
        edits: Edits,
        before: RouterOutput,
        after: RouterOutput,
        replayed_T: Tensor | None,
    ) -> Tensor:
        """One forward's counts int64[I, 4]: requested, achieved, held anyway, emptied.

        Args:
            rows_TI: the tokens in each intervention's scope, padding left out.
            edits: what was changed.
            before: what the router decided itself.
            after: what was handed on.
            replayed_T: the tokens whose recorded routing was found, where there is a replay.
        """
        requested_I = rows_TI.sum(0) * self.sizes_I
        rows_IT = rows_TI.T.float()  # float32 counts up to 2**24 tokens a forward exactly
        parts_TE = [self._taking_part(decision) for decision in (after, before)]
        held = []
        for part_TE in parts_TE:
            hits_I = ((rows_IT @ part_TE) * self.experts_IE).sum(1).long()
            held.append(torch.where(self.wants_selected_I, hits_I, requested_I - hits_I))
        for row, one in enumerate(self.interventions):
            if one.experts:
                continue
            if isinstance(one, TopK | TopP):
                held_T = [self._holds(one, after, edits), self._holds(one, before, None)]
            else:
                found_T = torch.zeros_like(rows_TI[:, 0]) if replayed_T is None else replayed_T
                held_T = [found_T, found_T & (parts_TE[0] == parts_TE[1]).all(-1)]
            for counts_I, one_T in zip(held, held_T, strict=True):
                counts_I[row] = (one_T & rows_TI[:, row]).sum()
        emptied_I = torch.zeros_like(requested_I)
        if self.has_drops:
            lost_T = (after.weights == 0).all(-1) & (before.weights != 0).any(-1)
            emptied_I = (rows_TI & lost_T[:, None]).sum(0) * self.drops_I
        return torch.stack([requested_I, *held, emptied_I], dim=1)

    def _used(self, decision: RouterOutput) -> Tensor:
        """Slots in which an expert takes part, or that say there is none, bool[T, K]."""
        used_TK = decision.weights != 0
        if self.rule.has_skip:
            used_TK = used_TK | (decision.expert_ids == self.rule.num_experts - 1)
        return used_TK

    def _taking_part(self, decision: RouterOutput) -> Tensor:
        """1.0 where an expert takes part in a token's output, float32[T, E]."""
        ids_TK = decision.expert_ids
        found_TE = torch.zeros(len(ids_TK), self.rule.num_experts, device=ids_TK.device)
        return found_TE.scatter_reduce_(1, ids_TK, self._used(decision).float(), "amax")

    def _holds(self, one: TopK | TopP, decision: RouterOutput, edits: Edits | None) -> Tensor:
        """Tokens at which a number of experts, or their probability, is as asked, bool[T]."""
        used_TK = self._used(decision)
        for dropped in (edits.drop, edits.drop_renorm) if edits is not None else ():
            if dropped is not None:  # still in its slot
                wide_TE = dropped.expand(decision.logits.shape)
                used_TK = used_TK | wide_TE.gather(1, decision.expert_ids)
        if isinstance(one, TopK):
            return used_TK.sum(-1) == one.value
        probable_TE = routing_probabilities(decision.logits, self.rule, edits)
        reached_T = (probable_TE.gather(1, decision.expert_ids) * used_TK).sum(-1)
        return reached_T >= one.value - _ROUNDING
