"""What steering changes in one call of one router, as tensors.

Edits act in the order in which a router works: on the raw logits, on who is chosen, on how many,
on the weights. Sources:

- `mask_min`, `force_max`: SteerMoE (arXiv 2509.09660, section 3): min - 0.01 and max + 0.01,
  smallest and largest taken before any edit. Adding log-sum-exp, as its log-softmax does, changes
  nothing under a softmax and is left out: for other scores the raw logit is the meaning of "logit".
  `mask_fill_up` is its mask as published, without the promise that `mask_min` adds.
- `bias_std`: soft steering of Bandarkar et al. (arXiv 2510.04694): z + value * std(z), population
  standard deviation over the token's E logits.
- `drop_renorm`: MoTE: the slot stays, its weight becomes 0, the others are normalized again.
- `scale`: RICE: the weight of a selected expert times a factor.
- `top_p`: Huang et al. (arXiv 2403.07652): the fewest experts whose probabilities reach p.
- `mask_selection`, `force_natural`, `drop`, `bias_selection`, `replay`: ours.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

#: How far above the largest (or below the smallest) logit an edited logit is put (SteerMoE).
MARGIN = 0.01

#: Lifts one kind of candidate above another in float64, where it takes no digit from scores of
#: ordinary size; scores are cut to a quarter of it.
_TIER = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What steering changes in one call of one router; None changes nothing.

    Unless stated otherwise a field is a tensor [E] (all tokens alike) or [T, E]: bool for masks,
    forces and drops, float (0 where nothing is added) for biases, float (1 where nothing is
    scaled) for scales.

    Attributes:
        mask_min: never selected; the logit becomes the token's smallest minus `MARGIN`.
        mask_fill_up: the logit becomes the same as by `mask_min`, and nothing else is done: where
            fewer than K others are left, these experts take the slots, and where a selection bias,
            groups or a table decide, they may be selected before others.
        mask_inf: never selected; the logit becomes minus infinity.
        mask_selection: never selected; the scores stay as they are.
        force_max: always selected, above groups and selection bias; the logit becomes the token's
            largest plus `MARGIN`.
        force_natural: always selected, with the weight that its own score gives.
        bias: added to the logit.
        bias_std: added to the logit, in standard deviations of the token's logits.
        bias_selection: added to the selection score only, in its own units.
        bias_selection_std: the same, in standard deviations of the token's logits.
        drop: weight 0 where selected; nothing else changes.
        drop_renorm: weight 0 where selected; the others are normalized again: by the rule where
            it normalizes over the chosen, else so that the token's weights sum to the same.
        scale: factor on the weight where selected.
        scale_renorm: the same, after which the token's weights sum to what they did before.
        top_k: experts per token: a number, or int64[T]. Columns that a token does not use carry
            weight 0.
        max_top_k: the largest in `top_k` where it is a tensor.
        top_p: probability to reach with the fewest experts: a number, or float[T] with NaN where
            the token keeps its number. Reading the widest token synchronizes with the device.
        top_p_limit: the most experts that `top_p` gives a token.
        replay_ids: int64[T, K'], the experts to use, instead of all of the above; with
            `replay_rows`, rows may end in -1 where a token uses fewer.
        replay_weights: float[T, K'], their weights, 0 there.
        replay_rows: bool[T], the tokens that are replayed; None for all.
    """

    mask_min: Tensor | None = None
    mask_fill_up: Tensor | None = None
    mask_inf: Tensor | None = None
    mask_selection: Tensor | None = None
    force_max: Tensor | None = None
    force_natural: Tensor | None = None
    bias: Tensor | None = None
    bias_std: Tensor | None = None
    bias_selection: Tensor | None = None
    bias_selection_std: Tensor | None = None
    drop: Tensor | None = None
    drop_renorm: Tensor | None = None
    scale: Tensor | None = None
    scale_renorm: Tensor | None = None
    top_k: int | Tensor | None = None
    max_top_k: int | None = None
    top_p: float | Tensor | None = None
    top_p_limit: int | None = None
    replay_ids: Tensor | None = None
    replay_weights: Tensor | None = None
    replay_rows: Tensor | None = None

    def present(self) -> Iterator[tuple[str, Any]]:
        """The edits that are there, by name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def any_of(self, *names: str) -> bool:
        """Whether one of these fields is there."""
        return any(getattr(self, name) is not None for name in names)

    @property
    def change_logits(self) -> bool:
        """Whether scores are computed from other logits than the router's."""
        return self.any_of(
            "mask_min", "mask_fill_up", "mask_inf", "force_max", "bias", "bias_std"
        )  # fmt: skip

    @property
    def change_selection(self) -> bool:
        """Whether other experts, or another number of them, may be selected."""
        return self.change_logits or self.any_of(
            "mask_selection", "force_natural", "bias_selection", "bias_selection_std",
            "top_k", "top_p", "replay_ids",
        )  # fmt: skip

    @property
    def masked(self) -> Tensor | None:
        """Every expert that is never selected, bool[E] or bool[T, E]."""
        return _union(self.mask_min, self.mask_inf, self.mask_selection)

    @property
    def forced(self) -> Tensor | None:
        """Every expert that is always selected, bool[E] or bool[T, E]."""
        return _union(self.force_max, self.force_natural)


