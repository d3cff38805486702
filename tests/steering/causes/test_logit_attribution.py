"""Direct logit attribution: parts sum to the logits, by hand, planted, and as TransformerLens."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from moescope.probe.demo.planted import SENSITIVE_WORDS, attention_refusal, expert_refusal
from moescope.probe.errors import InputError, ModelInputError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.probe.zoo.build import tiny_model
from moescope.steering.causes.frozen_norm import frozen
from moescope.steering.causes.logit_attribution import attribute_logits
from moescope.steering.causes.targets import (
    Custom,
    LogitDifference,
    Read,
    TargetRow,
    target_rows,
)


class Padding:
    """All that is needed of a tokenizer where rows are given as ids."""

    pad_token_id = 0

    def decode(self, ids: list[int]) -> str:
        return str(ids)


def prompts(count: int) -> list[RenderedPrompt]:
    """Prompts whose rows are given by hand."""
    return [
        RenderedPrompt(Prompt(prompt_id=at, text="t", set_name="t"), "t", (), (), (), ())
        for at in range(count)
    ]


def given_rows(tokens: torch.Tensor) -> list[TargetRow]:
    """A long row with three reads at two columns, and a shorter one: padding."""
    one, two = tokens[0].tolist(), tokens[1][:9].tolist()
    reads = (Read(1, 7, 1.0), Read(1, 9, -1.0), Read(2, 5, 0.5))
    return [
        TargetRow(0, tuple(one), len(one), reads, 2),
        TargetRow(1, tuple(two), len(two), (Read(1, 7, 1.0),), 1),
    ]


FAMILIES = (
    "mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "phimoe", "flex_olmo", "cohere2_moe",
    "granitemoe",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parts_together_are_the_logits(family: str) -> None:
    tiny = tiny_model(family)
    if family == "granitemoe":
        for layer in tiny.model.model.layers:
            layer.residual_multiplier = 0.3
        tiny.model.logits_scaling = 4.0
        tiny.model.config.logits_scaling = 4.0
    tokens = tiny.inputs["input_ids"]
    bundle = ModelBundle(tiny.model, Padding(), family, None, family)
    found = attribute_logits(bundle, given_rows(tokens), prompts(2))
    with torch.no_grad():
        logits = tiny.model(input_ids=tokens).logits.double()
    logits = logits - logits.mean(-1, keepdim=True)
    wanted = [
        logits[0, -1, 7] - logits[0, -1, 9] + 0.5 * logits[0, -2, 5],
        logits[1, 8, 7],
    ]
    np.testing.assert_allclose(found.target, [float(one) for one in wanted], atol=1e-4)
    assert found.max_error < 1e-4
    assert (found.values != 0).any()
    assert ((found.used > 0) | (found.values == 0)).all()


def test_an_experts_contribution_by_hand() -> None:
    tiny = tiny_model("olmoe")
    model, tokens = tiny.model, tiny.inputs["input_ids"]
    seen: dict[str, Any] = {}
    core = model.model
    hooks = [
        core.layers[1].mlp.register_forward_hook(
            lambda _m, args, _o: seen.__setitem__("x", args[0][0, -1])
        ),
        core.layers[1].mlp.gate.register_forward_hook(
            lambda _m, _a, out: seen.__setitem__("routed", [one[12] for one in out[1:]])
        ),
        core.norm.register_forward_hook(
            lambda _m, args, _o: seen.__setitem__("stream", args[0][0, -1])
        ),
    ]
    with torch.no_grad():
        model(input_ids=tokens[:1])
    for hook in hooks:
        hook.remove()
    row = TargetRow(0, tuple(tokens[0].tolist()), 13, (Read(1, 7, 1.0), Read(1, 9, -1.0)), 1)
    bundle = ModelBundle(model, Padding(), "olmoe", None, "olmoe")
    found = attribute_logits(bundle, [row], prompts(1))
    experts, stream = core.layers[1].mlp.experts, seen["stream"]
    reads = (model.lm_head.weight[7] - model.lm_head.weight[9]).detach()
    scale = core.norm.weight.detach() / (stream.pow(2).mean() + model.config.rms_norm_eps).sqrt()
    weights, ids = seen["routed"]
    for weight, expert in zip(weights, ids.tolist(), strict=True):
        gate, up = (experts.gate_up_proj[expert] @ seen["x"]).chunk(2)
        wrote = (
            weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        ).detach()
        at = found.experts.index((1, "mlp", expert))
        assert found.values[at, 0] == pytest.approx(float((wrote * scale) @ reads), abs=1e-5)
        np.testing.assert_allclose(found.writes[at], (wrote * scale).detach(), atol=1e-5)
    in_layer = [at for at, one in enumerate(found.experts) if one[0] == 1]
    assert (found.values[in_layer, 0] != 0).sum() == len(ids)


def planted_bundle(planted: Any) -> ModelBundle:
    planted.tokenizer.padding_side = "left"
    return ModelBundle(planted.model, planted.tokenizer, "planted", None, "qwen3_moe")


@pytest.mark.parametrize("plant", [expert_refusal, attention_refusal])
def test_the_planted_expert_writes_the_refusal_and_no_other_writes_anything(plant: Any) -> None:
    planted = plant()
    bundle = planted_bundle(planted)
    texts = [f"how was the river {word} described ?" for word in SENSITIVE_WORDS]
    rendered = [
        render_prompt(bundle.tokenizer, Prompt(prompt_id=at, text=text, set_name="t"))
        for at, text in enumerate(texts)
    ]
    first, second = (bundle.tokenizer.convert_tokens_to_ids(word) for word in ("I", "blue"))
    rows = target_rows(bundle, LogitDifference(first, second), rendered)
    found = attribute_logits(bundle, rows, rendered)
    writing = {found.experts[at] for at in np.flatnonzero((found.values != 0).any(axis=1))}
    if planted.refusal_expert is None:
        assert writing == set()
        attention = found.part_values[found.parts.index(("attention", 0))]
        np.testing.assert_allclose(attention, found.target, rtol=1e-4)
        return
    layer, expert = planted.refusal_expert
    assert writing == {(layer, "mlp", expert)}
    at = found.experts.index((layer, "mlp", expert))
    assert (found.values[at] > 1).all()
    top = found.top_tokens(bundle, (layer, "mlp", expert), number=2)
    assert top["token"].iloc[0] == "I" and top["side"].tolist() == ["for"] * 2 + ["against"] * 2
    frame = found.frame(["x", "y", "z"])
    assert frame["effect"].sum() == pytest.approx(found.target.mean(), abs=1e-6)
    assert frame.loc[frame["effect"].idxmax(), "expert"] == expert
    with pytest.raises(InputError, match="layer 1 has no expert 99"):
        found.top_tokens(bundle, (1, "mlp", 99))


def test_layers_agree_with_transformer_lens(tiny_bundle: Any) -> None:
    bridges = pytest.importorskip("transformer_lens.model_bridge.sources.transformers")
    rendered = [render_prompt(tiny_bundle.tokenizer, Prompt(prompt_id=0, text="Hi", set_name="t"))]
    rows = target_rows(tiny_bundle, LogitDifference(70, 80), rendered)
    found = attribute_logits(tiny_bundle, rows, rendered)
    model = copy.deepcopy(tiny_bundle.model)
    model.config.architectures = [type(model).__name__]
    bridge = bridges.boot(
        "tiny/qwen3_moe", hf_model=model, tokenizer=copy.deepcopy(tiny_bundle.tokenizer),
        device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([rendered[0].token_ids]))
        last = cache["blocks.2.hook_out"][0, -1]
        norm, head = (tiny_bundle.model.model.norm, tiny_bundle.model.lm_head)
        scale = norm(last) / last  # an RMS norm: what each axis is multiplied by
        reads = head.weight[70] - head.weight[80]
        for layer in range(3):
            own = [at for at, one in enumerate(found.experts) if one[0] == layer]
            for name, value in (
                ("mlp", found.values[own, 0].sum()),
                ("attn", found.part_values[found.parts.index(("attention", layer)), 0]),
            ):
                wrote = cache[f"blocks.{layer}.hook_{name}_out"][0, -1]
                assert value == pytest.approx(float((wrote * scale) @ reads), abs=1e-4)


@pytest.mark.parametrize(
    ("family", "why"),
    [("gemma4", "hang on the layer itself"), ("minimax", "not the stream plus its sublayers")],
)
def test_a_tail_that_cannot_be_read_is_refused(family: str, why: str) -> None:
    tiny = tiny_model(family)
    bundle = ModelBundle(tiny.model, Padding(), family, None, family)
    with pytest.raises(ModelInputError, match=why):
        attribute_logits(bundle, given_rows(tiny.inputs["input_ids"]), prompts(2))
    assert not any(module._forward_hooks for module in tiny.model.modules())


def test_targets_that_are_no_sum_of_log_probabilities_are_refused(tiny_bundle: Any) -> None:
    rendered = [render_prompt(tiny_bundle.tokenizer, Prompt(prompt_id=0, text="Hi", set_name="t"))]
    rows = target_rows(tiny_bundle, Custom(lambda logits_AV: logits_AV.max()), rendered)
    with pytest.raises(InputError, match="add up log-probabilities"):
        attribute_logits(tiny_bundle, rows, rendered)


@pytest.mark.parametrize("is_centred", [False, True])
def test_a_frozen_norm_repeats_the_norm_and_splits_it(is_centred: bool) -> None:
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(16) if is_centred else torch.nn.RMSNorm(16)
    norm = norm.double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        first, second = torch.randn(2, 5, 16, dtype=torch.float64)
        gave = norm(first + second)
    found = frozen(norm, first + second, gave, 1e-8)
    assert found is not None and found.is_centred == is_centred
    torch.testing.assert_close(found(first) + found(second) + found.bias, gave)
    assert frozen(norm, first + second, gave.roll(1, -1), 1e-4) is None
