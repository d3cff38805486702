"""Selecting experts from router logits: the definition, in plain torch.

Letters: T tokens, E classes that the router scores, K experts per token, S shared experts.
Without edits `select` repeats the family's own router to the bit, ties included. With edits it is
how moescope steers: edits act on the raw logits, then the family's rule runs
(`moescope.kernels.route.edits` has their sources). Source of a rule is the family's own code,
transformers `models/<family>/modeling_<family>.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from moescope.kernels.route.edits import (
    Edits,
    at_ids,
    edited_choice,
    edited_logits,
    edited_weights,
    first_in_order,
    lifted,
    outranked,
)
from moescope.kernels.route.rule import Groups, RoutingRule
from moescope.kernels.route.weights import joint_weights, scaled, weight_dtype, weights_of


def select(
    logits_TE: Tensor,
    rule: RoutingRule,
    edits: Edits | None = None,
    *,
    bias_E: Tensor | None = None,
    table_ids_TK: Tensor | None = None,
    shared_logits_TS: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    rows_per_sequence: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Select each token's experts and their routing weights.

    Args:
        logits_TE: what the rule starts from, float[T, E]: raw router logits, or probabilities
            where the rule's score is `probabilities` (their logarithm is then what edits call
            the logit).
        rule: the family's selection rule.
        edits: what steering changes; None or an empty `Edits` changes nothing.
        bias_E: the live selection bias, where the rule has one.
        table_ids_TK: int[T, K], the ids of the rule's table, where it has one.
        shared_logits_TS: the shared experts' logits (`logsigmoid_shared`).
        expert_scale_E: factor on each expert's weight, last (`scaled_probability`; Inkling).
        rows_per_sequence: tokens of each sequence, where the rule has a capacity.

    Returns:
        `(weights_TK, expert_ids_TK)` in the router's own order: weights in the dtype that the rule
        names, ids int64. Masked experts are never selected (but by `mask_fill_up`) and forced ones
        always are; where fewer than K experts remain the selection is undefined, so callers refuse
        such plans beforehand. Where masks leave too few experts in the groups that may be chosen
        from, the best others enter.

    Raises:
        ValueError: a tensor that the rule needs is missing.
    """
    _require(rule, bias_E, table_ids_TK, shared_logits_TS, rows_per_sequence)
    if edits is None or not any(True for _ in edits.present()):
        edits = None
    elif edits.replay_ids is not None and edits.replay_rows is None:
        return _replayed(logits_TE, rule, edits)
    z_TE, scores_TE = _scored(logits_TE, rule, edits)
    choosing = edits if edits is not None and edits.change_selection else None
    choice_TE, weighable_TE = _choice(logits_TE, z_TE, scores_TE, rule, choosing, bias_E)
    probable_TE = None
    if choosing is not None and choosing.top_p is not None:
        probable_TE = _probabilities(z_TE, scores_TE, rule)
    ids_TK, keep_TK = _chosen(choice_TE, probable_TE, rule, choosing, table_ids_TK)
    normalizes = rule.renormalize or rule.weights == "softmax_topk"
    if edits is not None and edits.drop_renorm is not None and normalizes:
        stays_TK = ~at_ids(edits.drop_renorm, ids_TK)
        keep_TK = stays_TK if keep_TK is None else keep_TK & stays_TK
    weights_TK = weights_of(
        z_TE, weighable_TE, ids_TK, keep_TK, rule, shared_logits_TS, expert_scale_E
    )
    if edits is not None:
        weights_TK = edited_weights(weights_TK, ids_TK, edits, normalizes=normalizes)
    unserved_TK = _unserved(ids_TK, rule, rows_per_sequence)
    if edits is not None and edits.replay_rows is not None:
        weights_TK = _with_replayed(weights_TK, edits)
        unserved_TK = None if unserved_TK is None else unserved_TK & ~edits.replay_rows[:, None]
    if unserved_TK is not None:
        weights_TK = weights_TK.masked_fill(unserved_TK, 0.0)
    return weights_TK.to(weight_dtype(logits_TE, rule)), ids_TK


def selection_scores(
    logits_TE: Tensor, rule: RoutingRule, *, bias_E: Tensor | None = None
) -> Tensor:
    """The scores by which a router ranks its experts, float32[T, E]: selection bias included.

    Groups are left out: they say who may be chosen, not who is better.

    Raises:
        ValueError: the rule has a selection bias and `bias_E` is missing.
    """
    if rule.selection_bias != "none" and bias_E is None:
        raise ValueError("this rule selects with a bias, so its scores need bias_E")
    z_TE, scores_TE = _scored(logits_TE, rule, None)
    return _biased(z_TE, scores_TE, rule, bias_E).float()


