"""Steering: a plan applied to a live model while a block runs.

    with steer(bundle.model, plan) as report:
        bundle.model.generate(**inputs)
    report.share

Hooks on the routers replace the returned weights and expert ids by what the family's own rule
gives after the plan's edits (`moescope.kernels.route.select`), in the form in which the family's
routers hand them over. They run before all other hooks, so that `record`, entered before or after,
sees the steered routing. Rows out of scope keep the router's own output to the bit, and layers
without active edits are not touched.

Nothing is taken on trust: before a layer is steered for the first time its rule must repeat the
router's own output on that very input, in every forward the experts must receive what steering
handed on, and a steered layer that was passed over stops the forward. On leaving, also through an
exception, no hook and no wrapper is left behind.

Two plans at once: `steer` blocks nest as long as they steer different layers. On one layer the
order would decide what holds, so a second plan there is refused; put both into one plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from moescope.probe.bridges import underlying
from moescope.probe.errors import PlanError
from moescope.probe.routers import RouterSite, find_routers
from moescope.steering.check import check, check_rules, check_shape, layers_of
from moescope.steering.layer import SteeredLayer
from moescope.steering.plan import Replay, SteeringPlan
from moescope.steering.positions import PositionTracker, prompts_known_in_generate
from moescope.steering.replay import LayerSource, RoutingSource, source_of
from moescope.steering.report import SteeringReport

if TYPE_CHECKING:
    from moescope.probe.recording import Trace


@contextmanager
def steer(
    model: nn.Module,
    plan: SteeringPlan,
    *,
    sites: Sequence[RouterSite] | None = None,
    runs: Mapping[str, Trace | RoutingSource] | None = None,
) -> Iterator[SteeringReport]:
    """Apply a plan to a model while the block runs.

    Args:
        model: a transformers model, or a TransformerLens bridge around one.
        plan: what to change; an empty plan changes nothing.
        sites: the model's routers as `verify_routers` proved them, where the caller has them; then
            an unverified layer is refused before anything runs. Without them each layer is proved
            on the first input it sees.
        runs: routing for the plan's replays, by the names that they give; see
            `moescope.steering.replay`.

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
    check_rules(plan, [site.info for site in sites])
    tracker = PositionTracker(model)
    steered = _steered_layers(plan, sites, tracker, runs or {})
    report = SteeringReport(plan, [layer.counts for layer in steered])
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
    tracker: PositionTracker,
    runs: Mapping[str, Trace | RoutingSource],
) -> list[SteeredLayer]:
    """One per router that the plan acts on."""
    infos = [site.info for site in sites]
    by_module = {site.info.module: site for site in sites}
    numbers: dict[str, list[int]] = {}
    for number in range(1, len(plan.interventions) + 1):
        for info in layers_of(plan, number, infos):
            numbers.setdefault(info.module, []).append(number)
    for module in numbers:
        site = by_module[module]
        if site.record_only is not None:
            raise PlanError(f"{site.where} can be recorded but not steered: {site.record_only}")
    return [
        SteeredLayer(
            by_module[module], plan, found, tracker, _sources(plan, by_module[module], found, runs)
        )
        for module, found in numbers.items()
    ]


def _sources(
    plan: SteeringPlan,
    site: RouterSite,
    numbers: Sequence[int],
    runs: Mapping[str, Trace | RoutingSource],
) -> dict[int, LayerSource]:
    """Recorded routing of one router, by the number of the intervention that replays it."""
    found = {}
    for number in numbers:
        one = plan.interventions[number - 1]
        if not isinstance(one, Replay):
            continue
        if one.run not in runs:
            raise PlanError(
                f"intervention {number} replays run {one.run!r}, whose routing was not handed "
                f"over; in Python, steer(model, plan, runs=...) takes it under that name, "
                "the command line takes none yet"
            )
        found[number] = source_of(runs[one.run]).begin(site)
    return found


@contextmanager
def _watched(
    model: nn.Module,
    tracker: PositionTracker,
    steered: Sequence[SteeredLayer],
    report: SteeringReport,
) -> Iterator[None]:
    """Follow each forward of the model: its token positions, and that no layer was passed over."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        is_running = tracker.is_running
        tracker.after_forward(module, args, output)
        if not is_running or output is None:
            for layer in steered:  # the forward failed; its own error is on the way
                layer.forget()
            return
        report.num_forwards += 1
        for layer in steered:
            layer.require_done()

    with ExitStack() as stack:
        begin = model.register_forward_pre_hook(tracker.before_forward, with_kwargs=True)
        stack.callback(begin.remove)
        end = model.register_forward_hook(after, always_call=True)
        stack.callback(end.remove)
        yield
