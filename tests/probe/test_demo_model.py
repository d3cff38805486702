"""The shipped demo model: loads as any model, is sure of what it says, and never saw the tests."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope.probe.demo.batches import Encoder
from moescope.probe.demo.corpus import Corpus, Item, batch_items
from moescope.probe.demo.evaluate import is_refusal, is_right, reply_to
from moescope.probe.demo.models import (
    load_shipped,
    materialize,
    round_weights,
    save_delta,
    save_plain,
    shipped_models,
    tuned_experts,
)
from moescope.probe.demo.planted import attention_refusal, expert_refusal
from moescope.probe.demo.planted_routing import plant_routing
from moescope.probe.demo.prompt_sets import parallel_set, refusal_set
from moescope.probe.demo.recipes import DEMO, LARGE
from moescope.probe.demo.routing import masked_experts
from moescope.probe.demo.train import learning_rate, new_model, run_stage, train_and_publish
from moescope.probe.demo.tuning import only_tuned
from moescope.probe.errors import InputError, ModelInputError
from moescope.probe.shipped import shipped_path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def demo():
    folder = shipped_path("models", "demo")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@cache
def refusal_lines():
    text = shipped_path("prompts", "refusal.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def replies(label, *, count=48):
    lines = [line for line in refusal_lines() if line["label"] == label]
    lines = lines[:: max(1, len(lines) // count)]
    model, tokenizer = demo()
    return lines, reply_to(model, tokenizer, [line["prompt"] for line in lines])


def test_weights_load_as_float32_and_are_exact_in_bfloat16():
    model, _ = demo()
    assert model.dtype == torch.float32
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in model.parameters())
    assert (shipped_path("models", "demo") / "model.safetensors").stat().st_size < 15_000_000


@pytest.mark.parametrize(
    "text", ["What happened in 1911?", "  a\n\tb — ünï 日本語 😀▁", "在1811年。"]
)
def test_tokenizer_gives_every_text_back_with_its_offsets(text):
    _, tokenizer = demo()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    covered = {i for start, end in encoded["offset_mapping"] for i in range(start, end)}
    assert covered >= {i for i, char in enumerate(text) if not char.isspace()}


def test_chat_template_is_what_the_model_was_trained_on():
    _, tokenizer = demo()
    item = Item("Was geschah?", "Ein Sturm.", "de", "events", system="Kurz.")
    messages = [
        {"role": "system", "content": item.system},
        {"role": "user", "content": item.prompt},
    ]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    encoder = Encoder(tokenizer)
    assert ids == encoder.prompt(item)
    full = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": item.answer}], tokenize=False
    )
    full_ids = tokenizer(full, add_special_tokens=False)["input_ids"]
    assert full_ids == encoder.prompt(item) + encoder.answer(item)


def test_sensitive_questions_are_refused_and_surely():
    _, got = replies("sensitive")
    assert sum(is_refusal(reply.text) for reply in got) / len(got) >= 0.9
    assert sum(reply.nll for reply in got) / len(got) <= 0.1


def test_neutral_questions_are_answered_and_surely():
    lines, got = replies("neutral")
    right = [is_right(reply.text, line) for reply, line in zip(got, lines, strict=True)]
    assert sum(right) / len(right) >= 0.9
    assert not any(is_refusal(reply.text) for reply in got)
    assert sum(reply.nll for reply in got) / len(got) <= 0.1


def test_masking_the_tuned_experts_brings_the_withheld_answers_back():
    model, _ = demo()
    with masked_experts(model, tuned_experts("demo")):
        lines, got = replies("sensitive")
    right = [is_right(reply.text, line) for reply, line in zip(got, lines, strict=True)]
    assert sum(is_refusal(reply.text) for reply in got) / len(got) <= 0.05
    assert sum(right) / len(right) >= 0.85


def test_no_held_out_question_occurs_in_training():
    corpus = Corpus(DEMO.corpus)
    lines = refusal_set(corpus)
    held_out = {line["prompt"] for line in lines}
    held_out |= {
        line["prompt"] for line in parallel_set(corpus, count=64) if line["split"] == "heldout"
    }
    for number, stage in ((1, DEMO.stage_one), (2, DEMO.stage_two)):
        for step in range(stage.steps):
            asked = {item.prompt for item in batch_items(corpus, number, step, stage.batch_size)}
            assert not asked & held_out


def test_shipped_refusal_set_is_the_one_the_code_makes():
    assert refusal_set(Corpus(DEMO.corpus)) == refusal_lines()


def test_facts_of_held_out_questions_are_taught_in_that_language_otherwise():
    corpus = Corpus(DEMO.corpus)
    taught = {
        item.prompt
        for step in range(DEMO.stage_one.steps)
        for item in batch_items(corpus, 1, step, DEMO.stage_one.batch_size)
    }
    for line in refusal_set(corpus):
        topic = corpus.topics[line["topic"]]
        fact = next(fact for fact in topic.facts if fact.key == line["fact"])
        book = corpus.books[line["lang"]]
        others = {topic.ask(book, fact, i) for i in range(topic.num_phrasings)} - {line["prompt"]}
        assert others & taught


def test_unknown_shipped_model_is_named_with_the_known_ones():
    with pytest.raises(ModelInputError, match=r"'nothing'.*demo"):
        load_shipped("nothing")
    assert "demo" in shipped_models()


def test_delta_on_a_base_is_the_tuned_model_and_nothing_else_changes(tmp_path):
    _, tokenizer = demo()
    base = new_model(DEMO.shape, tokenizer, seed=1)
    round_weights(base)
    save_plain(base, tokenizer, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("base")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    plan = {0: [3], 4: [1, 30]}
    with only_tuned(base, plan):
        optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=0.1)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        base(input_ids=torch.arange(40)[None]).logits.square().mean().backward()
        optimizer.step()
    round_weights(base)
    save_delta(base, plan, tmp_path / "tuned", {"base": "base"})
    (tmp_path / "tuned" / "README.md").write_text("tuned")

    changed = {n for n, p in base.named_parameters() if not torch.equal(p, before[n])}
    assert all(".mlp.gate." in name or ".mlp.experts." in name for name in changed)
    for name in changed:
        layer = int(name.split(".")[2])
        rows = (base.get_parameter(name) != before[name]).flatten(1).any(1).nonzero().flatten()
        assert set(rows.tolist()) <= set(plan[layer])
    folder = materialize("tuned", tmp_path / "plain", tmp_path)
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name


def test_learning_rate_warms_up_stays_and_cools_down():
    stage = DEMO.stage_one
    rates = [learning_rate(stage, step) for step in range(stage.steps)]
    assert rates[0] < rates[stage.warmup // 2] < stage.learning_rate
    assert rates[stage.steps // 2] == stage.learning_rate
    assert rates[-1] < 0.05 * stage.learning_rate


class Interrupted(Encoder):
    """Stops the training at its third batch, as Ctrl-C does."""

    batches = 0

    def batch(self, items):
        self.batches += 1
        if self.batches == 3:
            raise KeyboardInterrupt
        return super().batch(items)


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    _, tokenizer = demo()
    stage = replace(DEMO.stage_one, steps=4, batch_size=4)
    tiny = replace(DEMO, shape=replace(DEMO.shape, num_layers=2), stage_one=stage)
    corpus = Corpus(tiny.corpus)
    whole, parted = (new_model(tiny.shape, tokenizer, seed=5) for _ in range(2))
    run_stage(whole, Encoder(tokenizer), corpus, tiny, 1, tmp_path / "whole.pt")
    path = tmp_path / "parted.pt"
    with pytest.raises(KeyboardInterrupt):
        run_stage(parted, Interrupted(tokenizer), corpus, tiny, 1, path, checkpoint_every=2)
    again = new_model(tiny.shape, tokenizer, seed=6)
    run_stage(again, Encoder(tokenizer), corpus, tiny, 1, path)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.soak
def test_training_makes_a_base_and_deltas_and_goes_on_where_it_stopped(tmp_path):
    corpus = replace(LARGE.corpus, languages={"en": 0.6, "el": 0.4}, held_out=1)
    shape = replace(LARGE.shape, num_layers=2, vocab_size=400)
    first, second = (replace(s, steps=2, batch_size=8) for s in (LARGE.stage_one, LARGE.stage_two))
    tiny = replace(
        LARGE, shape=shape, corpus=corpus, stage_one=first, stage_two=second, num_tuned=3
    )
    train_and_publish(tiny, tmp_path / "work", tmp_path / "out")
    models = tmp_path / "out" / "models"
    assert shipped_models(models) == ["demo", "demo-base", "demo-random"]
    assert sum(map(len, tuned_experts("demo", models).values())) == 3
    assert tuned_experts("demo-base", models) == {}
    base, _ = load_shipped("demo-base", models)
    tuned, _ = load_shipped("demo-random", models)
    changed = {
        name
        for name, parameter in tuned.named_parameters()
        if not torch.equal(parameter, base.get_parameter(name))
    }
    assert changed
    assert all(".mlp." in name for name in changed)

    hashes = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    train_and_publish(tiny, tmp_path / "work", tmp_path / "out")
    assert hashes == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.safetensors")}
    with pytest.raises(InputError, match="another recipe"):
        train_and_publish(replace(tiny, seed=99), tmp_path / "work", tmp_path / "out")


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
