"""Moving the tensors of one forward to the CPU: one buffer and one copy per device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors on the CPU, without their graphs.

    All tensors of one device are packed into one buffer that is moved at once, so the number of
    layers does not decide how often a device is waited for. The copies share that buffer.

    Args:
        tensors: any shapes and dtypes, on any devices.

    Returns:
        As many, in the same order, of the same shapes and dtypes; never inference tensors.
    """
    members_of: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        members_of.setdefault(tensor.device, []).append(index)
    moved: list[Tensor] = [torch.empty(0)] * len(tensors)
    # Inference mode is left, so that what was recorded inside it can be used in a graph later.
    with torch.inference_mode(False), torch.no_grad():
        buffers = [_packed(tensors, members) for members in members_of.values()]
        for members, buffer in zip(members_of.values(), buffers, strict=True):
            _unpack(buffer.to("cpu"), tensors, members, moved)
    return moved


def _packed(tensors: Sequence[Tensor], members: list[int]) -> Tensor:
    """The bytes of some tensors of one device, one after the other, wide elements first.

    Each element size divides the wider ones before it, so that every tensor is aligned.
    """
    members.sort(key=lambda index: -tensors[index].element_size())
    return torch.cat([tensors[index].detach().reshape(-1).view(torch.uint8) for index in members])


def _unpack(
    buffer: Tensor, tensors: Sequence[Tensor], members: list[int], moved: list[Tensor]
) -> None:
    begin = 0
    for index in members:
        tensor = tensors[index]
        end = begin + tensor.numel() * tensor.element_size()
        moved[index] = buffer[begin:end].view(tensor.dtype).reshape(tensor.shape)
        begin = end
