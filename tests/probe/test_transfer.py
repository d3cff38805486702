"""Packing tensors into one buffer changes no bit of them."""

from __future__ import annotations

import torch

from moescope.probe.transfer import to_cpu


def test_every_dtype_and_shape_comes_back_bit_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, 5, generator=generator)
    tensors = [
        base.to(torch.bfloat16),
        base > 0,
        base,
        (base * 1000).to(torch.int16),
        base.double()[:, ::2],  # not contiguous
        (base * 1e6).long(),
        torch.empty(0, 3),
        base[0, 0],
        torch.tensor([float("nan"), float("-inf")]),
    ]
    moved = to_cpu(tensors)
    assert [tensor.dtype for tensor in moved] == [tensor.dtype for tensor in tensors]
    for before, after in zip(tensors, moved, strict=True):
        assert before.shape == after.shape
        assert torch.equal(
            before.contiguous().reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8)
        )


def test_one_buffer_holds_all_and_is_not_the_source() -> None:
    tensors = [torch.ones(3), torch.ones(4, dtype=torch.int64)]
    moved = to_cpu(tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
    tensors[0].zero_()
    assert moved[0].tolist() == [1, 1, 1]


def test_no_graph_is_kept_and_inference_tensors_become_usable() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not to_cpu([weight * 2])[0].requires_grad
    with torch.inference_mode():
        moved = to_cpu([torch.ones(3)])[0]
    assert not moved.is_inference()
    (weight * moved).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1, 1, 1]