def routing_probabilities(
    logits_TE: Tensor, rule: RoutingRule, edits: Edits | None = None
) -> Tensor:
    """How much of a token each expert claims, float32[T, E], rows summing to 1.

    A softmax over all experts, or sigmoid and sqrt-softplus scores divided by their sum; the
    selection bias is left out. With edits, after those of logits.
    """
    z_TE, scores_TE = _scored(logits_TE, replace(rule, arithmetic="float32"), edits)
    return _probabilities(z_TE, scores_TE, rule)


def shared_weights(
    logits_TE: Tensor,
    expert_ids_TK: Tensor,
    rule: RoutingRule,
    edits: Edits | None = None,
    *,
    shared_logits_TS: Tensor,
    expert_scale_E: Tensor | None = None,
) -> Tensor:
    """The shared experts' weights float[T, S] that go with a selection (`logsigmoid_shared`).

    Routed and shared experts are normalized together, so other routed experts give the shared
    ones other weights. Drops and scales act on the routed weights alone.
    """
    z_TE, _ = _scored(logits_TE, rule, edits)
    joint = joint_weights(z_TE.gather(1, expert_ids_TK), shared_logits_TS)
    shared_TS = scaled(joint[:, expert_ids_TK.shape[1] :], rule)
    if expert_scale_E is not None:
        shared_TS = shared_TS * expert_scale_E[:1].float()
    return shared_TS.to(weight_dtype(logits_TE, rule))


def _require(
    rule: RoutingRule,
    bias_E: Tensor | None,
    table_ids_TK: Tensor | None,
    shared_logits_TS: Tensor | None,
    rows_per_sequence: int | None,
) -> None:
    needs = (
        ("bias_E", rule.selection_bias != "none" and not rule.from_table, bias_E),
        ("table_ids_TK", rule.from_table, table_ids_TK),
        ("shared_logits_TS", rule.weights == "logsigmoid_shared", shared_logits_TS),
        ("rows_per_sequence", rule.capacity is not None, rows_per_sequence),
    )
    for name, is_needed, given in needs:
        if is_needed and given is None:
            raise ValueError(f"this rule ({rule.description}) cannot be applied without {name}")


def _scored(logits_TE: Tensor, rule: RoutingRule, edits: Edits | None) -> tuple[Tensor, Tensor]:
    """Logits and scores in the rule's arithmetic; edited logits are always float32."""
    z_TE = logits_TE.float() if rule.arithmetic == "float32" else logits_TE
    if edits is not None and edits.change_logits:
        if rule.score == "probabilities":
            z_TE = z_TE.float().clamp(min=torch.finfo(torch.float32).tiny).log()
            z_TE = edited_logits(z_TE, edits)
            return z_TE, torch.softmax(z_TE, dim=-1)
        z_TE = edited_logits(z_TE, edits)
    scores_TE = _scores(z_TE, rule)
    if rule.capacity is not None:  # Switch chooses among probabilities that are rounded already
        scores_TE = scores_TE.to(weight_dtype(logits_TE, rule))
    return z_TE, scores_TE


def _scores(z_TE: Tensor, rule: RoutingRule) -> Tensor:
    if rule.score == "softmax" and rule.weights != "sparsemixer":
        return torch.softmax(z_TE, dim=-1)
    if rule.score == "sigmoid":
        return torch.sigmoid(z_TE)
    if rule.score == "sqrtsoftplus":
        return functional.softplus(z_TE).sqrt()
    return z_TE  # logits, probabilities, and the sparse mixer, which ranks by logits


def _probabilities(z_TE: Tensor, scores_TE: Tensor, rule: RoutingRule) -> Tensor:
    if rule.score in ("sigmoid", "sqrtsoftplus"):
        scores_TE = scores_TE.float()
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    if rule.score == "probabilities":
        return scores_TE.float()
    return torch.softmax(z_TE.float(), dim=-1)


def _biased(z_TE: Tensor, scores_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None) -> Tensor:
    if rule.selection_bias == "none" or bias_E is None:
        return scores_TE
    bias_E = bias_E.reshape(-1)
    if rule.selection_bias == "logit":
        return _scores(z_TE + bias_E, rule)
    # Zaya adds in float32 whatever the scores are; the others add in what promotion gives.
    return (scores_TE.float() if rule.has_skip else scores_TE) + bias_E


