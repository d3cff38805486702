"""Answers in batches equal answers one by one; sampling is repeatable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moescope.probe.errors import InputError
from moescope.probe.generation import (
    GREEDY,
    Sampling,
    end_token_ids,
    generate_answers,
    pad_left,
    read_sampling,
)
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt

TEXTS = ["a", "which one is it, then?", "why", "what happened in 1911 in Aldora?", "b c"]


def rendered(bundle: Any) -> list[Any]:
    return [
        render_prompt(bundle.tokenizer, Prompt(prompt_id=i, text=text, set_name="s"))
        for i, text in enumerate(TEXTS)
    ]


def test_padding_is_on_the_left() -> None:
    batch = pad_left([[5], [6, 7, 8]], pad_id=0)
    assert batch.input_ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert batch.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch.lengths == (1, 3)


def test_batched_answers_equal_those_alone_and_keep_their_order(tiny_bundle: Any) -> None:
    prompts = rendered(tiny_bundle)
    calls: list[tuple[int, int]] = []
    together = generate_answers(
        tiny_bundle, prompts, max_new_tokens=5, progress=lambda *done: calls.append(done)
    )
    alone = [generate_answers(tiny_bundle, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert together == alone
    assert calls == [(5, 5)]
    ends = end_token_ids(tiny_bundle)
    for answer in together:
        assert 1 <= len(answer.token_ids) <= 5
        assert answer.ended == (answer.token_ids[-1] in ends)
        assert not ends & set(answer.token_ids[:-1])


def test_sampling_repeats_with_its_seed_and_varies_without(tiny_bundle: Any) -> None:
    prompts = rendered(tiny_bundle)

    def sample(seed: int, temperature: float = 2.0) -> list[Any]:
        chance = Sampling(do_sample=True, temperature=temperature, seed=seed)
        return generate_answers(
            tiny_bundle, prompts, max_new_tokens=5, tokens_per_batch=40, sampling=chance
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    greedy = generate_answers(tiny_bundle, prompts, max_new_tokens=5, tokens_per_batch=40)
    assert sample(1) != greedy


def test_sampling_is_read_from_a_file_or_refused(tmp_path: Path) -> None:
    assert read_sampling("greedy") == GREEDY
    file = tmp_path / "chance.json"
    file.write_text(json.dumps({"temperature": 0.7, "seed": 3}))
    assert read_sampling(str(file)) == Sampling(do_sample=True, temperature=0.7, seed=3)
    file.write_text(json.dumps({"heat": 1}))
    with pytest.raises(InputError, match="temperature, top_p and seed"):
        read_sampling(str(file))
    with pytest.raises(InputError, match="neither"):
        read_sampling(str(tmp_path / "gone.json"))
