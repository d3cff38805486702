"""The hooks behind `record`: one forward at a time, checked and moved to the CPU as it ends.

A *stack* is the module that holds a list of layers (`model`, `decoder`, `language_model`); its
name is what stands before the first number in a router's name. A *forward* is one outermost call
of the model or of a stack: `generate` calls an encoder alone, and people call `model.model`. When
it ends, each stack that ran must have routed the same number of rows in all of its layers. Routers
that sit side by side in one layer and share its tokens (text and vision experts) count together.

Nothing is recorded during a backward pass: gradient checkpointing runs layers again there.
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
from moescope.probe.errors import RecordingError
from moescope.probe.norms import ExpertNorms, NormWatcher, in_backward
from moescope.probe.routers import LayerInfo, RouterOutput, RouterSite
from moescope.probe.sums import LayerUsage
from moescope.probe.transfer import to_cpu

_LAYER_IN_NAME = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<list>\w+)\.(?P<layer>\d+)\.(?P<part>\w+)")


@dataclass(frozen=True)
class RoutedRows:
    """What one router decided in one forward, on the CPU; T rows, padding included.

    Attributes:
        weights: float[T, K].
        expert_ids: int16 or int32[T, K]; narrow, because there are many.
        logits: float[T, E], or None at level topk.
        is_token: bool[T], false on padding; None where that is not known.
        norms: what the selected experts put out, where it was measured.
    """

    weights: Tensor
    expert_ids: Tensor
    logits: Tensor | None = None
    is_token: Tensor | None = None
    norms: ExpertNorms | None = None


@dataclass(frozen=True)
class Forward:
    """One forward of the model.

    Attributes:
        rows: router's name -> what it decided; the routers of stacks that ran.
        shapes: router's name -> (batch, length) of its stack's input, where its rows are exactly
            those, row-major.
    """

    rows: Mapping[str, RoutedRows]
    shapes: Mapping[str, tuple[int, int]]


@dataclass
class _Stack:
    """A list of layers and the routers in it.

    Attributes:
        module: the module whose call runs the layers.
        groups: routers that count together, by layer and part of the layer.
        input_names: names of the positional arguments of its forward.
    """

    name: str
    module: nn.Module
    groups: dict[tuple[str, str], list[RouterSite]] = field(default_factory=dict)
    input_names: tuple[str, ...] = ()


@dataclass
class _Input:
    """What a stack was called with: (batch, length), and where its input is no padding."""

    shape: tuple[int, int]
    is_token: Tensor | None


class Recorder:
    """Collects one forward at a time and checks it when it ends."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RouterSite],
        *,
        level: str,
        watchers: Mapping[str, NormWatcher],
    ) -> None:
        self.model = model
        self.sites = sites
        self.level = level
        self.watchers = watchers
        self.stacks = _stacks(model, sites)
        self.active: list[nn.Module] = []
        self.failed = False
        self.calls: dict[str, list[RouterOutput]] = {}
        self.inputs: dict[str, list[_Input | None]] = {}

    def router_hook(self, site: RouterSite) -> Any:
        """The forward hook of one router."""
        info = site.info

        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            if in_backward():
                return
            if not self.active:
                raise RecordingError(
                    f"the router of {_where(info)} ran outside a forward of the model, so its rows "
                    "could not be tied to a forward; call the recorded model itself"
                )
            found = RouterOutput(*(part.detach() for part in site.form.read(site, args, output)))
            self.calls.setdefault(info.module, []).append(found)
            watcher = self.watchers.get(info.module)
            if watcher is not None:
                watcher.routed(found)

        return hook

    @contextmanager
    def following_forwards(
        self, forwards: list[Forward], sums: dict[str, LayerUsage]
    ) -> Iterator[None]:
        """Watch the model and its stacks, and keep each forward as it ends."""
        stack_of = {stack.module: stack for stack in self.stacks}

        def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not in_backward():
                self._begin(module, stack_of.get(module), args, kwargs)

        def ends(module: nn.Module, _args: Any, output: Any) -> None:
            if not in_backward() and self.active[-1:] == [module]:
                self._end(output, forwards, sums)

        with ExitStack() as exits:
            for module in {self.model: None, **dict.fromkeys(stack_of)}:
                begin = module.register_forward_pre_hook(begins, with_kwargs=True)
                exits.callback(begin.remove)
                end = module.register_forward_hook(ends, always_call=True)
                exits.callback(end.remove)
            yield

    def _begin(self, module: nn.Module, stack: _Stack | None, args: Any, kwargs: Any) -> None:
        if not self.active or module in self.active:  # the latter after an interrupted forward
            self.active = []
            self._forget()
        self.active.append(module)
        if stack is not None:
            named = {**dict(zip(stack.input_names, args, strict=False)), **kwargs}
            self.inputs.setdefault(stack.name, []).append(_input_of(named))

    def _end(self, output: Any, forwards: list[Forward], sums: dict[str, LayerUsage]) -> None:
        self.active.pop()
        self.failed = self.failed or output is None
        if self.active:
            return
        try:
            if not self.failed:
                self._keep(forwards, sums)
        finally:
            self._forget()

    def _forget(self) -> None:
        self.failed = False
        self.calls = {}
        self.inputs = {}
        for watcher in self.watchers.values():
            watcher.forget()

    def _keep(self, forwards: list[Forward], sums: dict[str, LayerUsage]) -> None:
        ran = [
            stack
            for stack in self.stacks
            if stack.name in self.inputs
            or any(site.info.module in self.calls for site in _sites_of(stack))
        ]
        if not any(site.info.module in self.calls for stack in ran for site in _sites_of(stack)):
            raise RecordingError(
                f"{_where(self.sites[0].info)} routed nothing in this forward, nor did any other"
            )
        shapes: dict[str, tuple[int, int]] = {}
        masks: dict[str, Tensor] = {}
        for stack in ran:
            num_rows = _check(stack, self.calls)
            given = _whole_input(self.inputs.get(stack.name, []), num_rows)
            for site in _sites_of(stack):
                rows = sum(len(call.expert_ids) for call in self.calls.get(site.info.module, []))
                if given is not None and rows == num_rows:
                    shapes[site.info.module] = given.shape
                    if given.is_token is not None:
                        masks[site.info.module] = given.is_token
        if self.level == "usage":
            self._add_sums(sums, masks)
        else:
            forwards.append(Forward(self._moved(masks), shapes))

    def _add_sums(self, sums: dict[str, LayerUsage], masks: Mapping[str, Tensor]) -> None:
        for site in self.sites:
            module = site.info.module
            for call in self.calls.get(module, []):
                mask = masks.get(module)
                on_device = None if mask is None else mask.to(call.expert_ids.device)
                found = LayerUsage.of(call, site.info, on_device)
                sums[module] = found.plus(sums.get(module))

    def _moved(self, masks: Mapping[str, Tensor]) -> dict[str, RoutedRows]:
        """This forward's rows on the CPU, in one transfer per device."""
        pieces: list[Tensor] = []
        places: list[tuple[str, str]] = []
        for site in self.sites:
            module = site.info.module
            if module not in self.calls:
                continue
            parts = _joined_calls(self.calls[module], site.info)
            if self.level == "topk":
                parts.pop("logits")
            watcher = self.watchers.get(module)
            if watcher is not None:
                parts.update(watcher.measured())
            for name, tensor in parts.items():
                places.append((module, name))
                pieces.append(tensor)
        distinct = list({id(mask): mask for mask in masks.values()}.values())
        moved = to_cpu([*pieces, *distinct])
        mask_of = {
            id(mask): copy for mask, copy in zip(distinct, moved[len(pieces) :], strict=True)
        }
        found: dict[str, dict[str, Tensor]] = {}
        for (module, name), tensor in zip(places, moved, strict=False):
            found.setdefault(module, {})[name] = tensor
        return {
            module: RoutedRows(
                weights=parts.pop("weights"),
                expert_ids=parts.pop("expert_ids"),
                logits=parts.pop("logits", None),
                is_token=mask_of[id(masks[module])] if module in masks else None,
                norms=ExpertNorms(**parts) if parts else None,
            )
            for module, parts in found.items()
        }


