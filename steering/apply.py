"""Steering: a plan applied to a live model while a block runs.

    with steer(bundle.model, plan) as report:
        bundle.model.generate(**inputs)
    report.share

Hooks on the routers replace the returned weights and expert ids by what the family's own rule
gives after the plan's edits (`moescope.kernels.route.select`). They run before all other hooks, so
that `record`, entered before or after, sees the steered routing. Rows out of scope keep the
router's own output to the bit, and layers without active edits are not touched.

Nothing is taken on trust: before a layer is steered for the first time its rule must repeat the
router's own output on that very input, in every forward the experts must receive what steering
handed on, and a steered layer that was passed over stops the forward. On leaving, also through an
exception, no hook and no wrapper is left behind.

Two plans at once: `steer` blocks nest as long as they steer different layers. On one layer the
order would decide what holds, so a second plan there is refused; put both into one plan.

Letters: T rows of the router (tokens, padding included), E experts, K experts per token, I
interventions on one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moescope.kernels.route import Edits, select
from moescope.probe.bridges import underlying
from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.routers import RouterSite, find_routers
from moescope.steering.check import check, check_shape, layer_of
from moescope.steering.operators import OPERATORS, edits_of
from moescope.steering.plan import SteeringPlan
from moescope.steering.positions import (
    PositionTracker,
    TokenPositions,
    prompts_known_in_generate,
)
from moescope.steering.report import SteeringReport

#: Routers that are steered now, and by which plan.
_STEERED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def steer(
    model: nn.Module, plan: SteeringPlan, *, sites: Sequence[RouterSite] | None = None
) -> Iterator[SteeringReport]:
    """Apply a plan to a model while the block runs.

    Args:
        model: a transformers causal language model, or a TransformerLens bridge around one.
        plan: what to change; an empty plan changes nothing.
        sites: the model's routers as `verify_routers` proved them, where the caller has them; then
            an unverified layer is refused before anything runs. Without them each layer is proved
            on the first input it sees.

    Yields:
        The report of requested against achieved routing, kept up to date.

    Raises:
        PlanError: the plan does not fit the model, or a layer of it is steered already.
        ModelInputError: a dense model, or a family that is not supported.
    """
    model = underlying(model)
    if sites is None:
        sites = find_routers(model)
        check_shape(plan, [site.info for site in sites])
    else:
        check(plan, [site.info for site in sites])
    infos = [site.info for site in sites]
    acted_on = [layer_of(plan, number, infos) for number in range(1, len(plan.interventions) + 1)]
    report = SteeringReport(plan, [info.kind for info in acted_on])
    tracker = PositionTracker(model)
    steered = _steered_layers(plan, sites, [info.module for info in acted_on], report, tracker)
    with ExitStack() as stack:
        for layer in steered:
            stack.enter_context(layer.attached())
        if steered:
            stack.enter_context(_watched(model, tracker, steered, report))
            stack.enter_context(prompts_known_in_generate(model))
        yield report


def _steered_layers(
    plan: SteeringPlan,
    sites: Sequence[RouterSite],
    modules: Sequence[str],
    report: SteeringReport,
    tracker: PositionTracker,
) -> list[_SteeredLayer]:
    """One per router that the plan acts on; `modules` names the router of each intervention."""
    by_module = {site.info.module: site for site in sites}
    numbers: dict[str, list[int]] = {}
    for number, module in enumerate(modules, start=1):
        numbers.setdefault(module, []).append(number)
    return [
        _SteeredLayer(by_module[module], plan, found, report, tracker)
        for module, found in numbers.items()
    ]


@contextmanager
def _watched(
    model: nn.Module,
    tracker: PositionTracker,
    steered: Sequence[_SteeredLayer],
    report: SteeringReport,
) -> Iterator[None]:
    """Follow each forward of the model: its token positions, and that no layer was passed over."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        running = tracker.current
        tracker.after_forward(module, args, output)
        if running is None or output is None:
            return  # the forward failed; its own error is on the way
        report.num_forwards += 1
        for layer in steered:
            layer.require_done()

    with ExitStack() as stack:
        begin = model.register_forward_pre_hook(tracker.before_forward, with_kwargs=True)
        stack.callback(begin.remove)
        end = model.register_forward_hook(after, always_call=True)
        stack.callback(end.remove)
        yield


