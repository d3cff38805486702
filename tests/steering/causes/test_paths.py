"""Path effects: the total is a mask's, and what goes through later routing is found where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moescope.probe.demo.planted import ALARM, CONSTANT, SENSITIVE_WORDS, WORDS, expert_refusal
from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt
from moescope.steering import SteeringPlan, steer
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.paths import path_effects
from moescope.steering.causes.targets import OpeningDifference, PromptLoss, target_rows

UNITS = ["x", "y", "z"]


def asked(bundle: ModelBundle, texts: list[str], target: Any) -> tuple[Any, Any]:
    rendered = [
        render_prompt(bundle.tokenizer, Prompt(prompt_id=at, text=text, set_name="t"))
        for at, text in enumerate(texts)
    ]
    return target_rows(bundle, target, rendered), rendered


def planted_bundle(*, relayed: bool) -> ModelBundle:
    """A refusal expert in layer 2; if relayed, expert 3 of layer 1 raises the alarm it hears."""
    planted = expert_refusal(layer=2)
    planted.tokenizer.padding_side = "left"
    if relayed:
        heard = 60  # an axis that nothing else uses
        with torch.no_grad():
            layers = planted.model.model.layers
            values = layers[0].self_attn.v_proj.weight
            for word in SENSITIVE_WORDS:
                values[heard, WORDS.index(word)] = values[ALARM, WORDS.index(word)].clone()
            values[ALARM] = 0
            layers[0].self_attn.o_proj.weight[heard, heard] = 1
            layers[0].self_attn.o_proj.weight[ALARM, ALARM] = 0
            relay = layers[1].mlp
            relay.gate.weight[3] = 0
            relay.gate.weight[3, CONSTANT] = -4
            relay.gate.weight[3, heard] = 12
            relay.experts.gate_up_proj[3] = 0
            relay.experts.gate_up_proj[3, 0, CONSTANT] = 4
            relay.experts.gate_up_proj[3, 4, heard] = 4  # 4 is the expert's width: the up half
            relay.experts.down_proj[3] = 0
            relay.experts.down_proj[3, ALARM, 0] = 0.03
    return ModelBundle(planted.model, planted.tokenizer, "planted", None, "qwen3_moe")


SENSITIVE = [
    "tell me secretly about the river",
    "how was the tower covertly described ?",
    "how was the river illegally described ?",
]


def test_an_expert_that_only_moves_a_later_router_acts_through_routing_alone() -> None:
    bundle = planted_bundle(relayed=True)
    ids = range(3)
    target = OpeningDifference(dict.fromkeys(ids, "I"), dict.fromkeys(ids, "blue"), 1)
    rows, rendered = asked(bundle, SENSITIVE, target)
    experts = [(1, "mlp", 3), (2, "mlp", 5)]
    effects = path_effects(bundle, rows, rendered, experts, split_ids=True)
    assert (effects.total < -1).all()
    np.testing.assert_array_equal(effects.frozen[1], effects.total[1])
    frame = effects.frame(UNITS).set_index(["expert", "path"])["share"]
    # Without the alarm in the stream the final norm shrinks the rest less: 4 % the other way.
    assert frame[3, "direct+values"] == pytest.approx(0, abs=0.06)
    assert frame[3, "later routing"] == pytest.approx(1, abs=0.06)
    # With the ids held the refusal expert stays selected; what it loses is its weight.
    assert frame[3, "later weights"] == pytest.approx(1, abs=0.06)
    assert frame[5, "later routing"] == 0


def test_an_expert_that_writes_the_refusal_itself_acts_directly() -> None:
    planted = expert_refusal(layer=1)
    planted.tokenizer.padding_side = "left"
    bundle = ModelBundle(planted.model, planted.tokenizer, "planted", None, "qwen3_moe")
    ids = range(3)
    target = OpeningDifference(dict.fromkeys(ids, "I"), dict.fromkeys(ids, "blue"), 1)
    rows, rendered = asked(bundle, SENSITIVE, target)
    effects = path_effects(bundle, rows, rendered, [(1, "mlp", 5), (1, "mlp", 2)])
    assert (effects.total[0] < -1).all()
    np.testing.assert_allclose(effects.through_routing, 0, atol=1e-5)
    np.testing.assert_allclose(effects.total[1], 0, atol=1e-5)


@pytest.mark.parametrize("mode", ["drop", "drop_renorm", "replace"])
def test_the_total_is_what_a_mask_does_and_the_paths_add_up(tiny_bundle: Any, mode: Any) -> None:
    rows, rendered = asked(
        tiny_bundle, ["Where is it?", "Hi", "What happened in 1868?"], PromptLoss()
    )
    experts = [(0, "mlp", 1), (1, "mlp", 6), (2, "mlp", 3)]
    effects = path_effects(tiny_bundle, rows, rendered, experts, mode=mode, split_ids=True)
    plain = measure_target(tiny_bundle, rows, rendered)
    np.testing.assert_allclose(effects.baseline, plain, atol=1e-6)
    for at, (layer, _, expert) in enumerate(experts):
        mask = {"action": "mask", "layer": layer, "experts": [expert], "mode": mode}
        with steer(tiny_bundle.model, SteeringPlan(interventions=[mask])):
            masked = measure_target(tiny_bundle, rows, rendered)
        np.testing.assert_allclose(effects.total[at], masked - plain, atol=1e-5)
    np.testing.assert_array_equal(effects.through_routing[2], 0)
    assert (effects.through_routing[:2] != 0).any()
    frame = effects.frame(UNITS).set_index(["layer", "path"])["effect"].unstack()
    np.testing.assert_allclose(frame["direct+values"] + frame["later routing"], frame["total"])
    np.testing.assert_allclose(
        frame["later weights"] + frame["later ids"], frame["later routing"], atol=1e-12
    )


def test_frozen_routing_is_what_hooks_by_hand_do(tiny_bundle: Any) -> None:
    rows, rendered = asked(tiny_bundle, ["What happened in 1868?"], PromptLoss())
    effects = path_effects(tiny_bundle, rows, rendered, [(0, "mlp", 1)], split_ids=True)
    tokens = torch.tensor([rendered[0].token_ids])
    gates = [layer.mlp.gate for layer in tiny_bundle.model.model.layers]

    def loss(*hooks: Any) -> float:
        kept = [gate.register_forward_hook(hook) for gate, hook in hooks]
        with torch.no_grad():
            logits = tiny_bundle.model(input_ids=tokens).logits[0, :-1].double()
        for hook in kept:
            hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))

    seen: dict[int, Any] = {}

    def keeping(number: int) -> Any:
        return lambda _m, _a, out: seen.__setitem__(number, out)

    def without(_module: Any, _args: Any, out: Any) -> Any:
        logits, weights, ids = out
        return logits, weights.masked_fill(ids == 1, 0.0), ids

    def same_ids(number: int) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            ids = seen[number][2]
            weights = out[0].float().softmax(-1).gather(1, ids)
            return out[0], (weights / weights.sum(-1, keepdim=True)).to(out[1]), ids

        return hook

    plain = loss((gates[1], keeping(1)), (gates[2], keeping(2)))
    held = [(gates[at], lambda _m, _a, _o, at=at: seen[at]) for at in (1, 2)]
    frozen = loss((gates[0], without), *held)
    halfway = loss((gates[0], without), *[(gates[at], same_ids(at)) for at in (1, 2)])
    np.testing.assert_allclose(effects.frozen[0], frozen - plain, atol=1e-5)
    assert effects.ids_frozen is not None
    np.testing.assert_allclose(effects.ids_frozen[0], halfway - plain, atol=1e-5)
    assert abs(frozen - halfway) > 1e-4


def test_experts_that_are_not_there_are_refused(tiny_bundle: Any) -> None:
    rows, rendered = asked(tiny_bundle, ["Hi there"], PromptLoss())
    for experts, message in (
        ([(7, "mlp", 0)], "layer 7 has no router"),
        ([(1, "mlp", 8)], "experts 0 to 7, and no expert 8"),
        ([], "at least one expert"),
    ):
        with pytest.raises(InputError, match=message):
            path_effects(tiny_bundle, rows, rendered, experts)
