"""Norms of the selected experts against a direct computation from the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moescope.probe import record
from moescope.probe.errors import ModelInputError, RecordingError
from moescope.probe.zoo import tiny_model as zoo_model

INPUTS = torch.arange(2, 26).reshape(2, 12)


def seen_by_layers(model: Any, **inputs: Any) -> list[dict[str, Tensor]]:
    """What each layer's norm and routed block took and gave, without our own code."""
    found: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    handles = []
    for index, layer in enumerate(model.model.layers):
        norm, mlp = layer.post_attention_layernorm, layer.mlp

        def on_norm(_m: Any, args: Any, _o: Any, index: int = index) -> None:
            found[index]["residual"] = args[0].reshape(-1, args[0].shape[-1]).clone()

        def on_experts(_m: Any, args: Any, output: Any, index: int = index) -> None:
            found[index]["hidden"] = args[0].clone()
            found[index]["routed"] = output.clone()

        handles += [norm.register_forward_hook(on_norm),
                    mlp.experts.register_forward_hook(on_experts)]  # fmt: skip
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def expert_output(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """E(x) from the weights alone: gate and up side by side, SiLU, down."""
    with torch.no_grad():
        gate, up = F.linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, experts.down_proj[expert])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_norms_equal_a_direct_computation(
    tiny_model: Callable[..., Any], implementation: str
) -> None:
    model = tiny_model("qwen3_moe", norm_topk_prob=True)
    model.set_experts_implementation(implementation)
    with record(model, norms=True) as trace, torch.no_grad():
        with_norms = model(input_ids=INPUTS).logits
    assert torch.equal(with_norms, model(input_ids=INPUTS).logits)
    for index, seen in enumerate(seen_by_layers(model, input_ids=INPUTS)):
        norms, layer = trace[index].norms, trace[index]
        assert norms is not None
        for token in range(0, 24, 5):
            for slot in range(2):
                experts = model.model.layers[index].mlp.experts
                expert = layer.expert_ids[token, slot]
                out = expert_output(experts, int(expert), seen["hidden"][token])
                assert float(norms.output_norm[token, slot]) == pytest.approx(
                    float(out.norm()), rel=1e-4
                )
                assert float(norms.max_abs[token, slot]) == pytest.approx(
                    float(out.abs().max()), rel=1e-4
                )
        x, r = seen["residual"], seen["routed"]
        change = (1 - F.cosine_similarity(x, x + r, dim=-1)).clamp(min=0)
        torch.testing.assert_close(norms.residual_change, change, atol=1e-5, rtol=1e-4)


def test_only_selected_experts_are_evaluated(tiny_model: Callable[..., Any]) -> None:
    """An expert that is never selected may hold anything: nothing reads it."""
    model = tiny_model("olmoe")
    with record(model) as trace, torch.no_grad():
        model(input_ids=INPUTS[:, :2])
    unused = set(range(8)) - set(trace[1].expert_ids.flatten().tolist())
    assert unused
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[sorted(unused)] = torch.nan
    with record(model, norms=True) as trace, torch.no_grad():
        model(input_ids=INPUTS[:, :2])
    assert trace[1].norms is not None and torch.isfinite(trace[1].norms.output_norm).all()


@pytest.mark.parametrize(
    ("family", "change_is_known"),
    [
        ("gpt_oss", True),  # biases, transposed weights
        ("dbrx", False),  # its block selects, so what its norm reads is not seen
        ("longcat_flash", True),  # zero-computation experts
        ("gemma4", True),  # the experts hang on the layer itself
        ("flex_olmo", True),  # the norm comes after the block
        ("beam", True),  # the scale is applied in the block
        ("muse_spark", False),  # a norm after down_proj, and another width
        ("qwen4_exp", False),  # several residual streams, mixed before the block
    ],
)
def test_families_with_other_experts(family: str, change_is_known: bool) -> None:
    tiny = zoo_model(family)
    with record(tiny.model, norms=True) as trace, torch.no_grad():
        tiny.model(**tiny.inputs)
    for info in trace.layers:
        norms = trace[info.layer, info.kind].norms
        assert norms is not None
        assert (norms.output_norm > 0).all() and (norms.max_abs > 0).all()
        # a vector is at least as long as its largest value; Muse Spark norms it in between
        if family != "muse_spark":
            assert (norms.max_abs <= norms.output_norm * 1.0001).all()
        assert bool(torch.isfinite(norms.residual_change).all()) == change_is_known


def test_the_factor_of_the_block_counts() -> None:
    tiny = zoo_model("beam")
    with record(tiny.model, norms=True) as trace, torch.no_grad():
        tiny.model(**tiny.inputs)
    info = trace.layers[0]
    assert info.rule.scale_in_block and info.rule.scale != 1
    layer = tiny.model.get_submodule(info.module.rpartition(".mlp")[0])
    found: dict[str, Tensor] = {}
    handles = [
        layer.pre_feedforward_layernorm.register_forward_hook(
            lambda _m, args, _o: found.update(x=args[0].reshape(-1, args[0].shape[-1]))
        ),
        layer.mlp.experts.register_forward_hook(lambda _m, _a, out: found.update(r=out)),
    ]
    with torch.no_grad():
        tiny.model(**tiny.inputs)
    for handle in handles:
        handle.remove()
    x, r = found["x"], found["r"] * info.rule.scale
    norms = trace[info.layer, info.kind].norms
    assert norms is not None
    change = (1 - F.cosine_similarity(x, x + r, dim=-1)).clamp(min=0)
    torch.testing.assert_close(norms.residual_change, change, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama4", "Llama4TextExperts is called with"),
        ("doge", "DogeForCausalLM: Embedding is called with"),
        ("switch_transformers", "SwitchTransformersExperts is called with"),
        ("jetmoe", "JetMoe"),
    ],
)
def test_experts_that_cannot_be_run_alone_are_refused_by_name(family: str, words: str) -> None:
    tiny = zoo_model(family)
    with pytest.raises(ModelInputError, match=words), record(tiny.model, norms=True):
        raise AssertionError("the model was reached")


def test_experts_that_do_something_else_are_caught(tiny_model: Callable[..., Any]) -> None:
    """The outputs times their weights must add up to what the experts returned."""
    model = tiny_model("olmoe")
    experts = model.model.layers[1].mlp.experts
    own = experts.forward
    experts.forward = lambda hidden, ids, weights: own(hidden, ids, weights.square())
    with (
        pytest.raises(RecordingError, match=r"layer 1 .* do not add up"),
        record(model, norms=True),
        torch.no_grad(),
    ):
        model(input_ids=INPUTS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
