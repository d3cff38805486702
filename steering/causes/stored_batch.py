"""What a forward of a batch leaves behind so that later ones can start in the middle of the model.

Letters: B rows, S columns, A columns of logits kept, V vocabulary, R reads of a row, T = B * S.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moescope.probe.bridges import plain_modules
from moescope.probe.models import ModelBundle
from moescope.probe.routers import RouterSite
from moescope.probe.routers.spec import RouterOutput
from moescope.steering.causes.ablated_router import AblatedRouter, Place, require_own_rule
from moescope.steering.causes.measuring import TargetBatch, batch_running
from moescope.steering.positions import PositionTracker

_LAYER = re.compile(r"^((?:.*?\.)?)(\d+)\.")


@dataclass(frozen=True)
class Stack:
    """The decoder layers around a router.

    Attributes:
        layers: all of them, in forward order.
        index: the one with the router.
        last_block: the block with the experts of the last one, where it has such.
    """

    layers: nn.ModuleList
    index: int
    last_block: nn.Module | None = None

    @property
    def layer(self) -> nn.Module:
        """The decoder layer with the router."""
        return self.layers[self.index]

    @property
    def is_last(self) -> bool:
        """Whether no layer follows it."""
        return self.index == len(self.layers) - 1


def stack_of(model: nn.Module, site: RouterSite, sites: Sequence[RouterSite]) -> Stack | None:
    """The list of layers that a router is in, or None where the model has no such list.

    Args:
        model: a transformers model.
        site: the router.
        sites: all routers of the model.
    """
    found = _LAYER.match(site.info.module)
    if found is None:
        return None
    layers = plain_modules(model).get(found[1].rstrip("."))
    if not isinstance(layers, nn.ModuleList):
        return None
    prefix = f"{found[1]}{len(layers) - 1}."
    blocks = [
        one.block for one in sites if one.info.module.startswith(prefix) and one.info.kind == "mlp"
    ]
    last = blocks[0] if blocks and blocks[0] is not layers[-1] else None
    return Stack(layers, int(found[2]), last)


@dataclass
class StoredSite:
    """What one router's layer did.

    Attributes:
        decision: what the router handed on, under the base plan; its logits are raw.
        inputs: what `select` needs beside the logits.
        places: where the base plan's interventions act, bool[T] each, or everywhere or nowhere.
        layer_input: float[B, S, D], what its decoder layer was called with.
        before: children of the decoder layer that were done before the router, and what they
            returned.
        block_output: what the block around the router returned.
        layer_output: what the decoder layer before it returned, None for the first.
    """

    decision: RouterOutput | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    layer_input: Tensor | None = None
    before: list[tuple[nn.Module, Any]] = field(default_factory=list)
    block_output: Any = None
    layer_output: Any = None


@dataclass
class StoredBatch:
    """A batch, what was read of it, and what its layers did.

    Attributes:
        batch: the rows.
        read: float32[B, R], the share of each read in its row's value.
        values: float32[B], the rows' values.
        sites: by the router's name.
        cache: keys and values of all layers, where the model takes them.
    """

    batch: TargetBatch
    read: Tensor
    values: Tensor
    sites: dict[str, StoredSite]
    cache: Any = None


def forward(
    bundle: ModelBundle,
    batch: TargetBatch,
    *,
    begin: int = 0,
    cache: Any = None,
    whole: bool = False,
) -> Tensor:
    """Logits of the last A columns, float[B, A, V], computing the columns from `begin` on.

    Args:
        bundle: model and tokenizer.
        batch: the rows; A is `batch.num_columns`.
        begin: columns before it are in the cache.
        cache: keys and values of these columns; filled further.
        whole: give the logits as the model does, where its unembedding computes others.
    """
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(bundle.model.forward).parameters:
        options["logits_to_keep"] = batch.num_columns
    if cache is not None:
        options["past_key_values"] = cache
    mask = batch.inputs.attention_mask
    output = bundle.model(
        input_ids=batch.inputs.input_ids[:, begin:],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, begin:],
        use_cache=cache is not None,
        **options,
    )
    logits: Tensor = output.logits
    return logits if whole else logits[:, -batch.num_columns :]


def store_batch(
    bundle: ModelBundle,
    batch: TargetBatch,
    prompt_ids: Sequence[int],
    routers: Mapping[str, AblatedRouter],
    stacks: Mapping[str, Stack | None],
    *,
    cache: Any = None,
) -> StoredBatch:
    """Run a batch once and keep what restarts need; called inside `steer` of the base plan.

    Args:
        bundle: model and tokenizer.
        batch: the rows.
        prompt_ids: of all prompts, by index.
        routers: by name, those whose experts will be taken out.
        stacks: the layers around each.
        cache: empty, where keys and values are wanted.

    Raises:
        PlanError: a router whose rule is not what it does.
    """
    sites = {name: StoredSite() for name in routers}
    tracker = PositionTracker(bundle.model)
    with ExitStack() as stack:
        stack.enter_context(batch_running(batch, prompt_ids))
        begin = bundle.model.register_forward_pre_hook(tracker.before_forward, with_kwargs=True)
        stack.callback(begin.remove)
        end = bundle.model.register_forward_hook(tracker.after_forward, always_call=True)
        stack.callback(end.remove)
        for name, router in routers.items():
            real_T = batch.inputs.attention_mask.reshape(-1) != 0
            stack.enter_context(_kept(router, sites[name], stacks[name], tracker, real_T))
        logits = forward(bundle, batch, cache=cache).float()
    read = reads_of(batch, logits)
    return StoredBatch(batch, read, batch.values(logits), sites, cache)


def reads_of(batch: TargetBatch, logits_BAV: Tensor) -> Tensor:
    """Each read's share of its row's value, float32[B, R]."""
    device = logits_BAV.device
    row_B1 = torch.arange(batch.num_rows, device=device)[:, None]
    columns_BR = batch.columns.to(device)
    chosen_BR = logits_BAV[row_B1, columns_BR, batch.tokens.to(device)]
    level_BR = logits_BAV.logsumexp(-1)[row_B1, columns_BR]
    return (chosen_BR - level_BR) * batch.factors.to(device)


@contextmanager
def _kept(
    router: AblatedRouter,
    kept: StoredSite,
    around: Stack | None,
    tracker: PositionTracker,
    real_T: Tensor,
) -> Iterator[None]:
    """Keep what one router's layer does in the forward inside the block."""
    site = router.site

    def on_own(_module: nn.Module, args: Any, output: Any) -> None:
        found = site.form.read(site, args, output)
        kept.inputs = site.form.inputs(site, args, output)
        if len(found.logits) == len(real_T):
            require_own_rule(site, found, kept.inputs, real_T)

    def on_router(_module: nn.Module, args: Any, output: Any) -> None:
        kept.decision = site.form.read(site, args, output)
        positions = tracker.of(site.info.kind)
        if router.base and positions is not None:
            kept.places = tuple(positions.rows(one.tokens, one.prompt_ids) for one in router.base)

    def on_layer(_module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        kept.layer_input = hidden if isinstance(hidden, Tensor) else None

    def on_previous(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.layer_output = output

    def on_child(module: nn.Module, _args: Any, output: Any) -> None:
        if kept.decision is None and "Norm" not in type(module).__name__:
            kept.before.append((module, output))

    def on_block(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.block_output = output

    with ExitStack() as stack:
        # Before all other hooks, so before steering: the router's own output.
        stack.callback(site.router.register_forward_hook(on_own, prepend=True).remove)
        stack.callback(site.router.register_forward_hook(on_router).remove)
        stack.callback(site.block.register_forward_hook(on_block).remove)
        if around is not None:
            before = around.layer.register_forward_pre_hook(on_layer, with_kwargs=True)
            stack.callback(before.remove)
            for child in around.layer.children():
                stack.callback(child.register_forward_hook(on_child).remove)
            if around.index:
                previous = around.layers[around.index - 1]
                stack.callback(previous.register_forward_hook(on_previous).remove)
        yield
