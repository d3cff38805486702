"""Routing weights as leaves of the graph: what a target gains where a weight grows.

In each routed layer a zero is added to the weights that are handed to the experts, and the target
is differentiated by that zero. Expert ids are frozen (a choice has no derivative) and the weights
of later layers are free: they follow from what arrives there. Slots of weight 0 for experts that
were not chosen may be added; the derivative by their zero is what the expert's output is worth, at
the cost of computing it.

A base plan is carried out here by the same rule and edits as in `moescope.steering.steer`, which
cannot be nested with added slots: it stops where experts get other slots than it handed on.

Letters: B rows of a batch, T rows of a router (tokens, row by row, padding included), E experts, K
experts per token, M added slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moescope.kernels.route import Edits, select
from moescope.probe.bridges import underlying
from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.routers import RouterSite
from moescope.steering.causes.keys import ExpertKey
from moescope.steering.check import check_rules, check_shape, layers_of
from moescope.steering.operators import edits_of
from moescope.steering.plan import Intervention, Replay, SteeringPlan
from moescope.steering.positions import PositionTracker


def experts_of(sites: Sequence[RouterSite]) -> tuple[ExpertKey, ...]:
    """All routed experts, router by router in forward order; those that compute nothing too."""
    return tuple(
        ExpertKey(site.info.layer, site.info.kind, expert)
        for site in sites
        for expert in range(site.info.num_experts)
    )


@dataclass(frozen=True)
class Routed:
    """One call of a router: its decision under the base plan, and how to ask for another.

    Attributes:
        site: the router.
        logits: what the rule starts from, float[T, E], without graph.
        inputs: what the rule needs besides.
        edits: the base plan's, None where it leaves the router alone.
        weights: float[T, K], as handed on, without graph.
        ids: int64[T, K].
    """

    site: RouterSite
    logits: Tensor
    inputs: dict[str, Any]
    edits: Edits | None
    weights: Tensor
    ids: Tensor

    def under(self, **marks: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float[T, K'] and ids under further edits, by the name of their field.

        Args:
            marks: bool[T, E] each, beside what the base plan marks.
        """
        edits = self.edits or Edits()
        united: dict[str, Any] = {
            name: mark if getattr(edits, name) is None else getattr(edits, name) | mark
            for name, mark in marks.items()
        }
        return select(self.logits, self.site.info.rule, replace(edits, **united), **self.inputs)

    def dense(self, values: Tensor, ids: Tensor) -> Tensor:
        """Values of slots float[T, K'] by expert, float64[T, E]; slots of one expert add up."""
        found = torch.zeros(self.logits.shape, dtype=torch.float64, device=values.device)
        return found.scatter_add_(1, ids, values.double())


@dataclass(frozen=True)
class Leaf:
    """The leaf of one call of a router.

    Attributes:
        routed: the call.
        zeros: float[T, K + M], what the target is differentiated by.
        ids: int64[T, K + M], the expert of each slot.
    """

    routed: Routed
    zeros: Tensor
    ids: Tensor


#: From a call to the experts of its added slots, int64[T, M].
Added = Callable[[Routed], Tensor]
#: From a call, its weights float[T, K] with their graph, and the experts of all its slots to what
#: is added to the slots' weights, float[T, K + M].
Moved = Callable[[Routed, Tensor, Tensor], Tensor]


class PlanEdits:
    """The edits of a plan in the forward that is running.

    Args:
        model: the model, not wrapped.
        plan: what to change; None or an empty plan changes nothing.
        sites: the model's routers.

    Raises:
        PlanError: the plan does not fit the model, or replays a run.
    """

    def __init__(
        self, model: nn.Module, plan: SteeringPlan | None, sites: Sequence[RouterSite]
    ) -> None:
        self.plan = plan or SteeringPlan()
        infos = [site.info for site in sites]
        check_shape(self.plan, infos)
        check_rules(self.plan, infos)
        self.model, self.tracker = model, PositionTracker(model)
        self._on: dict[str, list[Intervention]] = {}
        record_only = {site.info.module: site for site in sites if site.record_only}
        for number, one in enumerate(self.plan.interventions, start=1):
            if isinstance(one, Replay):
                raise PlanError(
                    f"intervention {number} replays a run; causes are measured under plans without "
                    "replays"
                )
            for info in layers_of(self.plan, number, infos):
                if info.module in record_only:
                    site = record_only[info.module]
                    raise PlanError(
                        f"{site.where} can be recorded but not steered: {site.record_only}"
                    )
                self._on.setdefault(info.module, []).append(one)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Follow the model's forwards while the block runs."""
        with ExitStack() as stack:
            begin = self.model.register_forward_pre_hook(
                self.tracker.before_forward, with_kwargs=True
            )
            stack.callback(begin.remove)
            end = self.model.register_forward_hook(self.tracker.after_forward, always_call=True)
            stack.callback(end.remove)
            yield

    def of(self, site: RouterSite, num_rows: int, device: torch.device) -> Edits | None:
        """The edits of a call of this router with T rows, None where there are none."""
        interventions = self._on.get(site.info.module, [])
        if not interventions:
            return None
        positions = self.tracker.of(site.info.kind)
        if positions is None or positions.num_rows != num_rows:
            raise MoescopeError(
                f"{site.where}: {num_rows} rows passed the router, and which tokens they are is "
                "not known"
            )
        info = site.info
        requests: list[tuple[Intervention, Tensor]] = []
        for one in interventions:
            rows = positions.rows(one.tokens, one.prompt_ids)
            if rows is False:
                continue
            what = torch.ones(1, dtype=torch.bool, device=device)
            if one.experts:
                what = torch.zeros(info.num_experts, dtype=torch.bool, device=device)
                what[list(one.experts)] = True
            where = rows.to(device)[:, None] & what if isinstance(rows, Tensor) else what
            requests.append((one, where))
        limit = info.top_k if info.kind == "attention" or info.rule.capacity is not None else None
        return edits_of(requests, top_k=info.top_k, limit=limit) if requests else None


