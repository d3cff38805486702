"""The residual stream at chosen positions, split into what wrote it.

While a model runs, the outputs of each decoder layer's sublayers are kept at chosen positions, and
what the layer added to the stream is read as their sum: each after its post-norm where the layer
has one (scale frozen), times one factor for the layer (Granite's residual multiplier). The routed
experts' part of a sublayer is found by running it once more with their output set to 0. Nothing of
this is taken on trust: layers that do not add up are refused, so that the parts are the stream.

That covers layers of the form `x + attention + mlp`, pre-norm, post-norm or parallel. Not covered:
layers that keep several streams, rescale the stream (MiniMax), norm experts and shared experts
apart (Gemma 4), or run experts that cannot be called one at a time.

Letters: N positions, H width, T rows of the router, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moescope.probe.bridges import plain_modules, underlying
from moescope.probe.errors import ModelInputError
from moescope.probe.norms import why_no_norms
from moescope.probe.routers import RouterSite
from moescope.steering.causes.frozen_norm import FrozenNorm, frozen, is_norm

#: By how much sums may miss the whole, relative to its largest value.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 0.03


@dataclass(frozen=True)
class StreamPart:
    """What one component wrote into the stream.

    Attributes:
        part: `embedding`, `attention`, `shared`, `expert`, or a dense sublayer's name.
        layer: decoder layer, or None for the embedding.
        expert: for each position the expert, int64[N], where the part is one slot of the experts.
        written: float64[N, H], in the stream's own units.
    """

    part: str
    layer: int | None
    expert: Tensor | None
    written: Tensor


@dataclass
class _Sublayer:
    """A child of a decoder layer that ran: its output, and the norm after it."""

    name: str
    output: Tensor
    now: Tensor
    norm: FrozenNorm | None = None


@dataclass
class _Routed:
    """What the experts of one layer took and gave at the positions.

    Attributes:
        output: float64[N, H], before anything that the block does to it.
        slots: float64[N, K, H], each expert's output times its weight.
        ids: int64[N, K].
        call: arguments of the sublayer that holds them.
    """

    output: Tensor
    slots: Tensor
    ids: Tensor
    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@dataclass
class StreamReader:
    """Splits the stream of a model at positions, forward by forward.

    Attributes:
        model: a transformers model.
        sites: its routers.
        pick: takes the positions from a tensor [B, S, H] of a forward, giving [N, H].
        parts: of the last forward.
        final: the final norm, frozen at the positions.
    """

    model: nn.Module
    sites: Sequence[RouterSite]
    pick: Callable[[Tensor], Tensor]
    parts: list[StreamPart] = field(default_factory=list)
    final: FrozenNorm | None = None
    _shape: tuple[int, int] = (0, 0)
    _given: Tensor | None = None
    _last: Tensor | None = None
    _sublayers: list[_Sublayer] = field(default_factory=list)
    _routed: _Routed | None = None
    _call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    _muted: bool = False

    @property
    def tolerance(self) -> float:
        """See `_TOLERANCE`."""
        dtype = next(self.model.parameters()).dtype
        return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read one forward inside the block.

        Raises:
            ModelInputError: the stream of this model cannot be split; says where and why.
        """
        self.parts, self.final = [], None
        with ExitStack() as stack:
            for hook in self._hooks():
                stack.callback(hook.remove)
            yield
        self._given = self._last = self._routed = None
        if self.final is None:
            raise self._refused("no final norm was seen after the last layer")

    def _hooks(self) -> Iterator[Any]:
        modules = plain_modules(underlying(self.model))
        by_layer = {site.info.layer: site for site in self.sites if site.info.kind == "mlp"}
        first = next(iter(by_layer.values()), None)
        if first is None:
            raise self._refused("it has no routed feed-forward layer")
        parts = first.info.module.split(".")
        at = next(index for index, part in enumerate(parts) if part.isdigit())
        layers = list(modules[".".join(parts[:at])].children())
        for number, layer in enumerate(layers):
            site = by_layer.get(number)
            yield layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
            holder = None
            for name, child in layer.named_children():
                yield child.register_forward_hook(self._child_hook(name))
                if site is not None and site.router in set(child.modules()):
                    holder = child
                    yield child.register_forward_pre_hook(self._before_holder, with_kwargs=True)
            if site is not None:
                if holder is None or holder is site.experts or holder is site.router:
                    raise self._refused("its router and experts hang on the layer itself", number)
                reason = why_no_norms(site)
                if reason is not None or hasattr(site.experts, "identity_expert"):
                    raise self._refused(reason or "its experts cannot be run one at a time", number)
                yield site.experts.register_forward_hook(self._experts_hook(site), with_kwargs=True)
            yield layer.register_forward_hook(self._layer_hook(number, site, holder))
        for child in modules[".".join(parts[: at - 1])].children():
            if is_norm(child):
                yield child.register_forward_hook(self._after_final_norm)

    def _refused(self, why: str, layer: int | None = None) -> ModelInputError:
        where = "" if layer is None else f"layer {layer} of "
        return ModelInputError(
            f"{where}{type(self.model).__name__}: what experts write into the residual stream "
            f"cannot be read, because {why}"
        )

    def _at(self, tensor: Tensor) -> Tensor:
        """A tensor of this forward at the positions, float64[N, H] on the CPU."""
        tensor = tensor.detach().reshape(*self._shape, -1)
        return self.pick(tensor).double().cpu()

    def _before_layer(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        given = _first_tensor(args, kwargs)
        if given is None or given.dim() != 3:
            raise self._refused("its layers do not take one stream [batch, tokens, width]")
        self._shape = given.shape[0], given.shape[1]
        if not self.parts:
            self.parts.append(StreamPart("embedding", None, None, self._at(given)))
        self._given, self._sublayers, self._routed = given, [], None

    def _before_holder(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._muted:
            self._call = args, kwargs

    def _child_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            gave = output[0] if isinstance(output, tuple) else output
            if self._muted or not isinstance(gave, Tensor):
                return
            took = _first_tensor(args, {})
            after = [one for one in self._sublayers if took is not None and _same(one.now, took)]
            if after and _same(after[0].now, gave):  # dropout, switched off
                return
            if not is_norm(module):
                self._sublayers.append(_Sublayer(name, gave, gave))
            elif after and took is not None:
                norm = frozen(module, self._at(took), self._at(gave), self.tolerance)
                if norm is None or after[0].norm is not None:
                    raise self._refused(f"{type(module).__name__} is no norm of a known form")
                after[0].norm, after[0].now = norm, gave

        return hook

    def _experts_hook(self, site: RouterSite) -> Any:
        experts: Any = site.experts

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self._muted:
                return torch.zeros_like(output)
            arrived = site.form.arrived(site, args, kwargs)
            hidden = _first_tensor(args, kwargs)
            if arrived is None or hidden is None or not isinstance(output, Tensor):
                raise self._refused("what its experts receive cannot be read", site.info.layer)
            num_rows = self._shape[0] * self._shape[1]
            if hidden.numel() // hidden.shape[-1] != num_rows or len(arrived[0]) != num_rows:
                raise self._refused("its experts see some tokens only", site.info.layer)
            ids_NK, weight_NK, x_NH = (
                self.pick(one.reshape(*self._shape, -1)) for one in (*arrived, hidden)
            )
            num, top_k = ids_NK.shape
            ones = weight_NK.new_ones(num * top_k, 1)
            # Not `experts(...)`: hooks, ours and others', are for the model's own call.
            out = experts.forward(x_NH.repeat_interleave(top_k, dim=0), ids_NK.reshape(-1, 1), ones)
            slots = out.reshape(num, top_k, -1).double().cpu() * weight_NK[..., None].double().cpu()
            whole = self._at(output)
            if (slots.sum(1) - whole).abs().max() > self.tolerance * slots.abs().max():
                raise self._refused("the experts' outputs do not add up", site.info.layer)
            self._routed = _Routed(whole, slots, ids_NK.cpu(), self._call)
            return None

        return hook

    def _layer_hook(self, number: int, site: RouterSite | None, holder: nn.Module | None) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            assert self._given is not None
            moved_NH = self._at(out) - self._at(self._given)
            written = [self._at(one.now) for one in self._sublayers]
            total_NH = torch.stack(written).sum(0) if written else torch.zeros_like(moved_NH)
            if total_NH.shape != moved_NH.shape:
                raise self._refused("its sublayers work in another width", number)
            factor = _factor(moved_NH, total_NH)
            limit = self.tolerance * max(float(self._at(out).abs().max()), 1e-6)
            if float((total_NH * factor - moved_NH).abs().max()) > limit:
                raise self._refused("the layer is not the stream plus its sublayers", number)
            holder_name = None if holder is None else site and _name_in(_module, holder)
            for one, wrote_NH in zip(self._sublayers, written, strict=True):
                if site is not None and holder is not None and one.name == holder_name:
                    self._split_routed(number, one, wrote_NH, holder, factor)
                else:
                    part = "attention" if "att" in one.name else one.name
                    self.parts.append(StreamPart(part, number, None, wrote_NH * factor))
            self._last, self._sublayers, self._routed = out, [], None

        return hook

    def _split_routed(
        self, number: int, one: _Sublayer, wrote_NH: Tensor, holder: nn.Module, factor: float
    ) -> None:
        """The sublayer with the experts: each slot, and the rest, which is the shared experts."""
        routed = self._routed
        if routed is None:
            raise self._refused("its experts did not run where their sublayer did", number)
        args, kwargs = routed.call
        self._muted = True
        try:
            without = holder(*args, **kwargs)
        finally:
            self._muted = False
        without = without[0] if isinstance(without, tuple) else without
        from_experts_NH = self._at(one.output) - self._at(without)
        inner = _factor(from_experts_NH, routed.output)
        limit = self.tolerance * max(float(self._at(one.output).abs().max()), 1e-6)
        if float((routed.output * inner - from_experts_NH).abs().max()) > limit:
            raise self._refused("its block does more than add the experts' output", number)

        def after(part_NH: Tensor) -> Tensor:
            return (part_NH if one.norm is None else one.norm(part_NH)) * factor

        rest_NH = wrote_NH * factor
        for slot in range(routed.ids.shape[1]):
            slot_NH = after(routed.slots[:, slot] * inner)
            rest_NH = rest_NH - slot_NH
            self.parts.append(StreamPart("expert", number, routed.ids[:, slot], slot_NH))
        self.parts.append(StreamPart("shared", number, None, rest_NH))

    def _after_final_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        took = _first_tensor(args, {})
        if took is None or self._last is None or not _same(took, self._last):
            return
        self.final = frozen(module, self._at(took), self._at(output), self.tolerance)
        if self.final is None:
            raise self._refused(f"{type(module).__name__} is no norm of a known form")


def _factor(whole: Tensor, part: Tensor) -> float:
    """The number that the part is times to be the whole; exactly 1 where it is that nearly."""
    size = float((part * part).sum())
    found = float((whole * part).sum()) / size if size else 1.0
    return 1.0 if abs(found - 1.0) < 1e-4 else found


def _name_in(layer: nn.Module, child: nn.Module) -> str | None:
    return next((name for name, one in layer.named_children() if one is child), None)


def _first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    return next((part for part in [*args, *kwargs.values()] if isinstance(part, Tensor)), None)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, shapes aside."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