def edited_logits(z_TE: Tensor, edits: Edits) -> Tensor:
    """Raw logits after the edits, float32; largest, smallest and spread are those before any."""
    raw_TE = z_TE = z_TE.float()
    if edits.bias is not None:
        z_TE = z_TE + edits.bias
    if edits.bias_std is not None:
        z_TE = z_TE + edits.bias_std * _spread(raw_TE)
    if edits.force_max is not None:
        z_TE = torch.where(edits.force_max, raw_TE.amax(dim=-1, keepdim=True) + MARGIN, z_TE)
    for mask in (edits.mask_min, edits.mask_fill_up):
        if mask is not None:
            z_TE = torch.where(mask, raw_TE.amin(dim=-1, keepdim=True) - MARGIN, z_TE)
    if edits.mask_inf is not None:
        z_TE = z_TE.masked_fill(edits.mask_inf, -torch.inf)
    return z_TE


def edited_choice(choice_TE: Tensor, raw_TE: Tensor, edits: Edits) -> Tensor:
    """Selection scores after the edits that groups should see."""
    if edits.bias_selection is not None:
        choice_TE = choice_TE.float() + edits.bias_selection
    if edits.bias_selection_std is not None:
        choice_TE = choice_TE.float() + edits.bias_selection_std * _spread(raw_TE.float())
    if edits.mask_selection is not None:
        # As if the selection bias were minus infinity: its group counts without it.
        choice_TE = choice_TE.masked_fill(edits.mask_selection, -torch.inf)
    return choice_TE


def lifted(choice_TE: Tensor, tiers: int = 1) -> Tensor:
    """Scores of ordinary size moved up (or down) so many tiers, in their own order, float64."""
    return choice_TE.double().clamp(-_TIER / 4, _TIER / 4) + tiers * _TIER


def outranked(choice_TE: Tensor, where: Tensor) -> Tensor:
    """Candidates `where` below all others, yet above masked ones, in their own order."""
    return torch.where(where, lifted(choice_TE, -1), choice_TE.double())


def first_in_order(choice_TE: Tensor, ids_TK: Tensor, tiers: int) -> Tensor:
    """Scores that put these ids first, in their order, so many tiers above; -1 stands for none."""
    num_tokens, num_experts = choice_TE.shape
    order_K = torch.arange(ids_TK.shape[1], 0, -1, dtype=torch.float64, device=ids_TK.device)
    order_TK = (order_K + tiers * _TIER).expand(ids_TK.shape)
    spare_T1 = torch.zeros(num_tokens, 1, dtype=torch.float64, device=ids_TK.device)
    wide = torch.cat([choice_TE.double(), spare_T1], dim=1)
    there_TK = torch.where(ids_TK < 0, num_experts, ids_TK)
    return wide.scatter(1, there_TK, order_TK)[:, :num_experts]


def at_ids(values: Tensor, ids_TK: Tensor) -> Tensor:
    """An edit [E] or [T, E] at the selected experts, [T, K]."""
    return values[ids_TK] if values.ndim == 1 else values.gather(1, ids_TK)


def same_total(before_TK: Tensor, after_TK: Tensor) -> Tensor:
    """`after_TK` times what makes each token's weights sum to what they did before; 0 stays 0."""
    total_T1 = after_TK.float().sum(dim=-1, keepdim=True)
    wanted_T1 = before_TK.float().sum(dim=-1, keepdim=True)
    # Shares first: a factor would overflow where next to nothing is left.
    shares_TK = after_TK / total_T1.masked_fill(total_T1 == 0, 1.0)
    return torch.where(total_T1 == wanted_T1, after_TK, shares_TK * wanted_T1)


def edited_weights(weights_TK: Tensor, ids_TK: Tensor, edits: Edits, *, normalizes: bool) -> Tensor:
    """Weights after scales and drops; `normalizes`: the rule has left out `drop_renorm` itself."""
    if edits.drop_renorm is not None and not normalizes:
        dropped_TK = weights_TK.masked_fill(at_ids(edits.drop_renorm, ids_TK), 0.0)
        weights_TK = same_total(weights_TK, dropped_TK)
    if edits.scale_renorm is not None:
        weights_TK = same_total(weights_TK, weights_TK * at_ids(edits.scale_renorm, ids_TK))
    if edits.scale is not None:
        weights_TK = weights_TK * at_ids(edits.scale, ids_TK)
    if edits.drop is not None:
        weights_TK = weights_TK.masked_fill(at_ids(edits.drop, ids_TK), 0.0)
    return weights_TK


def _spread(z_TE: Tensor) -> Tensor:
    """Population standard deviation of each token's logits, float32[T, 1]."""
    return z_TE.std(dim=-1, keepdim=True, correction=0)


def _union(*masks: Tensor | None) -> Tensor | None:
    found: Tensor | None = None
    for mask in masks:
        if mask is not None:
            found = mask if found is None else found | mask
    return found
