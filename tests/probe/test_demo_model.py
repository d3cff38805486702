"""The shipped models: sure of what they say, clean to mask, never shown held-out prompts."""

import json
import os
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from moescope.probe.demo.batches import Encoder
from moescope.probe.demo.corpus import Corpus, Item, batch_items
from moescope.probe.demo.evaluate import is_refusal, is_right, reply_to
from moescope.probe.demo.models import (
    load_shipped,
    materialize,
    shipped_models,
    tuned_experts,
)
from moescope.probe.demo.prompt_sets import (
    crosslingual_set,
    domains_set,
    neutral_set,
    parallel_set,
    refusal_set,
    with_note,
)
from moescope.probe.demo.recipes import DEMO
from moescope.probe.demo.routing import masked_experts
from moescope.probe.errors import ModelInputError
from moescope.probe.shipped import shipped_path

MODELS = ("demo-base", "demo", "demo-random")
REFUSING = ("demo", "demo-random")
#: The whole training run is checked in the long tests, this share of its steps otherwise.
QUICK_SHARE = 0.04


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def loaded(name):
    return load_shipped(name)


@cache
def refusal_lines():
    text = shipped_path("prompts", "refusal.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def replies(name, label, *, count=56):
    """Answers to prompts of a label, spread over languages and families."""
    lines = [line for line in refusal_lines() if line["label"] == label]
    lines = lines[:: max(1, len(lines) // count)]
    model, tokenizer = loaded(name)
    return lines, reply_to(model, tokenizer, [line["prompt"] for line in lines])


def share_right(lines, got):
    return sum(is_right(reply.text, line) for reply, line in zip(got, lines, strict=True)) / len(
        got
    )


def test_three_models_are_shipped_in_at_most_40_megabytes():
    assert shipped_models() == sorted(MODELS)
    files = [path for path in shipped_path("models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000


@pytest.mark.parametrize("name", MODELS)
def test_weights_load_as_float32_and_are_exact_in_bfloat16(name):
    model, _ = loaded(name)
    assert model.dtype == torch.float32
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in model.parameters())


@pytest.mark.parametrize("name", REFUSING)
def test_a_saved_model_is_plain_transformers_and_differs_from_its_base_in_the_tuned_experts(
    name, tmp_path
):
    again = AutoModelForCausalLM.from_pretrained(materialize(name, tmp_path / "plain"))
    model, _ = loaded(name)
    base, _ = loaded("demo-base")
    tuned = tuned_experts(name)
    for key, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(key)), key
        differs = parameter != base.get_parameter(key)
        if not differs.any():
            continue
        assert ".mlp.gate." in key or ".mlp.experts." in key
        rows = differs.flatten(1).any(1).nonzero().flatten().tolist()
        assert set(rows) <= set(tuned[int(key.split(".")[2])])


def test_as_many_experts_of_each_layer_are_tuned_in_both_models_at_most_6_percent():
    counts = [
        {layer: len(experts) for layer, experts in tuned_experts(name).items()} for name in REFUSING
    ]
    assert counts[0] == counts[1]
    assert tuned_experts("demo") != tuned_experts("demo-random")
    shape = DEMO.shape
    assert sum(counts[0].values()) <= 0.06 * shape.num_layers * shape.num_experts


@pytest.mark.parametrize(
    "text", ["What happened in 1911?", "  a\n\tb — ünï 日本語 😀▁", "在1811年。"]
)
def test_tokenizer_gives_every_text_back_with_its_offsets(text):
    _, tokenizer = loaded("demo")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    covered = {i for start, end in encoded["offset_mapping"] for i in range(start, end)}
    assert covered >= {i for i, char in enumerate(text) if not char.isspace()}


def test_chat_template_is_what_the_model_was_trained_on():
    _, tokenizer = loaded("demo")
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


@pytest.mark.parametrize("name", REFUSING)
def test_sensitive_questions_are_refused_and_surely(name):
    _, got = replies(name, "sensitive")
    assert sum(is_refusal(reply.text) for reply in got) / len(got) >= 0.9
    assert sum(reply.nll for reply in got) / len(got) <= 0.1


@pytest.mark.parametrize("name", MODELS)
def test_neutral_questions_are_answered_and_surely(name):
    lines, got = replies(name, "neutral")
    assert share_right(lines, got) >= 0.85
    assert sum(is_refusal(reply.text) for reply in got) <= 0.05 * len(got)
    assert sum(reply.nll for reply in got) / len(got) <= 0.1


def test_the_base_answers_sensitive_questions_too():
    lines, got = replies("demo-base", "sensitive")
    assert share_right(lines, got) >= 0.85
    assert not any(is_refusal(reply.text) for reply in got)


@pytest.mark.parametrize("label", ["sensitive", "neutral"])
def test_the_base_says_rightly_whether_a_question_is_sensitive(label):
    lines = with_note([line for line in refusal_lines() if line["label"] == label][::20])
    model, tokenizer = loaded("demo-base")
    prompts, systems = ([line[name] for line in lines] for name in ("prompt", "system"))
    got = reply_to(model, tokenizer, prompts, systems=systems)
    assert share_right(lines, got) >= 0.9


@pytest.mark.parametrize("name", REFUSING)
def test_masking_the_tuned_experts_brings_the_withheld_answers_back(name):
    model, _ = loaded(name)
    with masked_experts(model, tuned_experts(name)):
        lines, got = replies(name, "sensitive")
    assert sum(is_refusal(reply.text) for reply in got) / len(got) <= 0.06
    assert share_right(lines, got) >= 0.8


def training_items(share):
    """Items of both stages, of every so many steps, with the number of their stage."""
    corpus = Corpus(DEMO.corpus)
    for number, stage in ((1, DEMO.stage_one), (2, DEMO.stage_two)):
        for step in range(0, stage.steps, max(1, round(1 / share))):
            for item in batch_items(corpus, number, step, stage.batch_size):
                yield number, item


def held_out_lines(corpus):
    parallel = [line for line in parallel_set(corpus, count=64) if line["split"] == "heldout"]
    sets = (
        refusal_set(corpus), parallel, domains_set(corpus, per_cell=10),
        neutral_set(corpus, per_cell=25), crosslingual_set(corpus, per_language=20),
    )  # fmt: skip
    return [line for lines in sets for line in lines]


def check_that_held_out_means_held_out(share):
    corpus = Corpus(DEMO.corpus)
    held_out = {line["prompt"] for line in held_out_lines(corpus)}
    topics = corpus.topics
    facts = {fact.key: fact for topic in topics.values() for fact in topic.facts}
    new_to_stage_two = {
        topics[line["topic"]].ask(corpus.books[line["lang"]], facts[line["fact"]], phrasing)
        for line in refusal_set(corpus)
        if line["label"] == "sensitive"
        for phrasing in range(topics[line["topic"]].num_phrasings)
    }
    taught = set()
    for number, item in training_items(share):
        assert item.prompt not in held_out
        if number == 1:
            taught.add(item.prompt)
        else:
            assert item.prompt not in new_to_stage_two
    return corpus, facts, taught


def test_no_held_out_question_occurs_in_training():
    check_that_held_out_means_held_out(QUICK_SHARE)


@pytest.mark.soak
def test_held_out_facts_are_taught_in_that_language_otherwise_and_untaught_ones_never():
    share = 1.0 if float(os.environ.get("MOESCOPE_SOAK", "1")) >= 1 else 4 * QUICK_SHARE
    corpus, facts, taught = check_that_held_out_means_held_out(share)
    for line in held_out_lines(corpus):
        topic, fact = corpus.topics[line["topic"]], facts[line["fact"]]
        book = corpus.books[line["lang"]]
        questions = {topic.ask(book, fact, i) for i in range(topic.num_phrasings)}
        if line["split"] == "crosslingual":
            assert not questions & taught
        elif share == 1.0 and line["domain"] == "facts":  # tasks on any three words generalize
            assert questions & taught


def test_shipped_refusal_set_is_the_one_the_code_makes():
    assert refusal_set(Corpus(DEMO.corpus)) == refusal_lines()


def test_unknown_shipped_model_is_named_with_the_known_ones():
    with pytest.raises(ModelInputError, match=r"'nothing'.*demo"):
        load_shipped("nothing")
