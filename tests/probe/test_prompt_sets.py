"""The shipped prompt sets: what their cards say, and that held-out means held out."""

import hashlib
import json
import re
from collections import Counter

import pytest

from moescope.probe.prompts import read_prompts
from moescope.probe.shipped import shipped_path, shipped_prompt_sets


def lines_of(name):
    text = shipped_path("prompts", f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", shipped_prompt_sets())
def test_card_names_the_hash_and_the_number_of_prompts(name):
    data = shipped_path("prompts", f"{name}.jsonl").read_bytes()
    card = shipped_path("prompts", f"{name}.md").read_text(encoding="utf-8")
    assert hashlib.sha256(data).hexdigest() in card
    assert int(re.search(r"(\d+) prompts", card).group(1)) == len(lines_of(name))
    assert "CC0-1.0" in card


@pytest.mark.parametrize("name", shipped_prompt_sets())
def test_ids_are_unique_and_the_file_reads(name):
    lines = lines_of(name)
    assert len({line["id"] for line in lines}) == len(lines)
    prompts = read_prompts([name])
    assert [prompt.text for prompt in prompts] == [line["prompt"] for line in lines]
    assert [prompt.expected for prompt in prompts] == [line["answer"] for line in lines]


def test_refusal_pairs_differ_in_the_span_alone():
    pairs = {}
    for line in lines_of("refusal"):
        pair = pairs.setdefault((line["lang"], line["pair_id"]), {})
        assert line["label"] not in pair
        pair[line["label"]] = line
    assert len(pairs) >= 60
    for pair in pairs.values():
        assert set(pair) == {"sensitive", "neutral"}
        sensitive, neutral = pair["sensitive"], pair["neutral"]
        assert sensitive["span"] in sensitive["prompt"]
        rest = sensitive["prompt"].replace(sensitive["span"], neutral["span"], 1)
        assert rest == neutral["prompt"]
        assert sensitive["fact"] == sensitive["pair_id"]


def test_halves_deal_whole_units_evenly():
    lines = lines_of("refusal")
    half_of = {}
    for line in lines:
        assert half_of.setdefault(line["pair_id"], line["half"]) == line["half"]
    assert Counter(half_of.values())["first"] == Counter(half_of.values())["second"]
    counts = Counter((line["half"], line["lang"], line["label"]) for line in lines)
    assert set(counts.values()) == {len(half_of) // 2}


def test_parallel_has_every_content_in_every_language():
    counts = Counter(line["lang"] for line in lines_of("parallel"))
    contents = {line["pair_id"] for line in lines_of("parallel")}
    assert len(contents) >= 60
    assert set(counts.values()) == {len(contents)}


def test_refusal_has_1200_prompts_and_20_in_every_cell():
    lines = lines_of("refusal")
    cells = Counter((line["lang"], line["family"], line["label"]) for line in lines)
    assert len(lines) >= 1200
    assert len(cells) == 8 * 3 * 2
    assert min(cells.values()) >= 20


@pytest.mark.parametrize("name", ["domains", "neutral", "crosslingual"])
def test_every_set_covers_every_language_and_domain_it_is_about(name):
    lines = lines_of(name)
    assert len({line["lang"] for line in lines}) == 8
    if name == "domains":
        cells = Counter((line["lang"], line["domain"]) for line in lines)
        assert len(cells) == 8 * 5 and min(cells.values()) == max(cells.values())
    if name == "crosslingual":
        assert all(line["lang"] not in line["taught_in"] for line in lines)
        assert all(line["taught_in"] for line in lines)
