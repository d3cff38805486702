"""What `moescope doctor` finds out about a model: how it routes, what is proved, what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt
from moescope.probe.routers import LayerInfo, verify_routers

_EXAMPLE = "What happened in the year in which the bridge was built, and who built it?"


@dataclass(frozen=True)
class Examination:
    """A model's routing as found on the live modules.

    Attributes:
        parameters: all parameters.
        active_parameters: those that one token passes: all but the experts it does not select.
        parameter_bytes: memory of the parameters.
        trace_bytes_per_token: rows of level topk, uncompressed: 2 bytes an id, 4 a weight.
    """

    name: str
    family: str
    dtype: str
    device: str
    layers: tuple[LayerInfo, ...]
    parameters: int
    active_parameters: int
    parameter_bytes: int
    trace_bytes_per_token: int

    def lines(self) -> list[str]:
        """How it routes, in sentences."""
        refused = [info for info in self.layers if not info.verified]
        reasons = dict.fromkeys(str(info.reason) for info in refused)
        computed = sorted({info.implementation for info in self.layers})
        steering = (
            "verified on every layer: it can be recorded and steered"
            if not refused
            else f"{len(refused)} of {len(self.layers)} layers cannot be verified: they can be "
            f"recorded but not steered ({'; '.join(reasons)})"
        )
        return [
            f"{self.name}: family {self.family}, {len(self.layers)} routed layers, "
            f"{self.dtype} on {self.device}",
            f"experts computed by: {', '.join(computed)}",
            f"routing: {steering}",
        ]

    def size_lines(self) -> list[str]:
        """What the loaded model holds and a trace of it needs, in sentences."""
        return [
            f"parameters: {self.parameters:,}, of which {self.active_parameters:,} active per "
            f"token; {self.parameter_bytes / 1e9:.2f} GB of memory",
            f"a trace at level topk: {self.trace_bytes_per_token:,} bytes a token before "
            "compression",
        ]

    def layer_rows(self) -> list[tuple[Any, ...]]:
        """One row a layer: layer, kind, experts, top-k, shared, rule, verified or why not."""
        return [
            (
                info.layer, info.kind, info.num_experts, info.top_k, info.num_shared_experts,
                info.rule.description, "yes" if info.verified else f"no: {info.reason}",
            )
            for info in self.layers
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The examination as plain data."""
        layers = [
            {
                "layer": info.layer, "kind": info.kind, "module": info.module,
                "num_experts": info.num_experts, "top_k": info.top_k,
                "num_shared_experts": info.num_shared_experts, "rule": info.rule.to_json(),
                "implementation": info.implementation,
                "verified": info.verified, "reason": info.reason,
            }
            for info in self.layers
        ]  # fmt: skip
        fields = ("name", "family", "dtype", "device", "parameters", "active_parameters",
                  "parameter_bytes", "trace_bytes_per_token")  # fmt: skip
        return {**{field: getattr(self, field) for field in fields}, "layers": layers}


def examine(bundle: ModelBundle) -> Examination:
    """Prove a model's routers on an example prompt and add up what it needs.

    Raises:
        ModelInputError: a dense model, or a family that is not supported.
        RecordingError: routers that do not return what the family's entry says.
    """
    rendered = render_prompt(
        bundle.tokenizer, Prompt(prompt_id=0, text=_EXAMPLE, set_name="doctor")
    )
    token_ids = torch.tensor([rendered.token_ids], device=bundle.device)
    sites = verify_routers(bundle.model, token_ids)
    parameters = sum(parameter.numel() for parameter in bundle.model.parameters())
    return Examination(
        name=bundle.name,
        family=bundle.family,
        dtype=str(bundle.model.dtype).removeprefix("torch."),
        device=str(bundle.device),
        layers=tuple(site.info for site in sites),
        parameters=parameters,
        active_parameters=parameters - sum(site.idle_parameters for site in sites),
        parameter_bytes=sum(p.numel() * p.element_size() for p in bundle.model.parameters()),
        trace_bytes_per_token=sum(site.info.top_k * 6 for site in sites),
    )
