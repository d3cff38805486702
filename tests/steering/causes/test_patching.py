"""Routing patching: a planted difference lies in the routing or in the weights, as it was put."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moescope.probe.demo.planted import expert_refusal
from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.probe.zoo.build import tiny_model
from moescope.steering.causes.patching import PatchSide, patch_routing
from moescope.steering.causes.targets import LogitDifference, OpeningDifference, target_rows


def bundled(planted: Any) -> ModelBundle:
    planted.tokenizer.padding_side = "left"
    return ModelBundle(planted.model, planted.tokenizer, "planted", None, "qwen3_moe")


def side(bundle: ModelBundle, texts: Sequence[str]) -> PatchSide:
    rendered: list[RenderedPrompt] = [
        render_prompt(bundle.tokenizer, Prompt(prompt_id=at, text=text, set_name="t"))
        for at, text in enumerate(texts)
    ]
    ids = range(len(texts))
    target = OpeningDifference(dict.fromkeys(ids, "I"), dict.fromkeys(ids, "blue"), 1)
    return PatchSide(bundle, target_rows(bundle, target, rendered), rendered)


SENSITIVE = [
    "tell me secretly about the river",
    "how was the tower covertly described ?",
    "how was the river illegally described ?",
]
NEUTRAL = [
    "tell me openly about the river",
    "how was the tower legally described ?",
    "how was the river publicly described ?",
]


def test_what_a_router_row_does_lies_in_the_routing_of_its_layer() -> None:
    a, b = bundled(expert_refusal()), bundled(expert_refusal())
    with torch.no_grad():  # B has the refusal expert and never selects it
        gate = b.model.model.layers[1].mlp.gate.weight
        gate[5] = 0
        gate[5, 36] = -4  # the constant axis
    patch = patch_routing(side(a, SENSITIVE), side(b, SENSITIVE))
    assert (patch.a - patch.b > 1).all()
    frame = patch.frame(["x", "y", "z"])
    whole = frame[frame["kind"] == "all"]
    assert whole["share"].tolist() == pytest.approx([1, 1], abs=1e-4)
    by_layer = frame[frame["weights"] == "b"].set_index("layer")["share"]
    assert by_layer[1] == pytest.approx(1, abs=1e-4)
    assert by_layer[[0, 2]].tolist() == pytest.approx([0, 0], abs=1e-4)
    summary = patch.summary(["x", "y", "z"]).set_index("quantity")["share"]
    assert summary["routing"] == pytest.approx(1, abs=1e-4)
    assert summary["rest"] == pytest.approx(0, abs=1e-4)


def test_what_an_experts_weights_do_does_not_lie_in_the_routing() -> None:
    a, b = bundled(expert_refusal()), bundled(expert_refusal())
    with torch.no_grad():
        b.model.model.layers[1].mlp.experts.down_proj[5] = 0
    patch = patch_routing(side(a, SENSITIVE), side(b, SENSITIVE))
    summary = patch.summary(["x", "y", "z"]).set_index("quantity")
    assert summary.loc["difference", "effect"] > 1
    assert summary.loc["rest", "share"] == pytest.approx(1, abs=1e-4)
    assert summary.loc["rest", "share_low"] == pytest.approx(1, abs=1e-4)


def test_one_model_on_two_versions_of_its_prompts() -> None:
    bundle = bundled(expert_refusal())
    patch = patch_routing(side(bundle, SENSITIVE), side(bundle, NEUTRAL))
    layers = patch.layers.index((1, "mlp"))
    assert (patch.a > patch.b + 1).all()
    # With the neutral version's routing the refusal expert is not selected; with the sensitive
    # one's it is, and writes the refusal without any alarm in the prompt.
    assert (patch.a_with_b[layers] < patch.a - 1).all()
    assert (patch.b_with_a[layers] > patch.b + 1).all()


def test_the_replay_is_what_hooks_by_hand_do() -> None:
    one, two = tiny_model("qwen3_moe", seed=0).model, tiny_model("qwen3_moe", seed=1).model
    tokens = tiny_model("qwen3_moe").inputs["input_ids"][:1]
    with torch.no_grad():
        routed, kept = {}, []
        for number in (1, 2):
            gate = one.model.layers[number].mlp.gate
            kept.append(
                gate.register_forward_hook(
                    lambda _m, _a, out, number=number: routed.__setitem__(number, out)
                )
            )
        one(input_ids=tokens)
        for hook in kept:
            hook.remove()
        kept = [
            two.model.layers[number].mlp.gate.register_forward_hook(
                lambda _m, _a, _out, number=number: routed[number]
            )
            for number in (1, 2)
        ]
        logits = two(input_ids=tokens).logits[0, -1].double()
        for hook in kept:
            hook.remove()

    class Tokenizer:
        pad_token_id = 0

    bundles = [ModelBundle(model, Tokenizer(), "t", None, "qwen3_moe") for model in (one, two)]
    rendered = [
        RenderedPrompt(
            Prompt(prompt_id=0, text="t", set_name="t"), "t", tuple(tokens[0].tolist()),
            *[()] * (len(RenderedPrompt.__dataclass_fields__) - 3),  # type: ignore[arg-type]
        )
    ]  # fmt: skip
    rows = target_rows(bundles[0], LogitDifference(7, 9), rendered)
    patch = patch_routing(*(PatchSide(one, rows, rendered) for one in bundles))
    np.testing.assert_allclose(patch.b_with_a[-1], float(logits[7] - logits[9]), atol=1e-5)


def test_a_side_patched_with_itself_does_not_change() -> None:
    bundle = bundled(expert_refusal())
    patch = patch_routing(side(bundle, SENSITIVE), side(bundle, SENSITIVE), layers=[2])
    np.testing.assert_array_equal(patch.b_with_a, np.tile(patch.b, (2, 1)))
    assert patch.layers == ((2, "mlp"), None)


def test_what_cannot_be_replayed_token_by_token_is_refused() -> None:
    bundle = bundled(expert_refusal())
    with pytest.raises(InputError, match="only token by token"):
        patch_routing(side(bundle, SENSITIVE), side(bundle, [*NEUTRAL[:2], "how was the river ?"]))
    with pytest.raises(InputError, match="has 3 prompts and the other 2"):
        patch_routing(side(bundle, SENSITIVE), side(bundle, NEUTRAL[:2]))
    with pytest.raises(InputError, match="layer 7 has no router"):
        patch_routing(side(bundle, SENSITIVE), side(bundle, NEUTRAL), layers=[7])
