"""Scores of given answers against one forward per prompt, and steered against by-hand logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moescope.probe.errors import InputError
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt
from moescope.steering import SteeringPlan, steer
from moescope.steering.positions import answers_begin_at
from moescope.steering.rates import mean_over_units, rate
from moescope.steering.scoring import (
    ChoiceScore,
    answer_token_ids,
    exact_match,
    score_answers,
    score_choices,
    score_rows,
)

PLAN = SteeringPlan(
    interventions=[
        {"action": "mask", "layer": layer, "experts": [0, 1, 2], "tokens": "generated"}
        for layer in range(3)
    ]
)
ANSWERS = ["Yes.", "A much longer answer, with ünïcode", "", "no"]


def prompts() -> list[Prompt]:
    texts = ["Is it?", "What happened in the year 1911?", "x", "Why, then?"]
    return [Prompt(prompt_id=at, text=text, set_name="s") for at, text in enumerate(texts)]


def one_by_one(bundle: Any, prompt: Prompt, answer: str) -> list[float]:
    """Log-probabilities of an answer's tokens from a forward of its own, without padding."""
    rendered = render_prompt(bundle.tokenizer, prompt)
    token_ids = bundle.tokenizer(answer, add_special_tokens=False)["input_ids"]
    whole = torch.tensor([[*rendered.token_ids, *token_ids]])
    with torch.inference_mode(), answers_begin_at(len(rendered)):
        log_probs = bundle.model(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
    begin = len(rendered)
    return [float(log_probs[begin + at - 1, token]) for at, token in enumerate(token_ids)]


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 4096])
def test_answers_are_scored_as_one_forward_each_scores_them(
    tiny_bundle: Any, tokens_per_batch: int
) -> None:
    scores = score_answers(tiny_bundle, prompts(), ANSWERS, tokens_per_batch=tokens_per_batch)
    for prompt, answer, score in zip(prompts(), ANSWERS, scores, strict=True):
        expected = one_by_one(tiny_bundle, prompt, answer)
        assert score.num_tokens == len(answer.encode())
        assert score.log_probs == pytest.approx(expected, abs=1e-4)
        assert score.total == pytest.approx(sum(expected), abs=1e-3)
        if expected:
            assert score.mean == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert scores[2].total == 0
    assert math.isnan(scores[2].mean)
    assert math.isnan(scores[0].mean_from(5))
    assert scores[0].mean_from(4) == pytest.approx(scores[0].log_probs[3])


def test_under_steer_the_steered_model_is_scored(tiny_bundle: Any) -> None:
    before = score_answers(tiny_bundle, prompts(), ANSWERS)
    with steer(tiny_bundle.model, PLAN):
        inside = score_answers(tiny_bundle, prompts(), ANSWERS)
        expected = [
            one_by_one(tiny_bundle, prompt, answer)
            for prompt, answer in zip(prompts(), ANSWERS, strict=True)
        ]
    for score, wanted in zip(inside, expected, strict=True):
        assert score.log_probs == pytest.approx(wanted, abs=1e-4)
    # The plan acts on generated tokens: the first answer token is decided at the prompt's last.
    assert inside[1].log_probs[0] == pytest.approx(before[1].log_probs[0], abs=1e-5)
    assert abs(inside[1].total - before[1].total) > 0.1
    after = score_answers(tiny_bundle, prompts(), ANSWERS)
    assert [one.total for one in after] == [one.total for one in before]


def test_choices_are_taken_by_sum_and_by_mean(tiny_bundle: Any) -> None:
    choices = [["a", "bb"], ["long and unlikely", "c", "c"], ["d"], ["e", "ff", "ggg"]]
    found = score_choices(tiny_bundle, prompts(), choices)
    for prompt, texts, score in zip(prompts(), choices, found, strict=True):
        expected = [one_by_one(tiny_bundle, prompt, text) for text in texts]
        totals = [sum(one) for one in expected]
        means = [sum(one) / len(one) for one in expected]
        assert score.totals == pytest.approx(totals, abs=1e-3)
        assert score.best_by_total == int(np.argmax(totals))
        assert score.best_by_mean == int(np.argmax(means))
    assert ChoiceScore((-3.0, -4.0), (-3.0, -1.0)).best_by_total == 0
    assert ChoiceScore((-3.0, -4.0), (-3.0, -1.0)).best_by_mean == 1
    assert ChoiceScore((-2.0, -2.0), (-1.0, -1.0)).best_by_mean == 0


@pytest.mark.parametrize("bad", [[], ["a", ""]])
def test_prompts_without_choices_are_refused(tiny_bundle: Any, bad: list[str]) -> None:
    with pytest.raises(InputError, match=r"prompt 2 \('What happened"):
        score_choices(tiny_bundle, prompts()[:2], [["a"], bad])


def test_an_answer_is_tokenized_where_it_stands(tiny_bundle: Any) -> None:
    for prompt in prompts():
        rendered = render_prompt(tiny_bundle.tokenizer, prompt, chat_template="off")
        joint = tiny_bundle.tokenizer(prompt.text + " é!", add_special_tokens=False)["input_ids"]
        found = answer_token_ids(tiny_bundle, rendered, " é!")
        assert (*rendered.token_ids, *found) == tuple(joint)
        # What comes before the prompt's text, such as a beginning-of-text token, is no obstacle.
        begun = replace(rendered, token_ids=(258, *rendered.token_ids))
        assert answer_token_ids(tiny_bundle, begun, " é!") == found


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("The Tower.", "the tower", True),
        ("  1911 ", "1911", True),
        ("It is the tower.", "the tower", False),
        ("the tower", "It is the tower.", False),
        ("B", "b", True),
        ("B, because", "B", False),
        ("", "x", False),
    ],
)
def test_exact_match_allows_nothing_besides(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) is same


def test_scores_become_rows_with_paired_changes() -> None:
    units = ["a", "a", "b", "c"]
    hits, before = [True, True, False, True], [False, True, False, False]
    level, change = score_rows("steered", "exact", hits, units=units, before=before, seed=3)
    assert (level.value, level.low, level.high) == rate(hits)
    assert (change.metric, change.n) == ("exact_change", 4)
    assert (change.value, change.low, change.high) == mean_over_units([1, 0, 0, 1], units, 3)
    (mean,) = score_rows("unsteered", "nats", [-1.0, -2.0, -3.0, -4.0], units=units, group="g")
    assert (mean.value, mean.low, mean.high) == mean_over_units([-1, -2, -3, -4], units, 0)
    assert (mean.group, mean.condition) == ("g", "unsteered")
