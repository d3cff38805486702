"""What each action does to a router: its edits, and how to tell whether it held.

One entry of `OPERATORS` per action. Letters: T tokens, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moescope.kernels.route import Edits
from moescope.steering.plan import Force, Intervention, Mask


@dataclass(frozen=True, kw_only=True)
class Operator:
    """How one action is carried out.

    Attributes:
        edits: from an intervention and where it acts (bool[E] or bool[T, E]) to router edits.
        wants_selected: whether the request holds when the expert was selected, or when it was not.
    """

    edits: Callable[[Any, Tensor], Edits]
    wants_selected: bool


def _mask(intervention: Mask, where: Tensor) -> Edits:
    if intervention.via == "inf":
        return Edits(mask_inf=where)
    if intervention.via == "selection":
        return Edits(mask_selection=where)
    return Edits(mask_min=where)


def _force(intervention: Force, where: Tensor) -> Edits:
    if intervention.strength == "natural":
        return Edits(force_natural=where)
    return Edits(force_max=where)


#: By action; keys are those of the plan format.
OPERATORS: Mapping[str, Operator] = {
    "mask": Operator(edits=_mask, wants_selected=False),
    "force": Operator(edits=_force, wants_selected=True),
}


def edits_of(requests: Iterable[tuple[Intervention, Tensor]]) -> Edits:
    """The edits of several interventions on one router, each with where it acts."""
    united: dict[str, Tensor] = {}
    for intervention, where in requests:
        for name, asked in OPERATORS[intervention.action].edits(intervention, where).present():
            united[name] = united[name] | asked if name in united else asked
    return Edits(**united)
