"""Parts of one model put into another of the same architecture, in place, and taken out again.

A part is an expert (all its weights), a router (all of it, or the rows of one expert with their
entries of the selection bias), or both, of one expert, one layer or all layers. Weights come back
on leaving, also through an exception.

Letters: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moescope.probe.bridges import plain_modules, underlying
from moescope.probe.errors import InputError
from moescope.probe.routers import RouterSite, find_routers

#: Which weights of a part are exchanged.
SwapWhat = Literal["experts", "routers", "both"]
WHATS: tuple[SwapWhat, ...] = ("experts", "routers", "both")


@dataclass(frozen=True)
class SwapPart:
    """What is exchanged.

    Attributes:
        what: the experts' weights, the routers', or both.
        layer: decoder layer; None for all routed layers.
        expert: one expert of it with its router rows; None for all of them and what they share.
        kind: which router of the layer, where there are several kinds.
    """

    what: SwapWhat
    layer: int | None = None
    expert: int | None = None
    kind: str = "mlp"

    def __post_init__(self) -> None:
        """Refuse an expert of no layer."""
        if self.what not in WHATS:
            raise InputError(f"a swap is of {', '.join(WHATS)}, not of {self.what!r}")
        if self.layer is None and self.expert is not None:
            raise InputError(f"expert {self.expert} needs the layer that it is of")


@contextmanager
def swapped(host: nn.Module, donor: nn.Module, parts: Sequence[SwapPart]) -> Iterator[None]:
    """Give the host the donor's parts while the block runs.

    Args:
        host: a transformers model, or a TransformerLens bridge around one.
        donor: another of the same architecture.
        parts: what is exchanged.

    Raises:
        InputError: the models are not of one architecture, or a part is not there.
    """
    with Exchange(host, donor).swapped(parts):
        yield


class _Weight(NamedTuple):
    """A weight of the host and the same of the donor.

    Attributes:
        what: whose it is, `experts` or `routers`.
        host: tensor of the host; its first dimension runs over experts unless it is shared.
        donor: that of the donor.
        is_shared: whether all experts of the layer share it.
    """

    what: str
    host: Tensor
    donor: Tensor
    is_shared: bool


class Exchange:
    """Two models of one architecture, and which of their weights are whose.

    Args:
        host: the model that gets weights.
        donor: the one that they are taken from.

    Raises:
        InputError: the models are not of one architecture, or weights of single experts cannot be
            told apart.
    """

    def __init__(self, host: nn.Module, donor: nn.Module) -> None:
        self.host, self.donor = underlying(host), underlying(donor)
        require_same_shape(self.host, self.donor)
        self.weights: dict[tuple[int, str], list[_Weight]] = {}
        self.num_experts: dict[tuple[int, str], int] = {}
        for own, other in zip(find_routers(self.host), find_routers(self.donor), strict=True):
            key = own.info.layer, own.info.kind
            self.num_experts[key] = own.info.num_experts
            self.weights[key] = [*_router_weights(own, other), *_expert_weights(own, other)]

    def max_abs_difference(self, part: SwapPart) -> float:
        """The largest absolute difference between the models in a part; 0 where they are equal."""
        largest = 0.0
        for own, other in self._pairs(part):
            there = other.detach().to(own.device)
            if not torch.equal(own, there):
                gap = (own.detach().double() - there.double()).abs().max()
                largest = max(largest, float(gap.nan_to_num(nan=torch.inf)))
        return largest

    @contextmanager
    def swapped(self, parts: Sequence[SwapPart]) -> Iterator[None]:
        """Give the host the donor's parts while the block runs; see `swapped`."""
        pairs = [pair for part in parts for pair in self._pairs(part)]
        saved: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for own, other in pairs:
                    saved.append((own, own.detach().clone()))
                    own.copy_(other)
            yield
        finally:
            with torch.no_grad():
                for own, before in reversed(saved):
                    own.copy_(before)

    def _pairs(self, part: SwapPart) -> list[tuple[Tensor, Tensor]]:
        """Views of the host's and the donor's weights of a part."""
        keys = [key for key in self.weights if key[1] == part.kind and part.layer in (None, key[0])]
        if not keys:
            where = "no layer has a" if part.layer is None else f"layer {part.layer} has no"
            known = ", ".join(f"{layer} ({kind})" for layer, kind in self.weights)
            raise InputError(f"{where} router of kind {part.kind!r}; the routed layers are {known}")
        found = [
            weight
            for key in keys
            for weight in self.weights[key]
            if part.what in ("both", weight.what)
        ]
        if part.expert is None:
            return [(weight.host, weight.donor) for weight in found]
        return self._of_expert(part, found, self.num_experts[keys[0]])

    def _of_expert(
        self, part: SwapPart, found: Sequence[_Weight], num_experts: int
    ) -> list[tuple[Tensor, Tensor]]:
        """The rows of one expert."""
        assert part.expert is not None
        if not 0 <= part.expert < num_experts:
            raise InputError(
                f"layer {part.layer} has experts 0 to {num_experts - 1}, and no expert "
                f"{part.expert}"
            )
        own = [weight for weight in found if not weight.is_shared]
        if part.what != "experts" and not any(weight.what == "routers" for weight in own):
            raise InputError(
                f"the router of layer {part.layer} has no row for each expert, so only the whole "
                "of it can be swapped"
            )
        # An expert without weights (it returns its input, or nothing) has router rows alone.
        return [
            (weight.host[part.expert], weight.donor[part.expert])
            for weight in own
            if part.expert < len(weight.host)
        ]


