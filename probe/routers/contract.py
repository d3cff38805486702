"""The proof at attach time, before a row is written or a weight steered.

Four checks on the real modules with real inputs, per routed layer:

- *shapes*: the router returns logits [T, E], weights and expert ids [T, K] in its family's form,
  the experts get those same ids and weights (or that many tokens each, where they get no ids), each
  row has K different ids in range;
- *replay*: the family's rule applied to the recorded logits gives the recorded ids and weights
  (ids in the same order, weights to the bit);
- *writing*: the replayed selection, written, is what the router returned, bit by bit; the experts
  get it; and the model's output stays as it is;
- *influence*: without the layer's most used expert the model's output is another, and that expert
  gets no token.

A layer that fails one of the last three can be recorded but not steered; one that fails the shapes
stops everything, because what it would record is wrong.

Some kernels add in another order each time (on CUDA, `index_add_` does), so that even two plain
forwards differ in their last bits. That is measured: where they do, outputs are not compared bit by
bit (what is written and what arrives still is, within one forward), and influence has to be larger
than that noise.

Letters: T rows of the router (tokens), E experts, K per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moescope.kernels.route import Edits, select
from moescope.probe.bridges import underlying
from moescope.probe.errors import RecordingError, UnknownRoutingError
from moescope.probe.routers.discovery import find_routers
from moescope.probe.routers.spec import RouterOutput, RouterSite

#: Tokens of the probing forward; enough to use most experts, few enough to cost nothing.
_MAX_TOKENS = 64
#: How many times the noise between two plain forwards an influence has to be.
_TIMES_NOISE = 10.0


@dataclass
class _Seen:
    """What one layer's modules exchanged during a probing forward."""

    router: RouterOutput | None = None
    inputs: dict[str, Any] | None = None
    unknown: str | None = None
    experts_called: bool = False
    arrived: tuple[Tensor, Tensor] | None = None
    counted: Tensor | None = None


def verify_routers(model: nn.Module, input_ids: Tensor) -> list[RouterSite]:
    """Find the routers and prove that they are read right.

    Args:
        model: a transformers model, in evaluation mode, or a TransformerLens bridge around one.
        input_ids: int64[B, S], real tokens (an encoded prompt); at most 64 positions are used.

    Returns:
        The sites in forward order, with `verified` and `reason` filled in.

    Raises:
        ModelInputError: a dense model, or a family that is not supported.
        RecordingError: a layer whose modules do not return what the family's entry says, or a
            model in training mode.
    """
    model = underlying(model)
    sites = find_routers(model)
    for site in sites:
        if site.router.training:
            raise RecordingError(
                f"{site.where}: the model is in training mode, in which no two forwards are alike; "
                "call model.eval() before its routers are verified"
            )
    input_ids = input_ids[:, :_MAX_TOKENS]
    with torch.inference_mode():
        problems = _problems(model, sites, input_ids)
    return [
        replace(site, info=replace(site.info, verified=problem is None, reason=problem))
        for site, problem in zip(sites, problems, strict=True)
    ]


def _problems(model: nn.Module, sites: Sequence[RouterSite], input_ids: Tensor) -> list[str | None]:
    """Why each layer cannot be steered, or None."""
    with _watching(sites) as seen:
        before = _output(model, input_ids)
    if before.isnan().any():
        raise RecordingError(
            "the model's own output is not a number for the text that it is verified on, so "
            "nothing about its routing can be proved"
        )
    problems: dict[str, str | None] = {}
    for site in sites:
        entry = seen[site.info.module]
        output = _check_shapes(site, entry, input_ids.numel())
        problems[site.info.module] = site.record_only or _replay_problem(site, output, entry)
    replayed = [site for site in sites if problems[site.info.module] is None]
    found, noise = _writing_problems(model, replayed, input_ids, before)
    problems |= found
    for site in replayed:
        name = site.info.module
        if problems[name] is None:
            problems[name] = _influence_problem(model, site, seen[name], input_ids, before, noise)
    return [problems[site.info.module] for site in sites]


