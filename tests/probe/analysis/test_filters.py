"""Filters: what users type, what is refused, what subtitles say."""

from __future__ import annotations

import pytest

from moescope.probe.analysis.filters import (
    Filters,
    parse_conditions,
    parse_layers,
    parse_scope,
)
from moescope.probe.errors import AnalysisInputError


def test_conditions_are_read() -> None:
    read = parse_conditions(["lang=en, de", "outcome=refused"])
    assert read == {"lang": ("en", "de"), "outcome": ("refused",)}
    assert parse_conditions(["key=a=b"]) == {"key": ("a=b",)}


@pytest.mark.parametrize("text", ["lang", "=en", "lang=", "lang=,", " =x"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(AnalysisInputError, match="FIELD=VALUE"):
        parse_conditions([text])


def test_a_field_with_two_conditions_is_refused() -> None:
    with pytest.raises(AnalysisInputError, match="two conditions"):
        parse_conditions(["lang=en", "lang=de"])


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("all", "all"),
        ("span", "span"),
        ("last_prompt", "last_prompt"),
        ("first_generated:8", {"first_generated": 8}),
        ('{"first_generated": 3}', {"first_generated": 3}),
    ],
)
def test_scopes_are_read(text: str, scope: object) -> None:
    assert parse_scope(text) == scope
    assert Filters(tokens=text).tokens == scope


@pytest.mark.parametrize(
    "text",
    ["", "some", "first_generated", "first_generated:0", "first_generated:-1", '{"last": 1}', "{",
     '{"first_generated": true}', '{"first_generated": 2.5}'],
)  # fmt: skip
def test_unknown_scopes_are_refused(text: str) -> None:
    with pytest.raises(AnalysisInputError, match="is not a token scope"):
        parse_scope(text)


@pytest.mark.parametrize("scope", [{"first_generated": 0}, {"last": 3}, {}])
def test_malformed_scopes_are_refused(scope: dict[str, int]) -> None:
    with pytest.raises(AnalysisInputError, match="is not a token scope"):
        Filters(tokens=scope)


def test_layers_are_read() -> None:
    assert parse_layers("0-3, 7") == (0, 1, 2, 3, 7)
    for text in ("", "a", "3-", "-3", "1,,2", "5-3"):
        with pytest.raises(AnalysisInputError, match="layers"):
            parse_layers(text)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"phase": "answer"}, "phase 'answer' does not exist"),
        ({"segments": ("user", "tool")}, "segment 'tool' does not exist"),
        ({"kind": "moe"}, "kind 'moe' does not exist"),
        ({"phase": "prompt", "tokens": "generated"}, "never of phase 'prompt'"),
        ({"phase": "generated", "tokens": "last_prompt"}, "never of phase 'generated'"),
        ({"phase": "prompt", "tokens": {"first_generated": 2}}, "never of phase 'prompt'"),
    ],
)
def test_impossible_filters_are_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(AnalysisInputError, match=match):
        Filters(**changes)


def test_descriptions() -> None:
    assert Filters().describe() == "prompt and generated content tokens"
    assert Filters(tokens="last_prompt").describe() == "last prompt tokens"
    assert Filters(phase="generated", content_only=False).describe() == "generated tokens"
    asked = Filters(
        fields={"lang": ("en", "de")}, tokens={"first_generated": 4}, layers=(2, 3), kind="mlp"
    )
    assert asked.describe() == (
        "lang=en,de; first 4 generated content tokens; layers 2, 3; mlp routers"
    )
    assert asked.to_json()["tokens"] == {"first_generated": 4}