class _SteeredLayer:
    """One router under a plan: its hooks, its edits and its counts."""

    def __init__(
        self,
        site: RouterSite,
        plan: SteeringPlan,
        numbers: Sequence[int],
        report: SteeringReport,
        tracker: PositionTracker,
    ) -> None:
        self.site = site
        self.plan = plan
        self.numbers = tuple(numbers)
        self.report = report
        self.tracker = tracker
        self.interventions = [plan.interventions[number - 1] for number in numbers]
        self.handed_on: tuple[Tensor, Tensor] | None = None
        self.last_done = 0
        self.is_proved = site.info.verified
        self.where = f"layer {site.info.layer} ({site.info.module})"
        experts_IE = torch.zeros(len(numbers), site.info.num_experts, dtype=torch.bool)
        for row, intervention in enumerate(self.interventions):
            experts_IE[row, list(intervention.experts)] = True
        self.experts_IE = experts_IE

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The layer's hooks while the block runs."""
        router, experts = self.site.router, self.site.experts
        if router in _STEERED:
            raise PlanError(
                f"layer {self.site.info.layer} is steered by {_STEERED[router]} already; put "
                f"its interventions and those of {self.plan.title!r} into one plan"
            )
        with ExitStack() as stack:
            _STEERED[router] = repr(self.plan.title)
            stack.callback(_STEERED.pop, router)
            hook = router.register_forward_hook(self.on_router, prepend=True)
            stack.callback(hook.remove)
            arrival = experts.register_forward_pre_hook(self.on_experts, with_kwargs=True)
            stack.callback(arrival.remove)
            yield

    def on_router(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Router hook: the output with weights and ids replaced, or None where nothing acts."""
        logits_TE, weights_TK, expert_ids_TK = output[:3]
        rows = self._rows_by_intervention(logits_TE.shape[0])
        if all(row is False for row in rows):
            self.handed_on = (weights_TK, expert_ids_TK)
            return None
        self._prove(logits_TE, weights_TK, expert_ids_TK)
        device = logits_TE.device
        rows = [row.to(device) if isinstance(row, Tensor) else row for row in rows]
        edits = self._edits(rows, device)
        steered_weights, steered_ids = select(logits_TE, self.site.info.rule, edits)
        if not any(row is True for row in rows):
            acts_T1 = torch.stack([row for row in rows if isinstance(row, Tensor)]).any(0)[:, None]
            steered_weights = torch.where(acts_T1, steered_weights, weights_TK)
            steered_ids = torch.where(acts_T1, steered_ids, expert_ids_TK)
        self._count(rows, before=expert_ids_TK, after=steered_ids)
        self.handed_on = (steered_weights, steered_ids)
        return (logits_TE, steered_weights, steered_ids, *output[3:])

    def on_experts(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Experts pre-hook: they must be called with what the steered router handed on."""
        found = [*args, *kwargs.values()]
        handed_on, self.handed_on = self.handed_on, None
        if handed_on is None or len(found) != 3:
            raise MoescopeError(f"{self.where}: the experts ran without their router, unsteered")
        for given, expected in ((found[1], handed_on[1]), (found[2], handed_on[0])):
            if given is not expected and not torch.equal(given, expected):
                raise MoescopeError(
                    f"{self.where}: the experts received other ids or weights than steering handed "
                    "on, so this layer cannot be steered"
                )
        self.last_done = self.tracker.num_forwards

    def require_done(self) -> None:
        """Stop where the forward that just ended passed this layer over."""
        if self.last_done != self.tracker.num_forwards:
            raise MoescopeError(
                f"{self.where}: the forward passed its router or experts over (a fused kernel may "
                "have taken their place), so nothing was steered there"
            )

    def _rows_by_intervention(self, num_rows: int) -> list[bool | Tensor]:
        """Where each intervention acts: every row, none, or bool[T]."""
        positions = self._positions(num_rows)
        if positions is not None:
            return [positions.rows(one.tokens) for one in self.interventions]
        if all(one.tokens == "all" for one in self.interventions):
            return [True] * len(self.interventions)
        raise MoescopeError(
            f"{self.where}: {num_rows} rows passed the router, and which tokens they are is not "
            "known, but the plan acts on some tokens only; call the steered model itself, not a "
            "part of it"
        )

    def _positions(self, num_rows: int) -> TokenPositions | None:
        current = self.tracker.current
        return current if current is not None and current.num_rows == num_rows else None

    def _edits(self, rows: Sequence[bool | Tensor], device: torch.device) -> Edits:
        """The edits of the interventions that act, on the router's device."""
        if self.experts_IE.device != device:
            self.experts_IE = self.experts_IE.to(device)
        requests = []
        for row, experts_E, one in zip(rows, self.experts_IE, self.interventions, strict=True):
            if isinstance(row, Tensor):
                requests.append((one, row[:, None] & experts_E))
            elif row:
                requests.append((one, experts_E))
        return edits_of(requests)

    def _prove(self, logits_TE: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> None:
        """The rule must repeat the router's own output, once, on real tokens."""
        if self.is_proved:
            return
        positions = self._positions(logits_TE.shape[0])
        real_T = None if positions is None else positions.real_rows()
        keep = slice(None) if real_T is None else real_T.to(logits_TE.device)
        weights, ids = select(logits_TE[keep], self.site.info.rule)
        if not torch.equal(ids, expert_ids_TK[keep]) or not torch.equal(weights, weights_TK[keep]):
            raise PlanError(
                f"{self.where} cannot be steered: its selection rule "
                f"({self.site.info.rule.description}) does not repeat the router's own output"
            )
        self.is_proved = True

    def _count(self, rows: Sequence[bool | Tensor], *, before: Tensor, after: Tensor) -> None:
        """Add this forward's requests, and how many held before and after, to the report."""
        positions = self._positions(before.shape[0])
        real_T = None if positions is None else positions.real_rows()
        rows_TI = torch.stack([_as_rows(row, before) for row in rows], dim=1)
        if real_T is not None:
            rows_TI = rows_TI & real_T.to(before.device)[:, None]
        rows_IT = rows_TI.T.float()  # float32 counts up to 2**24 tokens a forward exactly
        tokens_I = rows_TI.sum(0)
        hits = [self._hits(rows_IT, expert_ids_TK) for expert_ids_TK in (before, after)]
        for row, (number, one) in enumerate(zip(self.numbers, self.interventions, strict=True)):
            requested = tokens_I[row] * len(one.experts)
            wants_selected = OPERATORS[one.action].wants_selected
            held = [found[row] if wants_selected else requested - found[row] for found in hits]
            self.report.count(number, requested=requested, held_anyway=held[0], achieved=held[1])

    def _hits(self, rows_IT: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """How often each intervention's experts were selected in its rows, int64[I]."""
        num_rows, num_experts = expert_ids_TK.shape[0], self.site.info.num_experts
        selected_TE = torch.zeros(num_rows, num_experts, device=expert_ids_TK.device)
        selected_TE.scatter_(1, expert_ids_TK, 1.0)
        return ((rows_IT @ selected_TE) * self.experts_IE).sum(1).long()


def _as_rows(row: bool | Tensor, like_TK: Tensor) -> Tensor:
    if isinstance(row, Tensor):
        return row
    return torch.full(like_TK.shape[:1], row, dtype=torch.bool, device=like_TK.device)