def require_same_shape(host: nn.Module, donor: nn.Module) -> None:
    """Refuse two models that are not of one architecture.

    Raises:
        InputError: classes, or names or shapes of weights differ; names the first difference.
    """
    if type(host) is not type(donor):
        raise InputError(
            f"only models of one architecture can swap parts, and these are "
            f"{type(host).__name__} and {type(donor).__name__}"
        )
    own, other = _shapes(host), _shapes(donor)
    for name in [*own, *other]:
        if own.get(name) != other.get(name):
            raise InputError(
                f"only models of one architecture can swap parts, and {name} has shape "
                f"{own.get(name, 'none')} in one and {other.get(name, 'none')} in the other"
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.{own}": tuple(tensor.shape)
        for name, module in plain_modules(model).items()
        for own, tensor in _own_tensors(module)
    }


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights and kept buffers that hang on this module itself, by name."""
    buffers = [
        (name, tensor)
        for name, tensor in module._buffers.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]
    weights = [(name, one) for name, one in module._parameters.items() if one is not None]
    return [*weights, *buffers]


def _tensors(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """All weights and kept buffers inside modules, by name; each tensor once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for number, module in enumerate(modules):
        for name, inside in plain_modules(module).items():
            for own, tensor in _own_tensors(inside):
                found.setdefault(id(tensor), (f"{number}.{name}.{own}", tensor))
    return dict(found.values())


def _router_weights(own: RouterSite, other: RouterSite) -> list[_Weight]:
    """A router's rows, its selection bias wherever it hangs, and what the rows share."""
    pairs = list(_paired([own.router], [other.router], own.where).values())
    if own.bias is not None and other.bias is not None:
        # The bias as the rule reads it, one number an expert, whatever shape it is kept in.
        pairs = [pair for pair in pairs if pair[0].data_ptr() != own.bias.data_ptr()]
        pairs.append((own.bias, other.bias))
    size = own.info.num_experts
    return [
        _Weight("routers", one, two, is_shared=one.dim() == 0 or len(one) != size)
        for one, two in pairs
    ]


def _expert_weights(own: RouterSite, other: RouterSite) -> list[_Weight]:
    """The experts' weights, with experts first where they are those of single experts."""
    in_router = {tensor.data_ptr() for tensor in _tensors([own.router]).values()}
    if own.bias is not None:
        in_router.add(own.bias.data_ptr())
    pairs = _paired(own.expert_modules, other.expert_modules, own.where)
    rule = own.info.rule
    real = rule.num_experts - rule.num_zero_experts - int(rule.has_skip)
    found = []
    for name, (one, two) in pairs.items():
        if one.data_ptr() in in_router:
            continue
        size = len(one) if one.dim() and len(one) in (real, rule.num_experts) else real
        if one.dim() > 1 and len(one) != size and len(one) % size == 0:  # rows expert by expert
            one, two = (part.view(size, len(part) // size, *part.shape[1:]) for part in (one, two))
        is_shared = one.dim() == 0 or len(one) != size
        if is_shared and one.dim() > 1:
            raise InputError(
                f"{own.where}: the experts' weight {name} has shape {tuple(one.shape)}, in which "
                f"{size} experts cannot be told apart, so they cannot be swapped"
            )
        found.append(_Weight("experts", one, two, is_shared))
    return found


def _paired(
    own: Sequence[nn.Module], other: Sequence[nn.Module], where: str
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """The same weights of both models, by name."""
    ours, theirs = _tensors(own), _tensors(other)
    for tensor in (*ours.values(), *theirs.values()):
        if tensor.is_meta:
            raise InputError(f"{where}: its weights are not in memory, so they cannot be swapped")
    return {name: (tensor, theirs[name]) for name, tensor in ours.items()}
