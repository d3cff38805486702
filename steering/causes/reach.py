"""Which expert's removal can change what at all: the pairs of row and expert worth computing.

A removal is without effect on a token where the family's rule, with the removal's edits on the
token's own logits, gives every expert the weight that it has anyway. That is asked of the rule
itself (`select`), because it depends on it: lowering the logit of an expert that was not selected
changes nothing where weights are normalized over the selected ones, and changes all weights where
they are not. Differences of float32 rounding (1e-6 of the token's largest weight) count as none.

Letters: X experts taken out, B rows of a batch, S columns, T = B * S, E experts, K per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moescope.kernels.route import select
from moescope.probe.routers.spec import RouterOutput
from moescope.steering.causes.ablated_router import AblatedRouter, Place

#: Weights that differ by less than this share of the token's largest are the same but for rounding.
_ROUNDING = 1e-6
#: Elements of the largest tensor made at once.
_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Pairs:
    """Rows of a batch, each with an expert to take out, those first whose change comes first.

    Attributes:
        rows: int64[N].
        places: int64[N], index of the expert among those asked for.
        experts: int64[N], the expert.
        first: int64[N], the first column that changes.
        acts: bool[X, B, S], the tokens whose routing changes; those that nothing is read of, or
            read from, left out.
    """

    rows: Tensor
    places: Tensor
    experts: Tensor
    first: Tensor
    acts: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    def chosen(self, at: Tensor) -> Pairs:
        """Some of them."""
        return Pairs(self.rows[at], self.places[at], self.experts[at], self.first[at], self.acts)


def used_tokens(decision: RouterOutput, experts: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """Tokens that use each expert with a weight other than 0, bool[X, B, S], on the CPU."""
    weights_TE = _by_expert(decision.weights, decision.expert_ids, decision.logits.shape[1])
    return (weights_TE[:, list(experts)] != 0).T.reshape(len(experts), *shape).cpu()


def changed_tokens(
    router: AblatedRouter,
    decision: RouterOutput,
    inputs: dict[str, Any],
    places: Sequence[Place],
    experts: Sequence[int],
    shape: tuple[int, int],
) -> Tensor:
    """Tokens whose routing is another without each expert, bool[X, B, S], on the CPU.

    Args:
        router: the router with its mask.
        decision: what it decided under the base plan; logits raw.
        inputs: what `select` needs beside them.
        places: where the base plan's interventions act, bool[T] each.
        experts: the experts to take out, X of them.
        shape: B and S.
    """
    if router.mask.mode == "drop":  # nothing but the expert's own weight changes
        return used_tokens(decision, experts, shape)
    num_tokens, num_experts = decision.logits.shape
    before_TE = _by_expert(decision.weights, decision.expert_ids, num_experts)
    least_T1 = before_TE.abs().amax(-1, keepdim=True) * _ROUNDING
    step = max(1, _ELEMENTS // (num_tokens * num_experts))
    found = []
    for start in range(0, len(experts), step):
        some = torch.tensor(experts[start : start + step], device=decision.logits.device)
        times = len(some)
        masked_TE = functional.one_hot(some.repeat_interleave(num_tokens), num_experts).bool()
        edits = router.edits(
            [one.repeat(times) if isinstance(one, Tensor) else one for one in places], masked_TE
        )
        given: dict[str, Any] = {
            name: one.repeat(times, 1)
            if name in ("table_ids_TK", "shared_logits_TS") and isinstance(one, Tensor)
            else one
            for name, one in inputs.items()
        }
        logits = decision.logits.repeat(times, 1)
        weights, ids = select(logits, router.site.info.rule, edits, **given)
        after = _by_expert(weights, ids, num_experts).view(times, num_tokens, num_experts)
        found.append(((after - before_TE).abs() > least_T1).any(-1).cpu())
    return torch.cat(found).view(len(experts), *shape)


def pairs_of(acts_XBS: Tensor, experts: Sequence[int]) -> Pairs:
    """The pairs that change anything, ordered by where their change begins."""
    found = acts_XBS.any(-1).nonzero()
    first_N = acts_XBS[found[:, 0], found[:, 1]].int().argmax(-1)
    order = first_N.argsort(stable=True)
    places_N, rows_N = found[order, 0], found[order, 1]
    return Pairs(rows_N, places_N, torch.tensor(experts)[places_N], first_N[order], acts_XBS)


def _by_expert(weights_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """Each expert's weight, float32[T, E], 0 where it is not used."""
    found = torch.zeros(len(ids_TK), num_experts, device=ids_TK.device)
    return found.scatter_add_(1, ids_TK, weights_TK.float())