def _choice(
    logits_TE: Tensor,
    z_TE: Tensor,
    scores_TE: Tensor,
    rule: RoutingRule,
    edits: Edits | None,
    bias_E: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What top-k is taken of, and the scores that weights are read from."""
    choice_TE = _biased(z_TE, scores_TE, rule, bias_E)
    if edits is not None:
        choice_TE = edited_choice(choice_TE, _raw(logits_TE, rule), edits)
    ungrouped_TE = choice_TE
    outside_TE = None if rule.groups is None else _outside(choice_TE, rule.groups)
    if rule.groups is not None and outside_TE is not None:
        if rule.groups.fill == "0":
            choice_TE = choice_TE.masked_fill(outside_TE, 0.0)
        elif edits is None:
            choice_TE = choice_TE.masked_fill(outside_TE, -torch.inf)
        else:
            choice_TE = outranked(choice_TE, outside_TE)
    weighable_TE = scores_TE
    forced = None if edits is None else edits.forced
    if outside_TE is not None and rule.groups is not None and rule.groups.masks_weights:
        zero_TE = outside_TE if forced is None else outside_TE & ~forced
        weighable_TE = scores_TE.masked_fill(zero_TE, 0.0)
    if forced is not None:
        choice_TE = torch.where(forced, lifted(ungrouped_TE), choice_TE.double())
    if edits is not None and edits.masked is not None:
        choice_TE = choice_TE.masked_fill(edits.masked, -torch.inf)
    return choice_TE, weighable_TE


def _raw(logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """The logits whose spread is the unit `std`."""
    if rule.score == "probabilities":
        return logits_TE.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    return logits_TE


def _outside(choice_TE: Tensor, groups: Groups) -> Tensor:
    """Experts of the groups that may not be chosen from, bool[T, E]."""
    num_tokens, num_experts = choice_TE.shape
    grouped_TGM = choice_TE.view(num_tokens, groups.count, num_experts // groups.count)
    if groups.score == "max":
        scores_TG = grouped_TGM.max(dim=-1).values
    else:
        scores_TG = grouped_TGM.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.topk(scores_TG, k=groups.kept, dim=-1, sorted=False).indices
    outside_TG = torch.ones_like(scores_TG, dtype=torch.bool).scatter_(1, kept, False)
    return outside_TG.unsqueeze(-1).expand_as(grouped_TGM).reshape(num_tokens, num_experts)


def _chosen(
    choice_TE: Tensor,
    probable_TE: Tensor | None,
    rule: RoutingRule,
    edits: Edits | None,
    table_ids_TK: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Expert ids int64[T, K'], and which of them each token uses (None: all)."""
    if rule.from_table and table_ids_TK is not None:
        if edits is None:
            return table_ids_TK.long(), None
        choice_TE = _from_table(choice_TE, table_ids_TK.long(), edits)
    if edits is None or not edits.any_of("top_k", "top_p", "replay_ids"):
        return _best(choice_TE, rule.top_k, rule, in_order=rule.from_table), None
    if edits.replay_ids is not None and edits.replay_rows is not None:
        first_TE = first_in_order(choice_TE, edits.replay_ids, tiers=64)
        choice_TE = torch.where(edits.replay_rows[:, None], first_TE, choice_TE)
    if isinstance(edits.top_k, int) and not edits.any_of("top_p", "replay_ids"):
        return _best(choice_TE, edits.top_k, rule, in_order=rule.from_table), None
    count_T, width = _counts(choice_TE, probable_TE, rule, edits)
    if edits.top_p is not None:  # in the order in which their probabilities were added up
        ids_TK = _ranked(choice_TE)[:, :width]
    else:
        ids_TK = _best(choice_TE, width, rule, in_order=True)
    return ids_TK, torch.arange(width, device=ids_TK.device) < count_T[:, None]


def _from_table(choice_TE: Tensor, table_ids_TK: Tensor, edits: Edits) -> Tensor:
    """The table's experts before the others, behind forced ones, without masked ones."""
    own_TE = first_in_order(choice_TE, table_ids_TK, tiers=4)
    if edits.forced is not None:
        own_TE = torch.where(edits.forced, lifted(choice_TE, 16), own_TE)
    return own_TE if edits.masked is None else own_TE.masked_fill(edits.masked, -torch.inf)


def _best(choice_TE: Tensor, num: int, rule: RoutingRule, *, in_order: bool) -> Tensor:
    """The `num` best per token, ties as the router's own code breaks them."""
    if rule.weights == "sparsemixer" or rule.capacity is not None:
        left_TE, found = choice_TE, []
        for _ in range(num):  # one argmax after the other
            found.append(left_TE.max(dim=-1, keepdim=True).indices)
            left_TE = left_TE.scatter(1, found[-1], -torch.inf)
        return torch.cat(found, dim=-1)
    return torch.topk(choice_TE, num, dim=-1, sorted=rule.sorted_ids or in_order).indices


def _ranked(choice_TE: Tensor) -> Tensor:
    """All experts, best first; ties to the lowest id."""
    return choice_TE.sort(dim=-1, descending=True, stable=True).indices


def _counts(
    choice_TE: Tensor, probable_TE: Tensor | None, rule: RoutingRule, edits: Edits
) -> tuple[Tensor, int]:
    """Experts per token int64[T], and the columns that they need."""
    num_tokens, num_experts = choice_TE.shape
    count_T = torch.full((num_tokens,), rule.top_k, device=choice_TE.device)
    width = rule.top_k
    if isinstance(edits.top_k, int):
        count_T, width = torch.full_like(count_T, edits.top_k), edits.top_k
    elif edits.top_k is not None:
        count_T, width = edits.top_k, edits.max_top_k or num_experts
    if edits.top_p is not None and probable_TE is not None:
        p_T = torch.as_tensor(edits.top_p, dtype=torch.float32, device=choice_TE.device)
        p_T = p_T.expand(num_tokens)
        reached_T = _exceeding(p_T, choice_TE, probable_TE, edits)
        if edits.top_p_limit is not None:
            reached_T = reached_T.clamp(max=edits.top_p_limit)
        count_T = torch.where(p_T.isnan(), count_T, reached_T)
        width = int(count_T.max()) if num_tokens else rule.top_k
    if edits.replay_ids is not None:
        width = max(width, edits.replay_ids.shape[1])
    return count_T, width


def _exceeding(p_T: Tensor, choice_TE: Tensor, probable_TE: Tensor, edits: Edits) -> Tensor:
    """The fewest experts, in rank order, whose probabilities together exceed p, int64[T].

    All where no sum does (Huang et al., arXiv 2403.07652).
    """
    reached_TE = probable_TE.gather(1, _ranked(choice_TE)).cumsum(dim=-1)
    count_T = (reached_TE <= p_T[:, None]).sum(dim=-1) + 1
    if edits.forced is not None:
        count_T = torch.maximum(count_T, edits.forced.sum(dim=-1))
    return torch.minimum(count_T, (choice_TE > -torch.inf).sum(dim=-1))


def _unserved(ids_TK: Tensor, rule: RoutingRule, rows_per_sequence: int | None) -> Tensor | None:
    """Slots that no expert serves: skipped, or beyond an expert's capacity in their sequence."""
    if rule.has_skip:
        return ids_TK == rule.num_experts - 1
    if rule.capacity is None:
        return None
    chosen_TE = functional.one_hot(ids_TK[:, 0], rule.num_experts)
    in_turn = chosen_TE.view(-1, rows_per_sequence or len(ids_TK), rule.num_experts).cumsum(-2)
    return in_turn.view_as(chosen_TE).gather(1, ids_TK[:, :1]) > rule.capacity


def _replayed(logits_TE: Tensor, rule: RoutingRule, edits: Edits) -> tuple[Tensor, Tensor]:
    """All tokens replayed: the given ids and weights as they are."""
    if edits.replay_ids is None or edits.replay_weights is None:
        raise ValueError("a replay needs ids and weights")
    return edits.replay_weights.to(weight_dtype(logits_TE, rule)), edits.replay_ids


def _with_replayed(weights_TK: Tensor, edits: Edits) -> Tensor:
    """Replayed rows with their given weights, and 0 in columns beyond them, float32."""
    if edits.replay_weights is None or edits.replay_rows is None:
        raise ValueError("a replay needs ids and weights")
    missing = weights_TK.shape[1] - edits.replay_weights.shape[1]
    given_TK = functional.pad(edits.replay_weights.float(), (0, missing))
    return torch.where(edits.replay_rows[:, None], given_TK, weights_TK.float())
