"""The bench of the survey: a tiny model, its proved routers, and what its checks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moescope.probe.errors import MoescopeError
from moescope.probe.recording import Trace, record
from moescope.probe.routers import RouterSite
from moescope.probe.zoo.build import TinyModel
from moescope.probe.zoo.capture import Arrived, capture
from moescope.steering.apply import steer
from moescope.steering.plan import Intervention, SteeringPlan
from moescope.steering.report import SteeringReport


class CheckError(MoescopeError):
    """A check of the survey does not hold."""


@dataclass
class Bench:
    """A tiny model with what its checks share.

    Attributes:
        tiny: the model and its inputs.
        sites: its routers, as `verify_routers` proved them.
    """

    tiny: TinyModel
    sites: list[RouterSite]

    @property
    def tolerance(self) -> float:
        """Relative difference that rounding alone makes between two ways to compute a weight."""
        return 1e-5 if next(self.tiny.model.parameters()).dtype == torch.float32 else 2e-2

    @property
    def is_text(self) -> Tensor:
        """Which tokens of the inputs are text, bool[2, 13]."""
        kinds = [one for name, one in self.tiny.inputs.items() if name.endswith("token_type_ids")]
        return kinds[0] == 0 if kinds else torch.ones_like(self.tiny.inputs["input_ids"]).bool()

    def output(self) -> Tensor:
        """The model's output: logits, or the last hidden state."""
        with torch.inference_mode():
            found: Tensor = self.tiny.model(**self.tiny.inputs)[0]
        return found

    @cached_property
    def base(self) -> Tensor:
        """The output with nothing attached."""
        return self.output()

    @cached_property
    def unsteered(self) -> tuple[Trace, dict[str, Arrived]]:
        """A recorded forward without steering, and what arrived at the experts then."""
        with record(self.tiny.model, sites=self.sites) as trace, capture(self.sites) as caught:
            output = self.output()
        if not torch.equal(output, self.base):
            raise CheckError("recording changes the output")
        return trace, dict(caught.layers)

    def before(self, site: RouterSite) -> Arrived:
        """What arrived at the experts of one layer without steering."""
        return self.unsteered[1][site.info.module]

    @cached_property
    def active(self) -> list[RouterSite]:
        """The layers whose experts ran: not those of a modality that the inputs do not have."""
        return [site for site in self.sites if site.info.module in self.unsteered[1]]

    @cached_property
    def used(self) -> dict[str, tuple[int, int]]:
        """Router's name -> its most and its least used expert with weights of its own."""
        found = {}
        for site in self.active:
            counts = counts_of(site, self.before(site))
            rule = site.info.rule
            own = counts[: rule.num_experts - rule.num_zero_experts - rule.has_skip]
            found[site.info.module] = (int(own.argmax()), int(own.argmin()))
        return found

    @property
    def most(self) -> dict[str, int]:
        """Router's name -> the expert that most tokens use."""
        return {module: pair[0] for module, pair in self.used.items()}

    @property
    def least(self) -> dict[str, int]:
        """Router's name -> the expert that fewest tokens use."""
        return {module: pair[1] for module, pair in self.used.items()}

    def plan(
        self, action: str, experts: Mapping[str, int] | None = None, **fields: Any
    ) -> SteeringPlan:
        """One intervention of this action on every layer, on one expert each."""
        return SteeringPlan(
            interventions=[
                Intervention(
                    action=action, layer=site.info.layer, kind=site.info.kind,
                    **({} if experts is None else {"experts": [experts[site.info.module]]}),
                    **fields,
                )
                for site in self.active
            ]
        )  # fmt: skip

    @contextmanager
    def steered(self, plan: SteeringPlan, **options: Any) -> Iterator[SteeringReport]:
        """Steering with the proved routers."""
        with steer(self.tiny.model, plan, sites=self.sites, **options) as report:
            yield report

    def under(self, plan: SteeringPlan, **options: Any) -> tuple[Tensor, dict[str, Arrived]]:
        """The output under a plan, and what arrived at the experts."""
        with self.steered(plan, **options), capture(self.sites) as caught:
            output = self.output()
        return output, dict(caught.layers)

    def num_rows(self, site: RouterSite) -> int:
        """How many rows pass this layer's router."""
        return len(self.unsteered[0][site.info.layer, site.info.kind].expert_ids)


def counts_of(site: RouterSite, arrived: Arrived) -> Tensor:
    """Tokens per expert at the experts' input, int64[E]."""
    if arrived.counts is None:
        raise CheckError(f"{site.where}: what its experts receive cannot be counted")
    return arrived.counts
