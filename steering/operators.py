"""What each action does to a router: its edits, and what shows that it held.

One entry of `OPERATORS` per action. Letters: T tokens, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moescope.kernels.route import Edits
from moescope.steering.plan import Bias, Force, Intervention, Mask, Scale, TopK, TopP

#: What shows that a request held: that the expert has a share in the token's output or has none,
#: the token's number of experts, their probability, or the recorded choice.
Shown = Literal["selected", "not selected", "number", "probability", "replayed"]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """How one action is carried out.

    Attributes:
        edits: from an intervention and where it acts to router edits: bool[E] or bool[T, E] for
            actions on experts, bool[1] (all tokens) or bool[T, 1] for those on a router.
        shown_by: what shows that a request of the intervention held.
    """

    edits: Callable[[Any, Tensor], Edits]
    shown_by: Callable[[Any], Shown]


def _mask(intervention: Mask, where: Tensor) -> Edits:
    if intervention.mode == "drop":
        return Edits(drop=where)
    if intervention.mode == "drop_renorm":
        return Edits(drop_renorm=where)
    if intervention.via == "inf":
        return Edits(mask_inf=where)
    if intervention.via == "selection":
        return Edits(mask_selection=where)
    if intervention.fill_up:
        return Edits(mask_fill_up=where)
    return Edits(mask_min=where)


def _force(intervention: Force, where: Tensor) -> Edits:
    if intervention.strength == "natural":
        return Edits(force_natural=where)
    return Edits(force_max=where)


def _bias(intervention: Bias, where: Tensor) -> Edits:
    added = where.float() * intervention.value
    if intervention.on == "selection":
        if intervention.unit == "std":
            return Edits(bias_selection_std=added)
        return Edits(bias_selection=added)
    return Edits(bias_std=added) if intervention.unit == "std" else Edits(bias=added)


def _scale(intervention: Scale, where: Tensor) -> Edits:
    factor = torch.where(where, intervention.value, 1.0)
    return Edits(scale_renorm=factor) if intervention.renormalize else Edits(scale=factor)


def _top_k(intervention: TopK, where: Tensor) -> Edits:
    if where.ndim == 1:
        return Edits(top_k=intervention.value)
    count_T = torch.where(where[:, 0], intervention.value, 0)
    return Edits(top_k=count_T, max_top_k=intervention.value)


def _top_p(intervention: TopP, where: Tensor) -> Edits:
    if where.ndim == 1:
        return Edits(top_p=intervention.value)
    return Edits(top_p=torch.where(where[:, 0], intervention.value, torch.nan))


def _replay(_intervention: Intervention, _where: Tensor) -> Edits:
    """Nothing: the recorded routing is added by whoever has it (`moescope.steering.replay`)."""
    return Edits()


#: By action; keys are those of the plan format.
OPERATORS: Mapping[str, Operator] = {
    "mask": Operator(edits=_mask, shown_by=lambda _: "not selected"),
    "force": Operator(edits=_force, shown_by=lambda _: "selected"),
    "bias": Operator(
        edits=_bias, shown_by=lambda one: "selected" if one.value >= 0 else "not selected"
    ),
    "scale": Operator(
        edits=_scale, shown_by=lambda one: "selected" if one.value > 0 else "not selected"
    ),
    "top_k": Operator(edits=_top_k, shown_by=lambda _: "number"),
    "top_p": Operator(edits=_top_p, shown_by=lambda _: "probability"),
    "replay": Operator(edits=_replay, shown_by=lambda _: "replayed"),
}


def edits_of(
    requests: Iterable[tuple[Intervention, Tensor]],
    *,
    top_k: int | None = None,
    limit: int | None = None,
) -> Edits:
    """The edits of several interventions on one router, each with where it acts.

    Args:
        requests: interventions and where they act, as `Operator.edits` takes them.
        top_k: the router's own number of experts, for tokens that no `top_k` acts on.
        limit: the most experts that a token can have there, for `top_p`.

    Raises:
        ValueError: a number of experts for some tokens only, without `top_k`.
    """
    united: dict[str, Any] = {}
    for intervention, where in requests:
        for name, asked in OPERATORS[intervention.action].edits(intervention, where).present():
            united[name] = _united(name, united[name], asked) if name in united else asked
    if isinstance(united.get("top_k"), Tensor):
        if top_k is None:
            raise ValueError("a number of experts for some tokens needs that of the others")
        count_T = united["top_k"]
        united["top_k"] = torch.where(count_T == 0, top_k, count_T)
        united["max_top_k"] = max(united["max_top_k"], top_k)
    if "top_p" in united:
        united["top_p_limit"] = limit
    return Edits(**united)


def _united(name: str, one: Any, other: Any) -> Any:
    """Two edits of one kind as one; plans that contradict themselves are refused beforehand."""
    if name.startswith("bias"):
        return one + other
    if name.startswith("scale"):
        return one * other
    if name == "max_top_k":
        return max(one, other)
    if name == "top_k":  # for different tokens: 0 where one does not act
        return torch.maximum(one, other)
    if name == "top_p":
        return torch.where(torch.isnan(one), other, one)
    return one | other