def _output(model: Any, input_ids: Tensor) -> Tensor:
    """Logits of a forward without cache, or the last hidden states of a model without a head."""
    inputs = {"input_ids": input_ids, "use_cache": False}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = input_ids
    found = model(**inputs)
    output = getattr(found, "logits", None)
    if output is None:
        output = found[0]
    if not isinstance(output, Tensor):
        raise RecordingError(
            f"{type(model).__name__} returns neither logits nor hidden states, so it cannot be "
            "seen whether its routing has any effect"
        )
    return output


@contextmanager
def _watching(sites: Sequence[RouterSite]) -> Iterator[dict[str, _Seen]]:
    """Capture what each router returns and what its experts are called with."""
    seen = {site.info.module: _Seen() for site in sites}
    with ExitStack() as stack:
        for site in sites:
            entry = seen[site.info.module]

            def on_router(
                _module: nn.Module,
                args: tuple[Any, ...],
                output: Any,
                site: RouterSite = site,
                entry: _Seen = entry,
            ) -> None:
                entry.router = site.form.read(site, args, output)
                try:
                    entry.inputs = site.form.inputs(site, args, output)
                except UnknownRoutingError as error:
                    entry.unknown = str(error)

            def on_experts(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                site: RouterSite = site,
                entry: _Seen = entry,
            ) -> None:
                entry.experts_called = True
                entry.arrived = site.form.arrived(site, args, kwargs)
                entry.counted = site.form.counted(site, args, kwargs)

            stack.callback(site.router.register_forward_hook(on_router).remove)
            stack.callback(
                site.experts.register_forward_pre_hook(on_experts, with_kwargs=True).remove
            )
        yield seen


def _check_shapes(site: RouterSite, seen: _Seen, num_tokens: int) -> RouterOutput:
    if seen.router is None:
        raise RecordingError(
            f"{site.where}: the router was not called; a fused kernel may have taken its place "
            f"(experts computed by: {site.info.implementation})"
        )
    if not seen.experts_called:
        raise RecordingError(
            f"{site.where}: the experts module was not called; a fused kernel may have taken its "
            f"place (experts computed by: {site.info.implementation})"
        )
    logits, weights, ids = seen.router
    expected = (num_tokens, site.info.num_experts), (num_tokens, site.info.top_k)
    if (
        tuple(logits.shape) != expected[0]
        or not tuple(weights.shape) == tuple(ids.shape) == (expected[1])
    ):
        raise RecordingError(
            f"{site.where}: the router returned shapes {tuple(logits.shape)}, "
            f"{tuple(weights.shape)}, {tuple(ids.shape)} instead of {expected[0]}, {expected[1]}, "
            f"{expected[1]}"
        )
    ordered = ids.sort(dim=-1).values
    if (
        (ordered[:, 1:] == ordered[:, :-1]).any()
        or ids.min() < 0
        or (ids.max() >= site.info.num_experts)
    ):
        raise RecordingError(f"{site.where}: expert ids repeat within a token or are out of range")
    if not _arrived_as_returned(site, seen, weights, ids):
        raise RecordingError(
            f"{site.where}: the experts were called with other ids or weights than the router "
            "returned"
        )
    return seen.router


def _arrived_as_returned(site: RouterSite, seen: _Seen, weights: Tensor, ids: Tensor) -> bool:
    """Whether the experts' own inputs say what the router returned."""
    if seen.arrived is not None:
        if not torch.equal(weights, seen.arrived[1]):
            return False
        used = weights != 0
        return torch.equal(ids[used], seen.arrived[0][used])
    if seen.counted is None:
        return True
    counts = torch.bincount(ids[weights != 0], minlength=site.info.num_experts)
    return torch.equal(counts, seen.counted.to(counts.device))


