"""Answers by another decoding beside the model's own: outcomes, changes, and what runs beside."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from moescope.probe.errors import InputError, MoescopeError
from moescope.probe.prompts import Prompt
from moescope.steering.contrast_decoding import contrasting
from moescope.steering.decoding import compare_decoding, right_prompts
from moescope.steering.remix import Remix, remix
from moescope.steering.remix_store import references_of


def asked(texts: list[str], **more: Any) -> list[Prompt]:
    return [
        Prompt(prompt_id=at + 3, text=text, set_name="typed", **more)
        for at, text in enumerate(texts)
    ]


PROMPTS = asked(["Where is the ring?", "Hello", "What happened in 1868?", "Hi"])


def written(found: Any) -> list[str]:
    return [answer.text for answer, _ in found.answers("steered")]


def test_the_models_own_decoding_changes_nothing(tiny_bundle: Any) -> None:
    found = compare_decoding(
        tiny_bundle, PROMPTS, lambda _: nullcontext(), name="same", max_new_tokens=4
    )
    assert found.answers("unsteered") == found.answers("steered")
    assert found.lines()[-1] == "answers of 4 that differ: same 0"
    frame = found.frame
    assert (
        frame[frame["metric"].str.endswith("_change")][["value", "low", "high"]]
        .eq(0)
        .all(axis=None)
    )
    for condition in ("unsteered", "steered"):
        rates = frame[(frame["condition"] == condition) & ~frame["metric"].str.endswith("_change")]
        assert rates["value"].sum() == pytest.approx(1.0)
    assert found.to_json()["settings"]["sampling"]["seed"] == 0


def test_a_change_is_paired_and_counts_units_not_prompts(tiny_bundle: Any) -> None:
    own = compare_decoding(
        tiny_bundle, PROMPTS, lambda _: nullcontext(), name="same", max_new_tokens=4
    )
    known = [own.answers("unsteered")[0][0].text, *["none of these"] * 3]
    prompts = [
        Prompt(prompt_id=at, text=one.text, set_name="t", expected=expected, pair_id="one")
        for at, (one, expected) in enumerate(zip(PROMPTS, known, strict=True))
    ]
    found = compare_decoding(
        tiny_bundle, prompts, lambda _: contrasting(tiny_bundle.model), name="self-contrast",
        max_new_tokens=4,
    )  # fmt: skip
    frame = found.frame.set_index(["condition", "metric"])["value"]
    change = frame["steered", "correct_change"]
    assert change == frame["steered", "correct"] - frame["unsteered", "correct"]
    lows = found.frame.set_index(["condition", "metric"])["low"]
    assert lows.isna()["steered", "correct_change"]  # one unit has no interval


def test_remixing_by_prompt_id_is_the_same_in_any_batch(tiny_bundle: Any) -> None:
    model = tiny_bundle.model
    references = references_of(tiny_bundle, asked(["Where?", "When?", "Hello there", "1868"]))
    texts = {prompt.prompt_id: prompt.text for prompt in PROMPTS}
    together, alone = (
        compare_decoding(
            tiny_bundle, PROMPTS,
            lambda sites: remix(model, references, texts, Remix(num_layers=2), sites=sites),
            name="remix", max_new_tokens=4, tokens_per_batch=size,
        )
        for size in (4096, 1)
    )  # fmt: skip
    assert written(together) == written(alone)
    assert written(together) != [answer.text for answer, _ in together.answers("unsteered")]
    del texts[3]
    with pytest.raises(MoescopeError, match="no text of prompt 3"):
        compare_decoding(
            tiny_bundle, PROMPTS, lambda _: remix(model, references, texts), name="remix",
            max_new_tokens=4,
        )  # fmt: skip
    ids = torch.tensor([[1, 2]])
    with pytest.raises(MoescopeError, match="which prompts run"), remix(model, references, texts):
        model(input_ids=ids)


def test_right_prompts_are_those_the_model_answers_right(tiny_bundle: Any) -> None:
    own = compare_decoding(
        tiny_bundle, PROMPTS, lambda _: nullcontext(), name="same", max_new_tokens=6
    )
    texts = [answer.text for answer, _ in own.answers("unsteered")]
    prompts = [
        Prompt(prompt_id=at, text=one.text, set_name="t", expected=text if at < 2 else "never this")
        for at, (one, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]
    found = right_prompts(tiny_bundle, prompts, max_new_tokens=6)
    assert [one.prompt_id for one in found] == [0, 1]
    assert right_prompts(tiny_bundle, prompts[:2], at_most=1, seed=1, max_new_tokens=6) != found
    with pytest.raises(InputError, match="none of 2"):
        right_prompts(tiny_bundle, prompts[2:], max_new_tokens=6)
