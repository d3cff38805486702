"""What each expert that was not selected would cause if it were: first-order effects of forcing it.

At a token where expert e is not selected, forcing it gives it a weight, displaces another expert
and changes the weights of those that stay. To first order the target gains

    A[e] = Σ_t Σ_j (w'_j - w_j) · ∂m/∂w_j,

with w' the weights under a `force` edit of e, and ∂m/∂w_e = ⟨∂m/∂y, E_e(x)⟩, the worth of an output
that the model never computed: e is given a slot of weight 0. At tokens that select e already
nothing is forced, but `strength` max raises its weight, which counts too.

It costs a slot for each expert asked for: for all of them E / K times the routed experts' compute.
`experts_per_pass` bounds how many are computed at once; each pass runs all layers again.

Letters: X experts of all routers, P prompts, T rows of a router, E experts, K experts per token, N
experts asked for of one router in one pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moescope.probe.bridges import underlying
from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import RouterSite, find_routers
from moescope.steering.causes.attribution import (
    Attribution,
    Progress,
    Removal,
    entering,
    estimated,
    one_hot,
    require_added_slots,
)
from moescope.steering.causes.keys import ExpertKey
from moescope.steering.causes.leaves import Added, Leaf, Routed, experts_of
from moescope.steering.causes.targets import TargetRow
from moescope.steering.plan import SteeringPlan

Strength = Literal["max", "natural"]


def attribute_forcing(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    *,
    strength: Strength = "max",
    experts: Iterable[ExpertKey] | None = None,
    experts_per_pass: int = 16,
    base_plan: SteeringPlan | None = None,
    sites: Sequence[RouterSite] | None = None,
    tokens_per_batch: int = 1024,
    progress: Progress | None = None,
) -> Attribution:
    """First-order effects of forcing each expert at every token of the rows.

    Args:
        bundle: model and tokenizer; not steered at the moment.
        rows: the target's, from `target_rows`.
        rendered: the prompts.
        strength: of the force, as in a plan.
        experts: those to ask for; all without it.
        experts_per_pass: of one router, at most.
        base_plan: steering that is there already.
        sites: the model's routers, where the caller has them.
        tokens_per_batch: padded tokens a forward may hold, added slots not counted.
        progress: told after each batch of each pass.

    Returns:
        The experts asked for, in the model's order.

    Raises:
        InputError: an expert that is not there, no expert, or a router whose experts cannot be
            given further slots.
    """
    sites = find_routers(underlying(bundle.model)) if sites is None else sites
    require_added_slots(sites)
    every = experts_of(sites)
    asked = set(every) if experts is None else {ExpertKey(*key) for key in experts}
    if not asked or asked - set(every):
        missing = "no expert was asked for"
        for key in sorted(asked - set(every)):
            missing = f"there is no expert {key.expert} in layer {key.layer} ({key.kind})"
        raise InputError(missing)
    by_router: dict[tuple[int, str], list[int]] = defaultdict(list)
    for key in every:
        if key in asked:
            by_router[key.layer, key.kind].append(key.expert)
    num_passes = -(-max(map(len, by_router.values())) // experts_per_pass)
    total: Attribution | None = None
    for number in range(num_passes):
        part = slice(number * experts_per_pass, (number + 1) * experts_per_pass)
        change = Forcing(strength, {at: tuple(own[part]) for at, own in by_router.items()})
        found = estimated(
            bundle, rows, rendered, change, base_plan=base_plan, sites=sites,
            tokens_per_batch=tokens_per_batch, progress=progress,
        )  # fmt: skip
        total = found if total is None else replace(found, values=total.values + found.values)
    assert total is not None
    kept = np.array([key in asked for key in every])
    keys = tuple(key for key in every if key in asked)
    return replace(total, experts=keys, values=total.values[kept], cost=3.0 * num_passes)


class Forcing(Removal):
    """Forcing experts, as changes of routing weights.

    Args:
        strength: of the force.
        experts: the experts asked for, by layer and kind of the router.
    """

    def __init__(self, strength: Strength, experts: dict[tuple[int, str], tuple[int, ...]]) -> None:
        super().__init__("replace")
        self.method = f"first-order force {strength}"
        self._mark = f"force_{strength}"
        self._experts = experts

    @property
    def added(self) -> Added | None:
        """A slot for each expert asked for."""
        return self._asked

    def effects(self, leaf: Leaf, gradient: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The effect at each token of forcing each expert asked for, float64[T, N], and ids."""
        routed = leaf.routed
        begin = routed.ids.shape[1]
        asked = leaf.ids[:, begin : begin + len(self._after[number])]
        gradient_TE = torch.zeros(
            routed.logits.shape, dtype=torch.float64, device=gradient.device
        ).scatter_(1, leaf.ids, gradient.double())
        effects = gradient_TE.new_zeros(asked.shape)
        for slot in range(asked.shape[1]):
            effects[:, slot] = (self.change(routed, number, slot) * gradient_TE).sum(1)
        return effects, asked

    def _asked(self, routed: Routed) -> Tensor:
        """Those asked for, and others that enter beside them (where groups choose anew)."""
        info = routed.site.info
        own = self._experts.get((info.layer, info.kind), ())
        num_tokens, num_experts = routed.logits.shape
        asked = torch.tensor(own, dtype=torch.long, device=routed.ids.device)
        asked = asked.expand(num_tokens, -1)
        with torch.no_grad():
            after = [
                routed.under(**{self._mark: one_hot(asked[:, at], num_experts)})
                for at in range(len(own))
            ]
            self._after.append(after)
            others = entering(torch.cat([routed.ids, asked], dim=1), after, num_experts)
        return torch.cat([asked, others], dim=1)
