"""The weights of selected experts, by the rule's arithmetic.

Letters: T tokens, E experts, K experts per token, S shared experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moescope.kernels.route.rule import RoutingRule


def weights_of(
    z_TE: Tensor,
    scores_TE: Tensor,
    ids_TK: Tensor,
    keep_TK: Tensor | None,
    rule: RoutingRule,
    shared_logits_TS: Tensor | None,
    expert_scale_E: Tensor | None,
) -> Tensor:
    """The weights of the selected experts, in the rule's arithmetic; 0 where not kept."""
    if rule.weights == "sparsemixer":
        weights_TK = _sparse_mixer(z_TE, ids_TK, rule.jitter)
    elif rule.weights == "softmax_topk":
        chosen_TK = z_TE.gather(1, ids_TK)
        if keep_TK is not None:
            # A token that keeps nothing gets its zeros below; its softmax only has to be finite.
            out_TK = ~keep_TK & keep_TK.any(dim=-1, keepdim=True)
            chosen_TK = chosen_TK.masked_fill(out_TK, -torch.inf)
        weights_TK = torch.softmax(chosen_TK, dim=-1)
    elif rule.weights == "sigmoid_topk":
        weights_TK = torch.sigmoid(z_TE.gather(1, ids_TK))
    elif rule.weights == "sigmoid_all":
        weights_TK = torch.sigmoid(z_TE).gather(1, ids_TK)
    elif rule.weights == "logsigmoid_shared" and shared_logits_TS is not None:
        chosen_TK = z_TE.gather(1, ids_TK)
        if keep_TK is not None:
            chosen_TK = chosen_TK.masked_fill(~keep_TK, -torch.inf)
        weights_TK = joint_weights(chosen_TK, shared_logits_TS)[:, : ids_TK.shape[1]]
    else:
        weights_TK = scores_TE.gather(1, ids_TK)
    if keep_TK is not None:
        weights_TK = weights_TK.masked_fill(~keep_TK, 0.0)
    if rule.renormalize:
        weights_TK = weights_TK / _norm(weights_TK, rule, may_be_zero=keep_TK is not None)
    weights_TK = scaled(weights_TK, rule)
    if expert_scale_E is not None:
        weights_TK = weights_TK * expert_scale_E[ids_TK]
    return weights_TK / rule.top_k if rule.divided_by_top_k else weights_TK


def scaled(weights: Tensor, rule: RoutingRule) -> Tensor:
    """Weights times the factor that the router itself applies."""
    return weights if rule.scale == 1.0 or rule.scale_in_block else weights * rule.scale


def _norm(weights_TK: Tensor, rule: RoutingRule, *, may_be_zero: bool) -> Tensor:
    """What renormalization divides by, [T, 1]."""
    if rule.norm_order is None:
        norm_T1 = weights_TK.sum(dim=-1, keepdim=True)
    else:
        norm_T1 = torch.linalg.vector_norm(weights_TK, rule.norm_order, dim=-1, keepdim=True)
    if rule.epsilon_is_floor:
        return norm_T1.clamp(min=rule.epsilon)
    if rule.epsilon:
        norm_T1 = norm_T1 + rule.epsilon
    return norm_T1.masked_fill(norm_T1 == 0, 1.0) if may_be_zero else norm_T1


def _sparse_mixer(z_TE: Tensor, ids_TK: Tensor, jitter: float) -> Tensor:
    """SparseMixer at inference (arXiv 2409.12136, as in Phi-3.5-MoE).

    Each expert's weight is its share in a softmax over the experts left whose logit is not
    further below its own than 2 * jitter of the larger of that logit's size and its own logit.
    """
    left_TE, weights = z_TE, []
    for ids_T1 in torch.split(ids_TK, 1, dim=-1):
        own_T1 = z_TE.gather(1, ids_T1)
        far_TE = (own_T1 - z_TE) / z_TE.abs().clamp(min=own_T1) > 2 * jitter
        gates_TE = torch.softmax(left_TE.masked_fill(far_TE, -torch.inf), dim=-1)
        weights.append(gates_TE.gather(1, ids_T1))
        left_TE = left_TE.scatter(1, ids_T1, -torch.inf)
    return torch.cat(weights, dim=-1)


def joint_weights(chosen_TK: Tensor, shared_logits_TS: Tensor) -> Tensor:
    """Sigmoids of chosen and shared logits divided by their sum, in logarithms (Inkling)."""
    logits = torch.cat([chosen_TK, shared_logits_TS.to(chosen_TK.dtype)], dim=-1)
    logs = functional.logsigmoid(logits)
    return torch.exp(logs - torch.logsumexp(logs, dim=-1, keepdim=True))


def weight_dtype(logits_TE: Tensor, rule: RoutingRule) -> torch.dtype:
    """The dtype in which a router returns its weights."""
    if rule.weight_dtype == "logits":
        return logits_TE.dtype
    dtype: torch.dtype = getattr(torch, rule.weight_dtype)
    return dtype
