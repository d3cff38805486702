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
from moescope.probe.tokens import RowTokens, StackInput, stack_input
from moescope.probe.transfer import to_cpu

_LAYER_IN_NAME = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<list>\w+)\.(?P<layer>\d+)\.(?P<part>\w+)")


@dataclass(frozen=True)
class RoutedRows:
    """What one router decided in one forward, on the CPU; T rows, padding included.

    Attributes:
        weights: float[T, K].
        expert_ids: int16 or int32[T, K]; narrow, because there are many.
        logits: float[T, E], or None at level topk.
        tokens: which tokens they are.
        norms: what the selected experts put out, where it was measured.
    """

    weights: Tensor
    expert_ids: Tensor
    logits: Tensor | None = None
    tokens: RowTokens = field(default_factory=RowTokens)
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
        self.outer: Mapping[str, Any] = {}
        self.failed = False
        self.calls: dict[str, list[RouterOutput]] = {}
        self.inputs: dict[str, list[StackInput | None]] = {}

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
        if not self.active:
            self.outer = kwargs
        self.active.append(module)
        if stack is not None:
            named = {**dict(zip(stack.input_names, args, strict=False)), **kwargs}
            self.inputs.setdefault(stack.name, []).append(stack_input(named, self.outer))

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
        self.outer = {}
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
        inputs: dict[str, StackInput] = {}
        for stack in ran:
            _check(stack, self.calls)
            given = _single(self.inputs.get(stack.name, []))
            if given is not None:
                inputs.update({site.info.module: given for site in _sites_of(stack)})
        if self.level == "usage":
            self._add_sums(sums, inputs)
            return
        rows = self._moved(inputs)
        shapes = {
            module: inputs[module].shape
            for module, found in rows.items()
            if module in inputs and inputs[module].num_tokens == len(found.expert_ids)
        }
        forwards.append(Forward(rows, shapes))

    def _add_sums(self, sums: dict[str, LayerUsage], inputs: Mapping[str, StackInput]) -> None:
        for site in self.sites:
            module = site.info.module
            if module not in self.calls:
                continue
            joined = _joined(self.calls[module])
            is_token = None
            if module in inputs:
                is_token = inputs[module].of_rows(len(joined.expert_ids)).is_token
            if is_token is not None:
                is_token = is_token.to(joined.expert_ids.device)
            sums[module] = LayerUsage.of(joined, site.info, is_token).plus(sums.get(module))

    def _moved(self, inputs: Mapping[str, StackInput]) -> dict[str, RoutedRows]:
        """This forward's rows on the CPU, in one transfer per device."""
        pieces: list[Tensor] = []
        places: list[tuple[str, str]] = []
        for site in self.sites:
            module = site.info.module
            if module not in self.calls:
                continue
            parts = _narrowed(_joined(self.calls[module]), site.info)
            if self.level == "topk":
                parts.pop("logits")
            watcher = self.watchers.get(module)
            if watcher is not None:
                parts.update(watcher.measured())
            for name, tensor in parts.items():
                places.append((module, name))
                pieces.append(tensor)
        distinct = list({id(given): given for given in inputs.values()}.values())
        masks = [
            mask for given in distinct for mask in (given.is_token, given.modality)
            if mask is not None
        ]  # fmt: skip
        moved = to_cpu([*pieces, *masks])
        copies = iter(moved[len(pieces) :])
        on_cpu = {
            id(given): StackInput(
                given.shape,
                None if given.is_token is None else next(copies),
                None if given.modality is None else next(copies),
            )
            for given in distinct
        }
        found: dict[str, dict[str, Tensor]] = {}
        for (module, name), tensor in zip(places, moved, strict=False):
            found.setdefault(module, {})[name] = tensor
        num_rows = {module: len(parts["expert_ids"]) for module, parts in found.items()}
        return {
            module: RoutedRows(
                weights=parts.pop("weights"),
                expert_ids=parts.pop("expert_ids"),
                logits=parts.pop("logits", None),
                tokens=on_cpu[id(inputs[module])].of_rows(num_rows[module])
                if module in inputs
                else RowTokens(),
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


def _check(stack: _Stack, calls: Mapping[str, list[RouterOutput]]) -> None:
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


def _single(given: Sequence[StackInput | None]) -> StackInput | None:
    """The input of a stack that was called once in this forward."""
    return given[0] if len(given) == 1 else None


def _joined(calls: Sequence[RouterOutput]) -> RouterOutput:
    """The rows of all calls of one router, one call after the other."""
    if len(calls) == 1:
        return calls[0]
    return RouterOutput(*(torch.cat(parts) for parts in zip(*calls, strict=True)))


def _narrowed(output: RouterOutput, info: LayerInfo) -> dict[str, Tensor]:
    """A router's values by name, ids in as few bytes as they need."""
    narrow = torch.int16 if info.num_experts <= torch.iinfo(torch.int16).max else torch.int32
    return {
        "weights": output.weights,
        "expert_ids": output.expert_ids.to(narrow),
        "logits": output.logits,
    }
