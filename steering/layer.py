"""One router under a plan: its hooks, its edits, and the checks that nothing is taken on trust.

Letters: T rows of the router (tokens, padding included), E experts, K experts per token, I
interventions on one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from moescope.kernels.route import Edits, select
from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.norms import in_backward
from moescope.probe.routers import RouterOutput, RouterSite
from moescope.steering.counting import Counter
from moescope.steering.operators import edits_of
from moescope.steering.plan import Intervention, Replay, SteeringPlan
from moescope.steering.positions import PositionTracker, TokenPositions
from moescope.steering.replay import LayerSource, Replayed
from moescope.steering.report import LayerCounts

#: Routers that are steered now, and by which plan.
_STEERED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

#: Kinds of layers that not every forward of a model reaches.
_OPTIONAL_KINDS = ("encoder", "mtp")

#: Where interventions act: on every row, on none, or on those of bool[T].
Rows = Sequence[bool | Tensor]


class SteeredLayer:
    """One router under a plan.

    Args:
        site: the router.
        plan: the plan.
        numbers: the plan's interventions on this router, counted from 1.
        tracker: of the steered model.
        sources: for the replays among them, the routing to use.
    """

    def __init__(
        self,
        site: RouterSite,
        plan: SteeringPlan,
        numbers: Sequence[int],
        tracker: PositionTracker,
        sources: Mapping[int, LayerSource],
    ) -> None:
        self.site = site
        self.plan = plan
        self.tracker = tracker
        self.interventions = [plan.interventions[number - 1] for number in numbers]
        self.sources = [sources.get(number) for number in numbers]
        self.counts = LayerCounts(site.info.layer, site.info.kind, tuple(numbers))
        self.handed_on: RouterOutput | None = None
        self.has_arrived = False
        self.routed_in = self.done_in = 0
        self.differing: list[Tensor] = []
        self.is_proved = site.info.verified
        experts_IE = torch.zeros(len(numbers), site.info.num_experts, dtype=torch.bool)
        for row, intervention in enumerate(self.interventions):
            experts_IE[row, list(intervention.experts)] = True
        self.counter = Counter(self.interventions, experts_IE, site.info.rule)
        self._everywhere: tuple[torch.device, Edits] | None = None

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

    def on_router(self, _module: nn.Module, args: Any, output: Any) -> Any:
        """Router hook: the output with another selection, or None where nothing acts."""
        self.routed_in = self.tracker.num_forwards
        found = self.site.form.read(self.site, args, output)
        rows = self._rows(found.logits.shape[0])
        if all(row is False for row in rows):
            self.handed_on = found
            return None
        inputs = self.site.form.inputs(self.site, args, output)
        self._prove(found, inputs)
        rows = [row.to(found.logits.device) if isinstance(row, Tensor) else row for row in rows]
        self.counter.to(found.logits.device)
        edits, replayed_T, others_T = self._edits_now(rows, found)
        weights, ids = select(found.logits, self.site.info.rule, edits, **inputs)
        if others_T is not None:
            weights = torch.where(others_T[:, None], found.weights, weights)
            ids = torch.where(others_T[:, None], found.expert_ids, ids)
        changed = self.site.form.write(self.site, args, output, weights, ids)
        self.handed_on = self.site.form.read(self.site, args, changed)
        if not in_backward():  # gradient checkpointing runs layers again there
            self._count(rows, edits, found, self.handed_on, replayed_T)
        return changed

    def on_experts(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Experts pre-hook: they must be called with what the steered router handed on."""
        handed_on, self.handed_on = self.handed_on, None
        if handed_on is None:
            raise MoescopeError(
                f"{self.site.where}: the experts ran without their router, unsteered"
            )
        found = self.site.form.arrived(self.site, args, kwargs)
        if found is not None:
            self._compare(found, handed_on)
        elif not self.has_arrived:
            self._compare_counts(self.site.form.counted(self.site, args, kwargs), handed_on)
        self.has_arrived = True
        self.done_in = self.tracker.num_forwards

    def require_done(self) -> None:
        """Stop where the forward that just ended passed this layer over, or around steering."""
        differing, self.differing = self.differing, []
        if differing and bool(torch.stack(differing).any()):
            raise MoescopeError(self._bypassed)
        number = self.tracker.num_forwards
        if self.done_in == number:
            return
        if self.routed_in != number and self.site.info.kind in _OPTIONAL_KINDS:
            return
        raise MoescopeError(
            f"{self.site.where}: the forward passed its router or experts over (a fused kernel may "
            "have taken their place), so nothing was steered there"
        )

    def forget(self) -> None:
        """Forget a forward that failed."""
        self.handed_on = None
        self.differing = []

    @property
    def _bypassed(self) -> str:
        return (
            f"{self.site.where}: the experts received other ids or weights than steering handed "
            "on, so this layer cannot be steered"
        )

    def _compare(self, found: tuple[Tensor, Tensor], handed_on: RouterOutput) -> None:
        """Ids and weights at the experts against those handed on; slots of weight 0 have no id."""
        ids, weights = found
        if ids is handed_on.expert_ids and weights is handed_on.weights:
            return
        if ids.shape != handed_on.expert_ids.shape or weights.shape != handed_on.weights.shape:
            raise MoescopeError(self._bypassed)
        differs = (weights != handed_on.weights.to(weights.dtype)).any()
        if ids is not handed_on.expert_ids:
            differs = differs | ((ids != handed_on.expert_ids) & (weights != 0)).any()
        if differs.device.type != "cpu":
            self.differing.append(differs)  # waited for once, when the forward ends
        elif bool(differs):
            raise MoescopeError(self._bypassed)

    def _compare_counts(self, counts_E: Tensor | None, handed_on: RouterOutput) -> None:
        """Where the experts get no ids: which of them get tokens, in the first forward only."""
        if counts_E is None:
            return
        ids, num_experts = handed_on.expert_ids, self.site.info.num_experts
        least_E = torch.bincount(ids[handed_on.weights != 0], minlength=num_experts)
        named_E = torch.bincount(ids.flatten(), minlength=num_experts) > 0
        counts_E = counts_E.to(least_E.device)
        # JetMoE computes slots of weight 0 too, and repeats a token's first expert where its
        # attention uses fewer.
        if bool(((counts_E < least_E) | ((counts_E > 0) & ~named_E)).any()):
            raise MoescopeError(self._bypassed)

    def _rows(self, num_rows: int) -> list[bool | Tensor]:
        """Where each intervention acts: every row, none, or bool[T]."""
        positions = self._positions(num_rows)
        if positions is not None:
            return [positions.rows(one.tokens, one.prompt_ids) for one in self.interventions]
        if all(one.prompt_ids is None for one in self.interventions):
            scopes = [one.tokens for one in self.interventions]
            if all(scope == "all" for scope in scopes):
                return [True] * len(scopes)
            if self.site.info.kind == "encoder":  # encoders read prompts and nothing else
                return [scope in ("all", "prompt") for scope in scopes]
        raise MoescopeError(
            f"{self.site.where}: {num_rows} rows passed the router, and which tokens they are is "
            "not known, but the plan acts on some tokens only; call the steered model itself, not "
            "a part of it"
        )

    def _positions(self, num_rows: int) -> TokenPositions | None:
        current = self.tracker.of(self.site.info.kind)
        return current if current is not None and current.num_rows == num_rows else None

    def _edits_now(
        self, rows: Rows, found: RouterOutput
    ) -> tuple[Edits, Tensor | None, Tensor | None]:
        """The edits of this call; which rows are replayed (None: no replay); the rows to put back.

        None are to be put back where the edits themselves keep the rows out of scope as they are.
        """
        edits = self._edits(rows)
        parts: list[tuple[Tensor | bool, Replayed]] = []
        replayed_T: Tensor | None = None
        for row, source in zip(rows, self.sources, strict=True):
            if source is None:
                continue
            part = self._from_source(source, found)  # its calls count, in scope or not
            if row is False:
                continue
            acts = part.found if row is True else row if part.found is None else row & part.found
            parts.append((True if acts is None else acts, part))
            acts_T = _as_rows(True if acts is None else acts, found.expert_ids)
            replayed_T = acts_T if replayed_T is None else replayed_T | acts_T
        others_T = None
        if not any(row is True for row in rows):
            others_T = ~torch.stack([row for row in rows if isinstance(row, Tensor)]).any(0)
        changes_width = bool(parts) or edits.any_of("top_k", "top_p")
        if others_T is not None and changes_width:
            # What is out of scope is replayed too: its own routing, beside columns of weight 0.
            parts.append((others_T, Replayed(found.expert_ids, found.weights, None)))
            others_T = None
        if parts:
            edits = replace(edits, **_united(parts))
        return edits, replayed_T, others_T

    def _from_source(self, source: LayerSource, found: RouterOutput) -> Replayed:
        num_rows, device = found.logits.shape[0], found.logits.device
        part = source.routing(num_rows, self._positions(num_rows))
        found_T = None if part.found is None else part.found.to(device)
        return Replayed(part.ids.to(device), part.weights.to(device), found_T)

    def _edits(self, rows: Rows) -> Edits:
        """The edits of the interventions that act, on the router's device."""
        experts_IE = self.counter.experts_IE
        device, everything_1 = experts_IE.device, experts_IE.new_ones(1)
        acts_everywhere = all(row is True for row in rows)
        if acts_everywhere and self._everywhere is not None and self._everywhere[0] == device:
            return self._everywhere[1]
        requests: list[tuple[Intervention, Tensor]] = []
        for row, experts_E, one in zip(rows, experts_IE, self.interventions, strict=True):
            if row is False or isinstance(one, Replay):
                continue
            what = experts_E if one.experts else everything_1
            requests.append((one, row[:, None] & what if isinstance(row, Tensor) else what))
        info = self.site.info
        limit = info.top_k if info.kind == "attention" or info.rule.capacity is not None else None
        edits = edits_of(requests, top_k=info.top_k, limit=limit)
        if acts_everywhere:
            self._everywhere = (device, edits)
        return edits

    def _prove(self, found: RouterOutput, inputs: Mapping[str, Any]) -> None:
        """The rule must repeat the router's own output, once, on real tokens."""
        if self.is_proved:
            return
        positions = self._positions(found.logits.shape[0])
        real_T = None if positions is None else positions.real_rows()
        keep = slice(None) if real_T is None else real_T.to(found.logits.device)
        weights, ids = select(found.logits, self.site.info.rule, **inputs)
        if (
            weights.dtype != found.weights.dtype
            or not torch.equal(ids[keep], found.expert_ids[keep])
            or not torch.equal(weights[keep], found.weights[keep])
        ):
            raise PlanError(
                f"{self.site.where} cannot be steered: its selection rule "
                f"({self.site.info.rule.description}) does not repeat the router's own output"
            )
        self.is_proved = True

    def _count(
        self,
        rows: Rows,
        edits: Edits,
        before: RouterOutput,
        after: RouterOutput,
        replayed_T: Tensor | None,
    ) -> None:
        """Add this forward's requests, and how many held before and after, to the counts."""
        positions = self._positions(before.logits.shape[0])
        real_T = None if positions is None else positions.real_rows()
        rows_TI = torch.stack([_as_rows(row, before.expert_ids) for row in rows], dim=1)
        if real_T is not None:
            rows_TI = rows_TI & real_T.to(rows_TI.device)[:, None]
        with torch.no_grad():
            self.counts.add(self.counter.count(rows_TI, edits, before, after, replayed_T))


