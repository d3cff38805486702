"""Routing that a function computes from the router's own decision, applied while a block runs.

For decoding methods that no action of a plan says: the experts of one rank
(`moescope.steering.contrast_decoding`), scores of other samples (`moescope.steering.remix`). It is
carried out as a replay whose routing is made on the spot, so that everything `steer` promises holds
here too: the family's rule is proved first, the experts must receive what was handed on, a layer
that was passed over stops the forward, and on leaving, also through an exception, nothing is left
behind.

Letters: T rows of the router, E experts, K' experts per token after the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from moescope.probe.bridges import underlying
from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.routers import RouterOutput, RouterSite, find_routers
from moescope.steering.apply import steer
from moescope.steering.plan import SteeringPlan, TokenScope
from moescope.steering.positions import TokenPositions
from moescope.steering.replay import Replayed
from moescope.steering.report import SteeringReport


class RouterCall(NamedTuple):
    """One call of one router.

    Attributes:
        site: the router.
        decided: what it decided by itself: logits [T, E], weights and ids [T, K].
        inputs: what its rule needs besides the logits, as `moescope.kernels.route.select` takes it.
        positions: which tokens the rows are; None where it cannot be told.
    """

    site: RouterSite
    decided: RouterOutput
    inputs: Mapping[str, Any]
    positions: TokenPositions | None


#: Gives the weights float[T, K'] and expert ids int64[T, K'] to use instead.
Compute = Callable[[RouterCall], tuple[Tensor, Tensor]]


@contextmanager
def computed_routing(
    model: nn.Module,
    compute: Compute,
    *,
    layers: Sequence[int],
    name: str,
    scopes: Sequence[TokenScope] = ("all",),
    sites: Sequence[RouterSite] | None = None,
) -> Iterator[SteeringReport]:
    """Use the routing that `compute` gives while the block runs.

    Args:
        model: a transformers model, or a TransformerLens bridge around one.
        compute: called once for each call of each router, on all its rows.
        layers: decoder layers, by their feed-forward (`mlp`) routers.
        name: of the method, for messages and the report.
        scopes: the tokens it acts on, scopes that do not overlap; others keep their own routing.
        sites: the model's routers where they are proved already; see `steer`.

    Raises:
        PlanError: a layer has no router, cannot be steered, or is steered already.
        ModelInputError: a dense model, or a family that is not supported.
    """
    plan = SteeringPlan(
        name=name,
        interventions=[
            {"action": "replay", "run": name, "layers": list(layers), "kind": "mlp", "tokens": one}
            for one in scopes
        ],
    )
    source = _Computed(compute)
    with ExitStack() as stack:
        report = stack.enter_context(steer(model, plan, sites=sites, runs={name: source}))
        for layer in source.layers.values():
            # In front of the hook of `steer`, which has put itself in front of all others.
            hook = layer.site.router.register_forward_hook(layer.before_steering, prepend=True)
            stack.callback(hook.remove)
        yield report


def routed_layers(
    model: nn.Module, method: str, sites: Sequence[RouterSite] | None = None
) -> list[RouterSite]:
    """The feed-forward routers of a model (of its `sites`, where they are known already).

    Raises:
        PlanError: there is none, or one of them can be recorded only.
        ModelInputError: a dense model, or a family that is not supported.
    """
    sites = find_routers(underlying(model)) if sites is None else sites
    found = [site for site in sites if site.info.kind == "mlp"]
    if not found:
        raise PlanError(f"{method} acts on routed feed-forward layers, and this model has none")
    for site in found:
        if site.record_only is not None:
            raise PlanError(f"{site.where} can be recorded but not steered: {site.record_only}")
    return found


@dataclass
class _Computed:
    """A source of routing (`moescope.steering.replay.RoutingSource`), one layer a router."""

    compute: Compute
    layers: dict[str, _ComputedLayer] = field(default_factory=dict)

    def begin(self, site: RouterSite) -> _ComputedLayer:
        """One layer for each router, however many scopes ask for it."""
        return self.layers.setdefault(site.info.module, _ComputedLayer(site, self.compute))


class _ComputedLayer:
    """One router: what it decided last, and what is made of that."""

    def __init__(self, site: RouterSite, compute: Compute) -> None:
        self.site = site
        self.compute = compute
        self._seen: tuple[RouterOutput, Mapping[str, Any]] | None = None
        self._made: Replayed | None = None

    def before_steering(self, _module: nn.Module, args: Any, output: Any) -> None:
        """Router hook: keep the router's own decision."""
        form = self.site.form
        self._seen = form.read(self.site, args, output), form.inputs(self.site, args, output)
        self._made = None

    def routing(self, num_rows: int, positions: TokenPositions | None) -> Replayed:
        """The computed routing of the call that is going on; once for all scopes."""
        if self._made is None:
            if self._seen is None or self._seen[0].logits.shape[0] != num_rows:
                raise MoescopeError(f"{self.site.where}: the router's own decision was not seen")
            weights, ids = self.compute(RouterCall(self.site, *self._seen, positions))
            self._seen, self._made = None, Replayed(ids, weights, None)
        return self._made
