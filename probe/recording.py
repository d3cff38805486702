"""Recording the routing of a transformers model: a context manager over its routers.

    with record(bundle.model) as trace:
        bundle.model(**inputs)
    trace[3].expert_ids

Hooks sit on the routers and keep what was *used*: the returned ids and weights, with the raw
logits beside them; nothing is selected again. Every forward is checked as it ends: a routed layer
that produced nothing, or another number of rows than the first one, stops with its name. On
leaving, also through an exception, no hook is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moescope.probe.errors import RecordingError
from moescope.probe.routers import LayerInfo, RouterOutput, RouterSite, find_routers


@dataclass(frozen=True)
class LayerTrace:
    """The recorded routing of one layer: one row per token that passed its router.

    Attributes:
        logits: raw router logits, float[tokens, E].
        weights: routing weights as used, float[tokens, K], in the router's own order.
        expert_ids: selected experts, int64[tokens, K], in the router's own order.
    """

    logits: Tensor
    weights: Tensor
    expert_ids: Tensor


@dataclass
class Trace:
    """What `record` caught.

    Attributes:
        layers: the routed layers, in forward order.
        forwards: one entry per forward of the model: layer index to what its router returned,
            on the CPU, padding rows included.
    """

    layers: list[LayerInfo]
    forwards: list[dict[int, RouterOutput]] = field(default_factory=list)

    def __getitem__(self, layer: int) -> LayerTrace:
        """All rows of one decoder layer, forwards one after the other."""
        known = [info.layer for info in self.layers]
        if layer not in known:
            raise KeyError(f"layer {layer} has no router; the routed layers are {known}")
        if not self.forwards:
            raise RecordingError("nothing was recorded: the model was not called")
        parts = [forward[layer] for forward in self.forwards]
        return LayerTrace(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def clear(self) -> None:
        """Forget the forwards recorded so far; `record` goes on."""
        self.forwards.clear()


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record the routing of every forward of `model` while the block runs.

    Raises:
        ModelInputError: a dense model, or a family that is not supported.
        RecordingError: a routed layer was skipped, or routed another number of tokens.
    """
    sites = find_routers(model)
    recorder = _Recorder(Trace([site.info for site in sites]))
    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.router.register_forward_hook(recorder.router_hook(site)).remove)
        stack.callback(model.register_forward_pre_hook(recorder.forward_begins).remove)
        stack.callback(model.register_forward_hook(recorder.forward_ends).remove)
        yield recorder.trace


class _Recorder:
    """Collects one forward at a time and checks it when it ends."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.current: dict[int, RouterOutput] = {}

    def router_hook(self, site: RouterSite) -> Any:
        layer = site.info.layer

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if layer in self.current:
                raise RecordingError(
                    f"layer {layer} ({site.info.module}) routed twice in one forward"
                )
            self.current[layer] = RouterOutput(*(tensor.detach() for tensor in output))

        return hook

    def forward_begins(self, _module: nn.Module, _args: Any) -> None:
        self.current = {}

    def forward_ends(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        rows: int | None = None
        for info in self.trace.layers:
            found = self.current.get(info.layer)
            if found is None or found.expert_ids.shape[0] == 0:
                raise RecordingError(
                    f"layer {info.layer} ({info.module}) routed nothing in this forward"
                )
            if rows is not None and found.expert_ids.shape[0] != rows:
                raise RecordingError(
                    f"layer {info.layer} ({info.module}) routed {found.expert_ids.shape[0]} "
                    f"tokens where the layers before it routed {rows}"
                )
            rows = found.expert_ids.shape[0]
        self.trace.forwards.append(_to_cpu(self.current))
        self.current = {}


def _to_cpu(forward: dict[int, RouterOutput]) -> dict[int, RouterOutput]:
    """Move one forward's routing to the CPU; copies are queued together, then awaited once."""
    moved = {
        layer: RouterOutput(*(tensor.to("cpu", non_blocking=True) for tensor in output))
        for layer, output in forward.items()
    }
    devices = {output.logits.device for output in forward.values()}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return moved