def _as_rows(row: bool | Tensor, like_TK: Tensor) -> Tensor:
    if isinstance(row, Tensor):
        return row
    return torch.full(like_TK.shape[:1], row, dtype=torch.bool, device=like_TK.device)


def _united(parts: Sequence[tuple[Tensor | bool, Replayed]]) -> dict[str, Any]:
    """One replay out of several, each on its own rows."""
    if len(parts) == 1 and parts[0][0] is True:
        _, part = parts[0]
        return {"replay_ids": part.ids, "replay_weights": part.weights, "replay_rows": None}
    width = max(part.ids.shape[1] for _, part in parts)
    first = parts[0][1].ids
    ids = torch.full((len(first), width), -1, dtype=torch.long, device=first.device)
    weights = torch.zeros(len(first), width, device=first.device)
    united_T = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for acts, part in parts:
        acts_T1 = _as_rows(acts, ids)[:, None]
        missing = width - part.ids.shape[1]
        ids = torch.where(acts_T1, functional.pad(part.ids, (0, missing), value=-1), ids)
        given = functional.pad(part.weights.float(), (0, missing))
        weights = torch.where(acts_T1, given, weights)
        united_T = united_T | acts_T1[:, 0]
    return {"replay_ids": ids, "replay_weights": weights, "replay_rows": united_T}
