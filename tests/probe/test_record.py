"""`record` against an independent capture at the input of the experts modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moescope.probe import record
from moescope.probe.errors import RecordingError

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
INPUTS = torch.arange(2, 26).reshape(2, 12)


@contextmanager
def captured_at_experts(model: Any) -> Iterator[dict[int, list[tuple[Any, Any]]]]:
    """What each layer's experts module is really called with; written without our own code."""
    calls: dict[int, list[tuple[Any, Any]]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts

        def hook(_m: Any, args: Any, index: int = index) -> None:
            calls.setdefault(index, []).append((args[1].clone(), args[2].clone()))

        handles.append(experts.register_forward_pre_hook(hook))
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_forward_and_generate_equal_the_experts_input(
    tiny_model: Callable[..., Any], family: str
) -> None:
    model = tiny_model(family)
    mask = torch.ones_like(INPUTS)
    mask[0, :5] = 0
    with captured_at_experts(model) as calls, record(model) as trace, torch.no_grad():
        model(input_ids=INPUTS, attention_mask=mask)
        model.generate(input_ids=INPUTS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert [info.layer for info in trace.layers] == [0, 1, 2]
    for layer in (0, 1, 2):
        ids = torch.cat([found[0] for found in calls[layer]])
        weights = torch.cat([found[1] for found in calls[layer]])
        assert torch.equal(trace[layer].expert_ids, ids)
        assert torch.equal(trace[layer].weights, weights)
        assert trace[layer].logits.shape == (len(ids), 8)
        assert len(ids) == 24 + 24 + 3 * 2


def test_recording_changes_nothing_and_leaves_nothing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        before = model(input_ids=INPUTS).logits
        with record(model) as trace:
            during = model(input_ids=INPUTS).logits
        assert torch.equal(before, during)
        model(input_ids=INPUTS)
    assert len(trace.forwards) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_exception_inside_leaves_no_hook(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    with pytest.raises(RuntimeError, match="mine"), record(model):
        raise RuntimeError("mine")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_routes_nothing_stops_the_forward(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(RecordingError, match=r"layer 1 .* routed nothing"), record(model):
        model(input_ids=INPUTS)


def test_reading_an_empty_trace_or_a_dense_layer_says_so(tiny_model: Callable[..., Any]) -> None:
    with record(tiny_model("olmoe")) as trace:
        pass
    with pytest.raises(RecordingError, match="the model was not called"):
        trace[0]
    with pytest.raises(KeyError, match="layer 9 has no router"):
        trace[9]
