"""Selecting experts from router logits: the definition, in plain torch.

Letters: T tokens, E routed experts, K experts per token. Without edits `select` repeats the
family's own router to the bit. With edits it is how moescope steers: edits act on the raw logits
(or on the selection alone), then the family's rule runs. Sources of the edits: SteerMoE
(arXiv 2509.09660, section 3: max + 0.01 and min - 0.01); `via="selection"` and strength
`natural` are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moescope.kernels.route.rule import RoutingRule

#: How far above the largest (or below the smallest) logit an edited logit is put (SteerMoE).
MARGIN = 0.01


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What steering changes in one call of one router.

    Every field is None or bool[E] (all tokens alike) or bool[T, E].

    Attributes:
        mask_min: never selected; the logit becomes the token's smallest minus `MARGIN`.
        mask_inf: never selected; the logit becomes minus infinity.
        mask_selection: never selected; the scores stay as they are.
        force_max: always selected; the logit becomes the token's largest plus `MARGIN`.
        force_natural: always selected, with the weight that its own score gives.
    """

    mask_min: Tensor | None = None
    mask_inf: Tensor | None = None
    mask_selection: Tensor | None = None
    force_max: Tensor | None = None
    force_natural: Tensor | None = None

    def present(self) -> Iterator[tuple[str, Tensor]]:
        """The edits that are there, by name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value


def select(
    logits_TE: Tensor, rule: RoutingRule, edits: Edits | None = None
) -> tuple[Tensor, Tensor]:
    """Select each token's experts and their routing weights.

    Args:
        logits_TE: raw router logits, float[T, E].
        rule: the family's selection rule.
        edits: what steering changes; None or an empty `Edits` changes nothing.

    Returns:
        `(weights_TK, expert_ids_TK)` in rank order, as the router returns them: weights in the
        dtype that the rule names, ids int64. Masked experts are never selected and forced ones
        always are; where fewer than K experts remain the selection is undefined, so callers
        refuse such plans beforehand.
    """
    if edits is not None and not any(True for _ in edits.present()):
        edits = None
    scores_TE = _scores(logits_TE if edits is None else _edited_logits(logits_TE, edits))
    choice_TE = scores_TE if edits is None else _edited_selection(scores_TE, edits)
    values_TK, expert_ids_TK = torch.topk(choice_TE, rule.top_k, dim=-1)
    weights_TK = values_TK if edits is None else scores_TE.gather(-1, expert_ids_TK)
    if rule.renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    if rule.weight_dtype == "logits":
        weights_TK = weights_TK.to(logits_TE.dtype)
    return weights_TK, expert_ids_TK


def selection_scores(logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """The scores by which a router ranks its experts, float32[T, E]: here its softmax."""
    del rule  # softmax is the only score function of the rule type so far
    return _scores(logits_TE)


def _scores(logits_TE: Tensor) -> Tensor:
    return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)


def _edited_logits(logits_TE: Tensor, edits: Edits) -> Tensor:
    """Logits after the edits; largest and smallest are taken before any of them."""
    z_TE = logits_TE.float()
    highest_T1 = z_TE.amax(dim=-1, keepdim=True)
    lowest_T1 = z_TE.amin(dim=-1, keepdim=True)
    if edits.force_max is not None:
        z_TE = torch.where(edits.force_max, highest_T1 + MARGIN, z_TE)
    if edits.mask_min is not None:
        z_TE = torch.where(edits.mask_min, lowest_T1 - MARGIN, z_TE)
    if edits.mask_inf is not None:
        z_TE = z_TE.masked_fill(edits.mask_inf, -torch.inf)
    return z_TE


def _edited_selection(scores_TE: Tensor, edits: Edits) -> Tensor:
    """Scores to choose by: forced above all others in their own order, masked below all."""
    choice_TE = scores_TE
    for name, where in edits.present():
        if name.startswith("force"):
            # Scores lie in [0, 1]: plus 2 beats every unforced one and keeps the forced in order.
            choice_TE = torch.where(where, scores_TE + 2.0, choice_TE)
    for name, where in edits.present():
        if name.startswith("mask"):
            choice_TE = choice_TE.masked_fill(where, -torch.inf)
    return choice_TE
