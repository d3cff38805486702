"""The proof at attach time, before a row is written or a weight steered.

Three checks on the real modules with real inputs, per routed layer:

- *shapes*: the router returns `(logits[T, E], weights[T, K], expert_ids[T, K])`, the experts are
  called with those same ids and weights, each row has K different ids in range;
- *replay*: the family's rule applied to the recorded logits gives the recorded ids and weights
  (ids in the same order, weights to the bit);
- *influence*: masking the layer's most used expert changes the model's output.

A layer that fails replay or influence can be recorded but not steered; one that fails the shapes
stops everything, because what it would record is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moescope.kernels.route import Edits, select
from moescope.probe.errors import RecordingError
from moescope.probe.routers.discovery import find_routers
from moescope.probe.routers.spec import RouterOutput, RouterSite

#: Tokens of the probing forward; enough to use most experts, few enough to cost nothing.
_MAX_TOKENS = 64


@dataclass
class _Seen:
    """What one layer's modules exchanged during the probing forward."""

    router: RouterOutput | None = None
    experts: tuple[Tensor, Tensor] | None = None


def verify_routers(model: nn.Module, input_ids: Tensor) -> list[RouterSite]:
    """Find the routers and prove that they are read right.

    Args:
        model: a transformers model, in evaluation mode.
        input_ids: int64[1, S], real tokens (an encoded prompt); at most 64 are used.

    Returns:
        The sites in forward order, with `verified` and `reason` filled in.

    Raises:
        ModelInputError: a dense model, or a family that is not supported.
        RecordingError: a layer whose modules do not return what the family's entry says.
    """
    sites = find_routers(model)
    input_ids = input_ids[:, :_MAX_TOKENS]
    with torch.inference_mode():
        with _watching(sites) as seen:
            before = _logits(model, input_ids)
        checked: list[RouterSite] = []
        for site in sites:
            output = _check_shapes(site, seen[site.info.module], input_ids.numel())
            reason = _replay_problem(site, output)
            if reason is None:
                reason = _influence_problem(model, site, output, input_ids, before)
            info = replace(site.info, verified=reason is None, reason=reason)
            checked.append(RouterSite(info, site.router, site.experts))
    return checked


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    logits = model(input_ids=input_ids, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


@contextmanager
def _watching(sites: list[RouterSite]) -> Iterator[dict[str, _Seen]]:
    """Capture what each router returns and what its experts are called with."""
    seen = {site.info.module: _Seen() for site in sites}
    with ExitStack() as stack:
        for site in sites:
            entry = seen[site.info.module]

            def on_router(
                _module: nn.Module, _args: Any, output: Any, entry: _Seen = entry
            ) -> None:
                if isinstance(output, tuple) and len(output) == 3:
                    entry.router = RouterOutput(*output)

            def on_experts(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                entry: _Seen = entry,
            ) -> None:
                found = [*args, *kwargs.values()]
                if len(found) == 3:
                    entry.experts = (found[1], found[2])

            stack.callback(site.router.register_forward_hook(on_router).remove)
            stack.callback(
                site.experts.register_forward_pre_hook(on_experts, with_kwargs=True).remove
            )
        yield seen


def _check_shapes(site: RouterSite, seen: _Seen, num_tokens: int) -> RouterOutput:
    where = f"layer {site.info.layer} ({site.info.module})"
    if seen.router is None:
        raise RecordingError(
            f"{where}: the router was not called, or did not return (logits, weights, ids); a "
            "fused kernel may have taken its place"
        )
    if seen.experts is None:
        raise RecordingError(
            f"{where}: the experts module was not called with (hidden, ids, weights); a fused "
            "kernel may have taken its place"
        )
    logits, weights, ids = seen.router
    expected = (num_tokens, site.info.num_experts), (num_tokens, site.info.top_k)
    if (
        tuple(logits.shape) != expected[0]
        or not tuple(weights.shape) == tuple(ids.shape) == (expected[1])
    ):
        raise RecordingError(
            f"{where}: the router returned shapes {tuple(logits.shape)}, {tuple(weights.shape)}, "
            f"{tuple(ids.shape)} instead of {expected[0]}, {expected[1]}, {expected[1]}"
        )
    if not (torch.equal(ids, seen.experts[0]) and torch.equal(weights, seen.experts[1])):
        raise RecordingError(
            f"{where}: the experts were called with other ids or weights than the router returned"
        )
    ordered = ids.sort(dim=-1).values
    if (
        (ordered[:, 1:] == ordered[:, :-1]).any()
        or ids.min() < 0
        or (ids.max() >= site.info.num_experts)
    ):
        raise RecordingError(f"{where}: expert ids repeat within a token or are out of range")
    return seen.router


def _replay_problem(site: RouterSite, output: RouterOutput) -> str | None:
    weights, ids = select(output.logits, site.info.rule)
    if not torch.equal(ids, output.expert_ids):
        return "the rule selects other experts than the router did"
    if weights.dtype != output.weights.dtype or not torch.equal(weights, output.weights):
        return "the rule gives other routing weights than the router did"
    return None


def _influence_problem(
    model: nn.Module, site: RouterSite, output: RouterOutput, input_ids: Tensor, before: Tensor
) -> str | None:
    if site.info.top_k == site.info.num_experts:
        return "all experts are selected for every token, so there is no routing to change"
    used = torch.bincount(output.expert_ids.flatten(), minlength=site.info.num_experts)
    masked = torch.zeros(site.info.num_experts, dtype=torch.bool, device=used.device)
    masked[used.argmax()] = True
    edits = Edits(mask_inf=masked)

    def hook(_module: nn.Module, _args: Any, found: Any) -> RouterOutput:
        return RouterOutput(found[0], *select(found[0], site.info.rule, edits))

    handle = site.router.register_forward_hook(hook)
    try:
        after = _logits(model, input_ids)
    finally:
        handle.remove()
    if not torch.isfinite(after).all():
        return "masking an expert makes the output infinite"
    if torch.equal(after, before):
        return "masking the most used expert does not change the output"
    return None
