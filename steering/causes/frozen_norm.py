"""A norm with its scale held fixed, which makes it linear.

What a part of the residual stream becomes after a norm is only defined with the scale frozen at
that of the whole stream: `(c - mean(c)) * s / sigma(x)` for a part c of x, without the mean for
RMS norms. Whether a module centres, and whether it multiplies by its weight or by one plus it, is
not assumed but read off its own output, which the frozen form must repeat.

Letters: N positions, H width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FrozenNorm:
    """One norm at N positions.

    Attributes:
        scale: float64[H], what it multiplies by.
        bias: float64[H], what it adds; 0 where it has none.
        inverse: float64[N, 1], 1 / sigma of each position.
        is_centred: whether the mean is taken off first (LayerNorm).
    """

    scale: Tensor
    bias: Tensor
    inverse: Tensor
    is_centred: bool

    def __call__(self, part_NH: Tensor) -> Tensor:
        """What a part of the stream becomes, float64[N, H]; the bias belongs to no part."""
        if self.is_centred:
            part_NH = part_NH - part_NH.mean(-1, keepdim=True)
        return part_NH * self.scale * self.inverse


def is_norm(module: nn.Module) -> bool:
    """Whether a module calls itself a norm."""
    return "norm" in type(module).__name__.lower()


def frozen(
    norm: nn.Module, given_NH: Tensor, gave_NH: Tensor, tolerance: float
) -> FrozenNorm | None:
    """The norm frozen at what it took and gave; None where it is no norm of a known form.

    Args:
        norm: the module.
        given_NH: its input, float64[N, H].
        gave_NH: its output.
        tolerance: by how much the frozen form may miss the output, relative to its largest value.
    """
    weight = getattr(norm, "weight", None)
    own_bias = getattr(norm, "bias", None)
    bias = given_NH.new_zeros(given_NH.shape[-1])
    if isinstance(own_bias, Tensor):
        bias = own_bias.detach().to(bias)
    scales = [torch.ones_like(bias)]
    if isinstance(weight, Tensor):
        scales = [weight.detach().to(bias), 1 + weight.detach().to(bias)]
    for scale in scales:
        for is_centred in (False, True):
            one = FrozenNorm(scale, bias, given_NH.new_ones(len(given_NH), 1), is_centred)
            shape_NH, wanted_NH = one(given_NH), gave_NH - bias
            size_N1 = (shape_NH**2).sum(-1, keepdim=True).clamp(min=1e-300)
            inverse_N1 = (shape_NH * wanted_NH).sum(-1, keepdim=True) / size_N1
            missed = (shape_NH * inverse_N1 - wanted_NH).abs().max()
            if missed <= tolerance * gave_NH.abs().max() and (inverse_N1 >= 0).all():
                return FrozenNorm(scale, bias, inverse_N1, is_centred)
    return None