def _replay_problem(site: RouterSite, output: RouterOutput, seen: _Seen) -> str | None:
    if seen.unknown is not None:
        return seen.unknown
    try:
        weights, ids = select(output.logits, site.info.rule, None, **(seen.inputs or {}))
    except ValueError as error:
        return f"the rule cannot be applied: {error}"
    if site.info.rule.capacity is not None or site.info.rule.has_skip:
        # Slots that no expert serves have weight 0 on both sides, and no id.
        ids = torch.where(output.weights == 0, output.expert_ids, ids)
    if not torch.equal(ids, output.expert_ids):
        return "the rule selects other experts than the router did"
    if weights.dtype != output.weights.dtype or not torch.equal(weights, output.weights):
        return "the rule gives other routing weights than the router did"
    return None


def _writing_problems(
    model: nn.Module, sites: Sequence[RouterSite], input_ids: Tensor, before: Tensor
) -> tuple[dict[str, str | None], float]:
    """What goes wrong where each layer's own selection is written back, and the model's noise.

    The noise is the largest difference between two plain forwards, 0 where they are equal.
    """
    problems: dict[str, str | None] = {site.info.module: None for site in sites}
    with _replaced(sites, problems=problems), _watching(sites) as seen:
        after = _output(model, input_ids)
    for site in sites:
        entry, name = seen[site.info.module], site.info.module
        if entry.router is None or not _arrived_as_returned(site, entry, *entry.router[1:]):
            problems[name] = (
                problems[name] or "the experts do not get the selection that is written"
            )
    if torch.equal(after, before):
        return problems, 0.0
    noise = _distance(_output(model, input_ids), before)
    for site in sites if noise == 0 else ():
        if problems[site.info.module] is not None:
            continue
        with _replaced([site]):
            same = torch.equal(_output(model, input_ids), before)
        if not same:
            problems[site.info.module] = "writing the router's own selection changes the output"
    return problems, noise


@contextmanager
def _replaced(
    sites: Sequence[RouterSite],
    edits: Edits | None = None,
    problems: dict[str, str | None] | None = None,
) -> Iterator[None]:
    """Put what the rule selects after these edits in the place of the routers' outputs.

    `problems` gets an entry for each layer in which that is not what the router returned itself.
    """
    with ExitStack() as stack:
        for site in sites:

            def hook(
                _module: nn.Module, args: tuple[Any, ...], output: Any, site: RouterSite = site
            ) -> Any:
                logits = site.form.read(site, args, output).logits
                inputs = site.form.inputs(site, args, output)
                weights, ids = select(logits, site.info.rule, edits, **inputs)
                written = site.form.write(site, args, output, weights, ids)
                if problems is not None and not _same(written, output):
                    problems[site.info.module] = (
                        "the router's own selection, written, is not what the router returned"
                    )
                return written

            stack.callback(site.router.register_forward_hook(hook, prepend=True).remove)
        yield


def _same(one: Any, other: Any) -> bool:
    """Whether two router outputs are equal in every bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two outputs; entries that are infinite in both count as equal."""
    return float((one.float() - other.float()).abs().nan_to_num(nan=0.0).max())


def _influence_problem(
    model: nn.Module,
    site: RouterSite,
    seen: _Seen,
    input_ids: Tensor,
    before: Tensor,
    noise: float,
) -> str | None:
    if site.info.top_k == site.info.num_experts:
        return "all experts are selected for every token, so there is no routing to change"
    assert seen.router is not None
    _, weights, ids = seen.router
    used = torch.bincount(ids[weights != 0], minlength=site.info.num_experts)
    expert = int(used.argmax())
    masked = torch.zeros(site.info.num_experts, dtype=torch.bool, device=used.device)
    masked[expert] = True
    edits = Edits(mask_selection=masked)
    with _replaced([site], edits), _watching([site]) as watched:
        after = _output(model, input_ids)
    if not torch.equal(after.isfinite(), before.isfinite()):
        return "masking an expert makes the output infinite"
    if _distance(after, before) <= _TIMES_NOISE * noise:
        return "masking the most used expert does not change the output"
    counted = watched[site.info.module].counted
    if counted is not None and int(counted[expert]) != 0:
        return "an expert that is masked still gets tokens"
    return None