def _where(info: LayerInfo) -> str:
    return f"layer {info.layer} ({info.module})"


def _sites_of(stack: _Stack) -> Iterator[RouterSite]:
    for group in stack.groups.values():
        yield from group


def _stacks(model: nn.Module, sites: Sequence[RouterSite]) -> list[_Stack]:
    """The lists of layers that hold the routers, in the order of the routers."""
    modules = plain_modules(model)
    stacks: dict[str, _Stack] = {}
    for site in sites:
        found = _LAYER_IN_NAME.match(site.info.module)
        if found is None:
            raise RecordingError(
                f"router {site.info.module} has no layer number in its name, so it belongs to no "
                "list of layers"
            )
        name = found["stack"] or ""
        if name not in stacks:
            module = modules[name]
            names = tuple(inspect.signature(module.forward).parameters)
            stacks[name] = _Stack(name, module, input_names=names)
        key = (f"{found['list']}.{found['layer']}", found["part"])
        stacks[name].groups.setdefault(key, []).append(site)
    return list(stacks.values())


def _check(stack: _Stack, calls: Mapping[str, list[RouterOutput]]) -> int:
    """Every layer of a stack that ran must have routed, and the same number of rows each time."""
    expected: int | None = None
    for group in stack.groups.values():
        rows = [
            [len(call.expert_ids) for call in calls.get(site.info.module, [])] for site in group
        ]
        times = max(len(found) for found in rows)
        each = [sum(found[time] for found in rows if time < len(found)) for time in range(times)]
        info = group[0].info
        if sum(each) == 0:
            if info.kind == "mtp":  # runs only when the model guesses several tokens ahead
                continue
            raise RecordingError(f"{_where(info)} routed nothing in this forward")
        for found in each:
            if expected is not None and found != expected:
                raise RecordingError(
                    f"{_where(info)} routed {found} tokens where the layers before it routed "
                    f"{expected}"
                )
            expected = found
    return expected or 0


