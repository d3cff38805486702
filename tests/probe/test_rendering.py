"""Prompts as tokens: which token is whose, and no special token twice."""

from __future__ import annotations

from typing import Any

import pytest

from moescope.probe.errors import ModelInputError
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt


def segment_text(tokenizer: Any, rendered: Any, segment: str) -> str:
    ids = [
        token
        for token, found in zip(rendered.token_ids, rendered.segments, strict=True)
        if found == segment
    ]
    return str(tokenizer.decode(ids))


def test_segments_cover_exactly_their_text(byte_tokenizer: Any) -> None:
    prompt = Prompt(prompt_id=0, text="¿Qué pasó en Aldora?", set_name="s", span="Aldora")
    rendered = render_prompt(byte_tokenizer, prompt, system="user: be brief")
    assert segment_text(byte_tokenizer, rendered, "user") == prompt.text
    assert segment_text(byte_tokenizer, rendered, "system") == "user: be brief"
    spanned = [t for t, inside in zip(rendered.token_ids, rendered.in_span, strict=True) if inside]
    assert byte_tokenizer.decode(spanned) == "Aldora"
    assert byte_tokenizer.decode(rendered.token_ids) == rendered.text
    assert rendered.text.endswith("<|assistant|>\n")
    assert sum(rendered.is_special) == 5
    assert all(
        segment == "template"
        for segment, special in zip(rendered.segments, rendered.is_special, strict=True)
        if special
    )


def test_the_same_words_in_two_turns_are_told_apart(byte_tokenizer: Any) -> None:
    turns = (
        {"role": "user", "content": "same"},
        {"role": "assistant", "content": "same"},
        {"role": "user", "content": "same"},
    )
    prompt = Prompt(prompt_id=0, text="same", messages=turns, set_name="s")
    rendered = render_prompt(byte_tokenizer, prompt)
    assert segment_text(byte_tokenizer, rendered, "answer") == "same"
    assert segment_text(byte_tokenizer, rendered, "user") == "samesame"


def test_without_a_template_the_text_is_the_prompt(byte_tokenizer: Any) -> None:
    prompt = Prompt(prompt_id=0, text="plain", set_name="s")
    rendered = render_prompt(byte_tokenizer, prompt, chat_template="off")
    assert rendered.text == "plain" and set(rendered.segments) == {"user"}


def test_a_template_that_trims_still_finds_the_text(byte_tokenizer: Any) -> None:
    prompt = Prompt(prompt_id=0, text="  padded \n", set_name="s")
    original = byte_tokenizer.chat_template
    byte_tokenizer.chat_template = original.replace("['content']", "['content'] | trim")
    try:
        rendered = render_prompt(byte_tokenizer, prompt)
        assert segment_text(byte_tokenizer, rendered, "user") == "padded"
        byte_tokenizer.chat_template = original.replace("['content']", "['content'] | upper")
        with pytest.raises(ModelInputError, match="changes the user text"):
            render_prompt(byte_tokenizer, prompt)
    finally:
        byte_tokenizer.chat_template = original


def test_a_missing_template_is_refused_only_when_asked_for(byte_tokenizer: Any) -> None:
    prompt = Prompt(prompt_id=0, text="x", set_name="s")
    original, byte_tokenizer.chat_template = byte_tokenizer.chat_template, None
    try:
        assert render_prompt(byte_tokenizer, prompt).text == "x"
        with pytest.raises(ModelInputError, match="no chat template"):
            render_prompt(byte_tokenizer, prompt, chat_template="on")
    finally:
        byte_tokenizer.chat_template = original


def test_two_system_texts_are_refused(byte_tokenizer: Any) -> None:
    turns = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})
    prompt = Prompt(prompt_id=0, text="b", messages=turns, set_name="s")
    with pytest.raises(ModelInputError, match="system turn of its own"):
        render_prompt(byte_tokenizer, prompt, system="c")