@contextmanager
def leaves_planted(
    sites: Sequence[RouterSite],
    plan: PlanEdits,
    added: Added | None = None,
    moved: Moved | None = None,
) -> Iterator[list[Leaf]]:
    """While the block runs, each call of a router adds its leaf to the list, in forward order.

    Args:
        sites: the routers.
        plan: the base plan, attached.
        added: further slots of weight 0.
        moved: where on a path the weights stand, if not at their own.
    """
    leaves: list[Leaf] = []
    with ExitStack() as stack:
        for site in sites:

            def hook(
                _module: nn.Module, args: tuple[Any, ...], output: Any, site: RouterSite = site
            ) -> Any:
                found = site.form.read(site, args, output)
                weights, ids, routed = _decided(site, args, output, plan)
                slots = ids if added is None else torch.cat([ids, added(routed)], dim=1)
                zeros = torch.zeros(
                    slots.shape, dtype=found.weights.dtype, device=slots.device, requires_grad=True
                )
                leaves.append(Leaf(routed, zeros, slots))
                missing = slots.shape[1] - ids.shape[1]
                handed_on = nn.functional.pad(weights, (0, missing))
                if moved is not None:
                    handed_on = handed_on + moved(routed, weights, slots).to(handed_on.dtype)
                return site.form.write(site, args, output, handed_on + zeros, slots)

            stack.callback(site.router.register_forward_hook(hook, prepend=True).remove)
        yield leaves


def _decided(
    site: RouterSite, args: tuple[Any, ...], output: Any, plan: PlanEdits
) -> tuple[Tensor, Tensor, Routed]:
    """Weights (with their graph) and ids under the base plan, and the same as `Routed`."""
    found = site.form.read(site, args, output)
    inputs = site.form.inputs(site, args, output)
    edits = plan.of(site, len(found.logits), found.logits.device)
    weights, ids = found.weights, found.expert_ids
    if edits is not None:
        weights, ids = select(found.logits, site.info.rule, edits, **inputs)
    routed = Routed(site, found.logits.detach(), inputs, edits, weights.detach(), ids)
    return weights, ids, routed


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """While the block runs, forwards keep their graph, and no parameter asks for a gradient."""
    model = underlying(model)
    asking = [one for one in model.parameters() if one.requires_grad]
    for one in asking:
        one.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for one in asking:
            one.requires_grad_(True)


def gradients(values_B: Tensor, leaves: Sequence[Leaf]) -> list[Tensor]:
    """The rows' targets differentiated by each leaf, float[T, K + M]; 0 where none depends on it.

    Rows do not see each other, so the gradient of their sum is each row's own.
    """
    if not values_B.requires_grad:
        return [torch.zeros_like(leaf.zeros) for leaf in leaves]
    found = torch.autograd.grad(values_B.sum(), [leaf.zeros for leaf in leaves], allow_unused=True)
    return [
        torch.zeros_like(leaf.zeros) if one is None else one
        for leaf, one in zip(leaves, found, strict=True)
    ]


def by_row_and_expert(values: Tensor, ids: Tensor, num_rows: int, routed: Routed) -> Tensor:
    """Values of slots float[T, K'] added up over the tokens of each row, float64[B, E].

    Raises:
        MoescopeError: the router's rows are not as many for each row of the batch.
    """
    num_tokens, num_experts = routed.logits.shape
    if num_tokens % num_rows:
        raise MoescopeError(
            f"{routed.site.where}: {num_tokens} rows passed the router for {num_rows} sequences, "
            "so whose they are is not known"
        )
    row_T1 = torch.arange(num_rows, device=ids.device).repeat_interleave(num_tokens // num_rows)
    cell = row_T1[:, None] * num_experts + ids
    found = torch.zeros(num_rows * num_experts, dtype=torch.float64, device=ids.device)
    return found.index_add_(0, cell.flatten(), values.double().flatten()).view(num_rows, -1)
