"""`record` on the ways in which models run: stacks, reuse, gradients, beams, padding, levels."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moescope.probe import record
from moescope.probe.errors import RecordingError
from moescope.probe.recording import Trace
from moescope.probe.zoo import tiny_model as zoo_model

INPUTS = torch.arange(2, 26).reshape(2, 12)


@contextmanager
def arrivals(experts: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Ids and weights of every call of one experts module, without our own code."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = experts.register_forward_pre_hook(
        lambda _m, args: found.append((args[1].clone(), args[2].clone()))
    )
    yield found
    handle.remove()


def test_two_routed_blocks_in_a_layer_are_told_apart() -> None:
    tiny = zoo_model("jetmoe")
    with record(tiny.model) as trace, torch.no_grad():
        tiny.model(**tiny.inputs)
    kinds = {(info.layer, info.kind) for info in trace.layers}
    assert {(0, "mlp"), (0, "attention")} <= kinds
    with pytest.raises(KeyError, match=r"layer 0 has 2 routers: say which"):
        trace[0]
    assert not torch.equal(trace[0, "mlp"].logits, trace[0, "attention"].logits)
    rows = tiny.inputs["input_ids"].numel()
    assert all(len(trace[info.layer, info.kind].expert_ids) == rows for info in trace.layers)


def test_encoder_and_decoder_have_rows_of_their_own() -> None:
    tiny = zoo_model("switch_transformers")
    ids = torch.arange(2, 16).reshape(2, 7)
    with record(tiny.model) as trace, torch.no_grad():
        tiny.model(input_ids=ids, decoder_input_ids=ids[:, :3])
    for info in trace.layers:
        rows = 14 if info.kind == "encoder" else 6
        assert len(trace[info.layer, info.kind].expert_ids) == rows, info
    assert {info.kind for info in trace.layers} == {"encoder", "mlp"}
    # generate runs the encoder alone, then the decoder token by token
    with record(tiny.model) as trace, torch.no_grad():
        tiny.model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    encoder = next(info for info in trace.layers if info.kind == "encoder")
    decoder = next(info for info in trace.layers if info.kind == "mlp")
    assert len(trace[encoder.layer, "encoder"].expert_ids) == 14
    assert len(trace[decoder.layer, "mlp"].expert_ids) == 4 * 2
    assert encoder.module not in trace.forwards[1].rows


def test_routers_that_see_a_part_of_the_tokens() -> None:
    """Ernie's text experts get the tokens of text; which these are is told by the processor."""
    tiny = zoo_model("ernie4_5_vl_moe+vision")
    marks = tiny.inputs["moe_mm_token_type_ids"].reshape(-1)
    assert 0 < int(marks.sum()) < len(marks)
    with record(tiny.model) as trace, torch.no_grad():
        tiny.model(**tiny.inputs)
    for info in trace.layers:
        layer, (forward,) = trace[info.layer, info.kind], trace.forwards
        rows = forward.rows[info.module]
        assert len(layer.expert_ids) == int((marks == 0).sum())
        assert rows.tokens.token_index is not None
        assert torch.equal(rows.tokens.token_index, (marks == 0).nonzero()[:, 0])
        assert layer.modality is not None and not layer.modality.any()
        assert layer.is_token is not None and layer.is_token.all()
        assert info.module not in forward.shapes


def test_modality_is_recorded_where_the_processor_tells_it() -> None:
    tiny = zoo_model("qwen3_vl_moe+whole")
    ids = torch.arange(5, 15)[None]
    marks = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 0, 0, 0]])
    with record(tiny.model) as trace, torch.no_grad():
        tiny.model(input_ids=ids, mm_token_type_ids=marks)
    info = trace.layers[0]
    assert torch.equal(trace[info.layer].modality, marks[0].to(torch.int8))
    with record(tiny.model) as trace, torch.no_grad():
        tiny.model(input_ids=ids)
    assert trace[info.layer].modality is None


