"""Fluency: bars by hand, what they may change, and word salad of the demo model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.probe.models import ModelBundle, load_model
from moescope.probe.outcomes import DETECTOR, OUTCOMES, Judgement
from moescope.probe.prompts import Prompt, read_prompts
from moescope.steering import SteeringPlan
from moescope.steering.evaluate import evaluate_plan
from moescope.steering.fluency import (
    LEAST_BAR,
    FluencyBar,
    FluencyJudge,
    Threshold,
    answer_nll,
    judge_fluency,
    length_band,
    paired_neutral,
)
from moescope.steering.scoring import score_answers


def test_bands_double() -> None:
    lengths = [1, 3, 4, 7, 8, 15, 16, 31, 32, 100]
    assert [length_band(one) for one in lengths] == [1, 2, 4, 4, 8, 8, 16, 16, 32, 64]


def test_bars_are_percentiles_of_their_language_and_length_or_of_coarser_groups() -> None:
    nll = [*np.linspace(0.0, 1.0, 101), *np.linspace(2.0, 3.0, 5), 9.0, float("nan")]
    num_tokens = [5] * 101 + [6] * 5 + [20] + [3]
    langs = ["en"] * 101 + ["de"] * 5 + ["de"] + ["en"]
    bar = FluencyBar.fit(nll, num_tokens, langs, min_answers=20)
    assert bar.n == 107
    assert bar.of("en", 7) == Threshold("en", 4, pytest.approx(0.99), 101)
    of_band = np.quantile(nll[:106], 0.99)
    assert bar.of("de", 4) == Threshold(None, 4, pytest.approx(of_band), 106)
    of_all = np.quantile(nll[:107], 0.99)
    assert bar.of("en", 16) == Threshold(None, None, pytest.approx(of_all), 107)
    assert bar.of(None, 5) == bar.of("de", 5)
    few = FluencyBar.fit(nll[:19], num_tokens[:19], langs[:19])
    assert few.of("en", 5) is None
    assert few.in_words() == (
        "fluency was not judged: 19 complied neutral answers are long enough, and a bar needs 20"
    )


judged_answers = st.lists(
    st.tuples(
        st.sampled_from(OUTCOMES),
        st.one_of(st.floats(0, 10), st.just(float("nan"))),
        st.integers(0, 40),
        st.sampled_from(["en", "de", None]),
    )
)


@given(judged_answers, st.floats(0, 10))
def test_only_other_becomes_broken_and_only_over_the_bar(
    answers: list[tuple[Any, float, int, str | None]], nats: float
) -> None:
    bar = FluencyBar((Threshold(None, 4, nats, 20), Threshold("en", 8, 0.0, 20)), 40)
    before = [Judgement(outcome, reason="r") for outcome, *_ in answers]
    after = judge_fluency(
        before, [one[1] for one in answers], [one[2] for one in answers],
        [one[3] for one in answers], bar,
    )  # fmt: skip
    for old, new, (outcome, value, tokens, lang) in zip(before, after, answers, strict=True):
        limit = nats if 4 <= tokens < 8 else 0.0 if lang == "en" and 8 <= tokens < 16 else math.inf
        if outcome == "other" and value > max(limit, LEAST_BAR):
            assert new.outcome == "broken"
            assert new.reason.startswith("fluency: ")
            assert new.detector == f"{DETECTOR}+fluency-2"
        else:
            assert (new.outcome, new.reason) == (old.outcome, old.reason)
            if outcome != "other":
                assert new == old


def prompt(at: int, **fields: Any) -> Prompt:
    return Prompt(**{"prompt_id": at, "text": f"What is {at}?", "set_name": "s", **fields})


def test_the_neutral_partner_is_of_the_same_pair_and_language() -> None:
    asked = [
        prompt(0, label="sensitive", pair_id="p", lang="en"),
        prompt(1, label="neutral", pair_id="p", lang="de"),
        prompt(2, label="neutral", pair_id="p", lang="en"),
        prompt(3, label="sensitive", pair_id="q", lang="en"),
        prompt(4, label="sensitive", lang="en"),
        prompt(5, label="neutral", lang="en"),
    ]
    found = paired_neutral(asked, [one.label or "" for one in asked], "neutral")
    assert [one and one.prompt_id for one in found] == [2, 1, 2, None, None, 5]


def test_nats_count_from_the_fourth_token_and_thinking_is_left_out(tiny_bundle: Any) -> None:
    asked = [prompt(at) for at in range(4)]
    answers = ["a long answer", "abc", "<think>hm, well</think>a long answer", "abcd"]
    scores = score_answers(tiny_bundle, asked, ["a long answer", "abc", "a long answer", "abcd"])
    found = answer_nll(tiny_bundle, asked, answers)
    assert found[0] == pytest.approx(-scores[0].log_probs[3:].mean(), rel=1e-5)
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(-scores[2].log_probs[3:].mean(), rel=1e-5)
    assert found[3] == pytest.approx(-scores[3].log_probs[3], rel=1e-5)


def test_without_enough_neutral_answers_or_a_prompt_nothing_is_judged(tiny_bundle: Any) -> None:
    asked = [prompt(at, lang="en") for at in range(21)]
    others = [Judgement("other")] * 21
    answers = ["aaaa"] * 20 + ["q9%~!! zz"]
    judge = FluencyJudge(tiny_bundle, asked, ["en"] * 21)
    judge.fit(range(19), answers, others)
    assert judge.judge(answers, others) == tuple(others)
    judge.fit(range(20), answers, [Judgement("refused")] * 21)
    assert judge.bar.n == 0
    unseen = FluencyJudge(tiny_bundle, [*asked[:20], None], ["en"] * 21)
    unseen.fit(range(20), answers, others)
    assert unseen.bar.n == 20
    assert unseen.judge(answers, others)[20].outcome == "other"


@pytest.fixture(scope="module")
def demo() -> ModelBundle:
    return load_model("demo", device="cpu")


@pytest.mark.parametrize("judge_name", ["demo-base", "demo"])
def test_word_salad_of_a_steered_model_is_broken(demo: ModelBundle, judge_name: str) -> None:
    english = [one for one in read_prompts(["refusal"]) if one.lang == "en"]
    neutral = [one for one in english if one.label == "neutral"][:22]
    chosen = [*neutral, *[one for one in english if one.label == "sensitive"][:2]]
    # Few experts left: half words and foreign letters come out, in the right script by and large.
    random = np.random.default_rng(0)
    plan = SteeringPlan(
        interventions=[
            {"action": "mask", "layer": layer, "experts": random.permutation(32)[:27].tolist()}
            for layer in range(6)
        ]
    )
    judge = demo if judge_name == "demo" else load_model(judge_name, device="cpu")
    settings: dict[str, Any] = {"num_controls": 0, "max_new_tokens": 16}
    plain = evaluate_plan(demo, plan, chosen, judges_fluency=False, **settings)
    assert plain.context["detector"] == DETECTOR
    found = evaluate_plan(
        demo, plan, chosen, judge_bundle=judge, unsteered=plain.conditions[0], **settings
    )
    assert found.context["detector"] == f"{DETECTOR}+fluency-2"
    assert found.context["judge_model"] == judge_name
    assert any(note.startswith("fluency was judged by") for note in found.notes)
    bars = found.frame[found.frame["metric"].str.startswith("fluency_bar:")]
    assert set(bars["n"]) <= {20, 21, 22}
    for before, after in zip(plain.conditions, found.conditions, strict=True):
        for old, new in zip(before.judgements, after.judgements, strict=True):
            changed = (old.outcome, new.outcome)
            assert changed == ("other", "broken") or old.outcome == new.outcome
    words = {word for one in english for word in (one.expected or "").rstrip(".").split()}
    salad, language = [], []
    for old, new, answer in zip(
        plain.conditions[1].judgements, found.conditions[1].judgements,
        found.conditions[1].answers, strict=True,
    ):  # fmt: skip
        if old.outcome == "other":
            (salad if new.outcome == "broken" else language).append(answer.text)
    # Sentences of known words stay answers, if wrong ones; what has become broken is not language.
    assert len(salad) >= 3
    assert len(language) >= 3
    assert all(set(text.rstrip(".?").split()) - words for text in salad)
    assert any(not set(text.rstrip(".").split()) - words for text in language)
    assert found.value("steered", "neutral", "correct") == plain.value(
        "steered", "neutral", "correct"
    )
    assert found.value("unsteered", "neutral", "broken") <= 0.1
