"""Planted models and tables: the truth that was written into them is there, and nothing else."""

import pytest

from moescope.probe.demo.planted import attention_refusal, expert_refusal
from moescope.probe.demo.planted_routing import plant_routing
from moescope.probe.demo.routing import masked_experts


def answers_of(planted):
    inputs = planted.tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in planted.prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = planted.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return planted.tokenizer.batch_decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("plant", [expert_refusal, attention_refusal])
def test_planted_models_refuse_what_is_sensitive_and_answer_the_rest(plant):
    planted = plant()
    wanted = [
        planted.refusal if label == "sensitive" else answer
        for label, answer in zip(planted.labels, planted.answers, strict=True)
    ]
    assert answers_of(planted) == wanted


def test_planted_refusal_lies_in_its_expert_alone():
    planted = expert_refusal(layer=2, expert=3)
    as_it_is = answers_of(planted)
    with masked_experts(planted.model, {2: [3]}):
        assert answers_of(planted) == list(planted.answers)
    with masked_experts(planted.model, {0: [0, 1, 2], 1: [5, 6, 7], 2: [0, 1, 2, 4]}):
        assert answers_of(planted) == as_it_is


def test_refusal_in_attention_survives_every_mask():
    planted = attention_refusal()
    as_it_is = answers_of(planted)
    for first in range(0, 8, 2):
        experts = [first, first + 1]
        with masked_experts(planted.model, dict.fromkeys(range(3), experts)):
            assert answers_of(planted) == as_it_is


def test_planted_routing_has_what_it_says_it_has():
    table = plant_routing(seed=3)
    ids = table.expert_ids
    assert (ids.min(), ids.max()) >= (0, 0)
    assert all(len(set(row)) == ids.shape[2] for row in ids.reshape(-1, ids.shape[2]).tolist())
    for layer, specialists in table.specialists.items():
        for expert, domain in specialists.items():
            assert ((ids[:, layer] == expert).any(-1) == (table.domains == domain)).all()
    for layer, (first, second) in table.partners.items():
        together = [(ids[:, layer] == expert).any(-1) for expert in (first, second)]
        assert together[0].any() and (together[0] == together[1]).all()
    for layer, followers in table.transitions.items():
        for expert, follower in followers.items():
            has, gets = (ids[:, layer] == expert).any(-1), (ids[:, layer + 1] == follower).any(-1)
            assert has.any() and (has == gets).all()
    for layer, own in table.language_experts.items():
        for lang, experts in own.items():
            takes = [set(row) & set(experts) for row in ids[:, layer].tolist()]
            assert all(
                bool(t) == (token == lang) for t, token in zip(takes, table.langs, strict=True)
            )
