"""What a recorded logit says about an expert: its probability, and its place in the selection.

Both are for reading records. What was *selected* is recorded and never computed here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moescope.kernels.route import RoutingRule

#: Weights that are sigmoids of the logits where the ranking is by the logits themselves.
_SIGMOIDS = ("sigmoid_topk", "sigmoid_all", "logsigmoid_shared")


def router_probs(logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """How strongly the router wants each expert, for `usage.prob_sum` and `router_probs`.

    A softmax over all experts where the family uses a softmax anywhere (before top-k, or over the
    K best, as GPT-OSS does), a sigmoid where it uses a sigmoid; DeepSeek-V4's root of softplus and
    the probabilities of Gemma 4 are taken as they are. A selection bias is not part of it.

    Args:
        logits_TE: what the router returned, float[T, E].
        rule: the family's rule.

    Returns:
        float32[T, E]; rows of a softmax sum to 1, others need not.
    """
    logits_TE = logits_TE.float()
    if rule.score == "probabilities":
        return logits_TE
    if rule.score == "sqrtsoftplus":
        return F.softplus(logits_TE).sqrt()
    if rule.score == "sigmoid" or rule.weights in _SIGMOIDS:
        return torch.sigmoid(logits_TE)
    return torch.softmax(logits_TE, dim=-1)


def ranking_scores(logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None) -> Tensor | None:
    """The scores that decided the selection, so that rank 0 is the highest of them.

    Groups only say which experts may be chosen from, so the order among the chosen is that of the
    biased scores. A group fill of 0.0 puts chosen experts of other groups among them by that 0.0,
    which is not rebuilt here: their own score ranks them.

    Args:
        logits_TE: what the router returned, float[T, E].
        rule: the family's rule.
        bias_E: the selection bias, float[E], where the rule has one.

    Returns:
        float32[T, E], or None where no score decided: ids from a table (hash layers).
    """
    if rule.from_table:
        return None
    logits_TE = logits_TE.float()
    bias_E = torch.zeros(()) if bias_E is None else bias_E.float()
    if rule.selection_bias == "logit":
        logits_TE = logits_TE + bias_E
    if rule.score == "softmax":
        scores_TE = torch.softmax(logits_TE, dim=-1)
    elif rule.score == "sigmoid":
        scores_TE = torch.sigmoid(logits_TE)
    elif rule.score == "sqrtsoftplus":
        scores_TE = F.softplus(logits_TE).sqrt()
    else:
        scores_TE = logits_TE
    return scores_TE + bias_E if rule.selection_bias == "score" else scores_TE