def test_a_layer_used_twice_has_its_rows_twice(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    model.model.layers[2] = model.model.layers[1]
    with arrivals(model.model.layers[1].mlp.experts) as calls, record(model) as trace:
        model(input_ids=INPUTS, use_cache=False)
    assert [info.layer for info in trace.layers] == [0, 1]
    assert len(calls) == 2 and len(trace[0].expert_ids) == 24
    assert torch.equal(trace[1].expert_ids, torch.cat([ids for ids, _ in calls]))
    assert torch.equal(trace[1].weights, torch.cat([weights for _, weights in calls]))


def test_a_part_of_the_model_can_be_called_but_not_a_layer(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    with record(model) as trace, torch.no_grad():
        model.model(input_ids=INPUTS)
        assert len(trace[2].expert_ids) == 24
        with pytest.raises(RecordingError, match=r"layer 1 .* outside a forward of the model"):
            model.model.layers[1].mlp(torch.zeros(1, 2, model.config.hidden_size))


def test_a_failed_forward_is_forgotten(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    with record(model) as trace, torch.no_grad():
        with pytest.raises(IndexError):
            model(input_ids=INPUTS + 10_000)
        model(input_ids=INPUTS)
    assert len(trace.forwards) == 1 and len(trace[0].expert_ids) == 24


def test_gradients_flow_and_nothing_keeps_the_graph(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe").train()
    in_graph: list[weakref.ref[torch.Tensor]] = []
    model.model.layers[1].mlp.gate.register_forward_hook(
        lambda _m, _a, output: in_graph.append(weakref.ref(output[0]))
    )
    with record(model) as trace:
        loss = model(input_ids=INPUTS, labels=INPUTS).loss
        loss.backward(retain_graph=True)
    gradient = model.model.layers[0].mlp.gate.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert not any(
        tensor.requires_grad
        for forward in trace.forwards
        for rows in forward.rows.values()
        for tensor in (rows.weights, rows.logits)
        if tensor is not None
    )
    assert len(in_graph) == 1
    del loss
    gc.collect()
    assert in_graph[0]() is None, "the record keeps a tensor of the graph"


def test_gradient_checkpointing_does_not_record_the_second_run(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("olmoe").train()
    model.activation_checkpointing_enable()
    with record(model, norms=True) as trace:
        loss = model(input_ids=INPUTS, labels=INPUTS, use_cache=False).loss
        before = trace[1].expert_ids.clone()
        loss.backward()
    assert len(trace.forwards) == 1 and torch.equal(trace[1].expert_ids, before)


def test_inference_mode_gives_the_same_rows_usable_in_a_graph(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("olmoe")
    with record(model) as trace:
        with torch.inference_mode():
            model(input_ids=INPUTS)
        inside = trace[1]
        trace.clear()
        model(input_ids=INPUTS)
    assert torch.equal(inside.weights, trace[1].weights)
    scale = torch.ones((), requires_grad=True)
    (inside.weights * scale).sum().backward()


def test_bf16_is_recorded_as_it_is(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    with arrivals(model.model.layers[0].mlp.experts) as calls, record(model) as trace:
        model(input_ids=INPUTS)
    assert trace[0].weights.dtype == torch.bfloat16
    assert torch.equal(trace[0].weights, calls[0][1])
    assert torch.equal(trace[0].expert_ids, calls[0][0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_told_on_either_side(tiny_model: Callable[..., Any], side: str) -> None:
    model = tiny_model("olmoe")
    mask = torch.ones_like(INPUTS)
    mask[0, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    with record(model) as trace, torch.no_grad():
        model(input_ids=INPUTS, attention_mask=mask)
    assert torch.equal(trace[1].is_token, mask.bool().reshape(-1))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with record(model) as trace, torch.no_grad():
        model(input_ids=INPUTS, attention_mask=mask, position_ids=positions)
    row = INPUTS[0][mask[0].bool()]
    with record(model) as alone, torch.no_grad():
        model(input_ids=row[None])
    kept = trace[1].is_token.clone()
    kept[12:] = False
    assert torch.equal(trace[1].expert_ids[kept].sort(-1).values,
                       alone[1].expert_ids.sort(-1).values)  # fmt: skip
    assert alone[1].is_token is not None and alone[1].is_token.all()


def test_decoding_steps_are_tokens_too(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    mask = torch.ones_like(INPUTS)
    mask[0, :5] = 0
    with record(model) as trace, torch.no_grad():
        model.generate(input_ids=INPUTS, attention_mask=mask, max_new_tokens=3,
                       min_new_tokens=3, do_sample=False)  # fmt: skip
    expected = torch.cat([mask.bool().reshape(-1), torch.ones(2 * 2, dtype=torch.bool)])
    assert torch.equal(trace[0].is_token, expected)


def test_sampled_answers_with_several_returns_are_recorded(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    torch.manual_seed(0)
    with arrivals(model.model.layers[2].mlp.experts) as calls, record(model) as trace:
        model.generate(input_ids=INPUTS, max_new_tokens=3, min_new_tokens=3, do_sample=True,
                       num_return_sequences=3)  # fmt: skip
    assert torch.equal(trace[2].expert_ids, torch.cat([ids for ids, _ in calls]))
    assert [forward.shapes[trace.layers[0].module] for forward in trace.forwards] == [
        (6, 12), (6, 1), (6, 1),
    ]  # fmt: skip


def beam_search(model: Any) -> tuple[Trace, Any]:
    with record(model) as trace, torch.no_grad():
        found = model.generate(
            input_ids=INPUTS, attention_mask=torch.ones_like(INPUTS), max_new_tokens=6,
            min_new_tokens=6, do_sample=False, num_beams=4, num_return_sequences=2,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    return trace, found


def test_beams_are_told_apart(tiny_model: Callable[..., Any]) -> None:
    """Each returned sequence's rows are those of a forward over that sequence."""
    model = tiny_model("olmoe")
    trace, found = beam_search(model)
    rows = trace.sequence_rows(found.beam_indices)
    assert len(rows) == 4
    slots = {tuple(row.tolist()) for row in found.beam_indices}
    assert any(len(set(beam)) > 1 for beam in slots), "no beam ever changed its row"
    for row, sequence in zip(rows, found.sequences, strict=True):
        with record(model) as forced, torch.no_grad():
            model(input_ids=sequence[None, :-1])
        for layer in (0, 1, 2):
            assert torch.equal(
                trace[layer].expert_ids[row].sort(-1).values,
                forced[layer].expert_ids.sort(-1).values,
            )
            torch.testing.assert_close(
                trace[layer].weights[row].sort(-1).values,
                forced[layer].weights.sort(-1).values, atol=1e-5, rtol=0,
            )  # fmt: skip


def test_beams_of_another_call_are_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    _, found = beam_search(model)
    with record(model) as trace, torch.no_grad():
        model(input_ids=INPUTS)
    with pytest.raises(RecordingError, match="record one call of generate alone"):
        trace.sequence_rows(found.beam_indices)


def test_level_topk_keeps_no_logits(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    with record(model) as full, record(model, level="topk") as trace, torch.no_grad():
        model(input_ids=INPUTS)
    assert torch.equal(trace[0].expert_ids, full[0].expert_ids)
    assert torch.equal(trace[0].weights, full[0].weights)
    with pytest.raises(RecordingError, match=r'level="probs"'):
        trace[0].logits  # noqa: B018


def test_level_usage_sums_the_tokens_without_padding(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    mask = torch.ones_like(INPUTS)
    mask[0, :5] = 0
    with record(model) as full, record(model, level="usage") as sums, torch.no_grad():
        model.generate(input_ids=INPUTS, attention_mask=mask, max_new_tokens=3,
                       min_new_tokens=3, do_sample=False)  # fmt: skip
    for layer in (0, 1, 2):
        used, rows = sums.usage(layer), full[layer]
        keep = rows.is_token
        assert keep is not None
        ids, weights = rows.expert_ids[keep], rows.weights[keep]
        probs = torch.softmax(rows.logits[keep], dim=-1)
        assert int(used.tokens) == int(keep.sum()) == 24 - 5 + 4
        for expert in range(8):
            assert int(used.num_tokens[expert]) == int((ids == expert).sum())
            assert float(used.weight_sum[expert]) == pytest.approx(
                float(weights[ids == expert].sum()), abs=1e-5
            )
        torch.testing.assert_close(used.prob_sum.float(), probs.sum(0), atol=1e-5, rtol=0)
    with pytest.raises(RecordingError, match="keeps no rows"):
        sums[0]
    with pytest.raises(RecordingError, match="this is level probs"):
        full.usage(0)
