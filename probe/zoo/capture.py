"""What the experts really get, read at their own inputs and from their own weights.

A second source beside the recording, which reads the routers: nothing here looks at a router or at
what hooks on it return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moescope.probe.errors import RecordingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moescope.probe.routers import RouterSite


@dataclass
class Arrived:
    """What arrived at the experts of one layer in one forward; T rows, K slots, E experts.

    Attributes:
        expert_ids: int64[T, K], or None where the experts are handed no ids.
        weights: float[T, K], or None with the ids.
        counts: tokens per expert in slots with a weight, int64[E], or None where it cannot be read.
        calls: how often the experts were called.
    """

    expert_ids: Tensor | None = None
    weights: Tensor | None = None
    counts: Tensor | None = None
    calls: int = 0


@dataclass
class Capture:
    """What arrived, by the name of the layer's router, since the last `clear`."""

    layers: dict[str, Arrived] = field(default_factory=dict)

    def __getitem__(self, site: RouterSite) -> Arrived:
        """What arrived at one layer's experts.

        Raises:
            RecordingError: they were not called.
        """
        found = self.layers.get(site.info.module)
        if found is None:
            raise RecordingError(f"{site.where}: its experts were not called")
        return found


@contextmanager
def capture(sites: Sequence[RouterSite]) -> Iterator[Capture]:
    """Watch the inputs of the routed experts while the block runs, the last forward counting."""
    caught = Capture()

    def watch(site: RouterSite) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before = caught.layers.get(site.info.module)
            pair = site.form.arrived(site, args, kwargs)
            ids, weights = (None, None) if pair is None else (one.detach().clone() for one in pair)
            counts = site.form.counted(site, args, kwargs)
            calls = 1 if before is None else before.calls + 1
            caught.layers[site.info.module] = Arrived(ids, weights, counts, calls)

        return hook

    with ExitStack() as stack:
        for site in sites:
            hook = site.experts.register_forward_pre_hook(watch(site), with_kwargs=True)
            stack.callback(hook.remove)
        yield caught


@contextmanager
def without_weights(experts: Sequence[tuple[RouterSite, int]]) -> Iterator[None]:
    """Set the weights of these experts to zero while the block runs, then put them back.

    An expert that receives no token can lose its weights without any effect on the model's output,
    and one that receives every token cannot: a proof that needs no hook at all.

    Args:
        experts: pairs of a layer and an expert in it.

    Raises:
        RecordingError: the expert has no weights of its own (zero-computation experts).
    """
    import torch

    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for site, expert in experts:
                slices = list(_weights_of(site, expert))
                if not slices:
                    raise RecordingError(f"{site.where}: expert {expert} has no weights of its own")
                for part in slices:
                    saved.append((part, part.clone()))
                    part.zero_()
        yield
    finally:
        with torch.no_grad():
            for part, values in reversed(saved):
                part.copy_(values)


def _weights_of(site: RouterSite, expert: int) -> Iterator[Tensor]:
    """Views of one expert's weights: its own module, or its slice of stacked tensors."""
    own = getattr(site.experts, f"expert_{expert}", None)
    if own is not None:
        yield from own.parameters()
        return
    count = site.info.rule.num_experts - site.info.rule.num_zero_experts - site.info.rule.has_skip
    if expert >= count:
        return
    for tensor in (one for module in site.expert_modules for one in module.parameters()):
        if tensor.shape[0] == count:
            yield tensor.data[expert]
        elif tensor.ndim > 1 and tensor.shape[0] % count == 0:
            # experts stacked along the rows of one matrix (DBRX)
            yield tensor.data.view(count, -1, *tensor.shape[1:])[expert]