def _input_of(named: Mapping[str, Any]) -> _Input | None:
    """Shape and padding of a stack's input, by the names that transformers uses."""
    for name, num_dims in (("input_ids", 2), ("inputs_embeds", 3)):
        given = named.get(name)
        if isinstance(given, Tensor) and given.dim() == num_dims:
            shape = (given.shape[0], given.shape[1])
            return _Input(shape, _token_mask(named.get("attention_mask"), given))
    return None


def _token_mask(attention_mask: Any, given: Tensor) -> Tensor | None:
    """bool[batch * length]: the mask's last columns, which are those of this input.

    Without a mask all of the input is tokens; a mask of another form (4-D, by blocks) is not read.
    """
    batch, length = given.shape[0], given.shape[1]
    if attention_mask is None:
        return torch.ones(batch * length, dtype=torch.bool, device=given.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        return None
    return (attention_mask[:, attention_mask.shape[1] - length :] != 0).reshape(-1)


def _whole_input(given: Sequence[_Input | None], num_rows: int) -> _Input | None:
    """The input of a stack that was called once and whose every token passed the routers."""
    if len(given) != 1 or given[0] is None:
        return None
    batch, length = given[0].shape
    return given[0] if batch * length == num_rows else None


def _joined_calls(calls: Sequence[RouterOutput], info: LayerInfo) -> dict[str, Tensor]:
    """The rows of all calls of one router, ids narrowed."""
    narrow = torch.int16 if info.num_experts <= torch.iinfo(torch.int16).max else torch.int32
    joined = (
        RouterOutput(*(torch.cat(parts) for parts in zip(*calls, strict=True)))
        if (len(calls) > 1)
        else calls[0]
    )
    return {
        "weights": joined.weights,
        "expert_ids": joined.expert_ids.to(narrow),
        "logits": joined.logits,
    }
