"""Conditions in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.steering.condition_names import condition_in_words, control_kind


@pytest.mark.parametrize(
    ("condition", "kind", "words"),
    [
        ("unsteered", None, "unsteered"),
        ("steered", None, "steered"),
        ("control:random:0", "random", "random experts, seed 0"),
        ("control:load-matched:12", "load-matched", "random experts, matched on load, seed 12"),
        ("control:load-matched", "load-matched", "random experts, matched on load"),
        ("control:bottom", "bottom", "bottom of the ranking"),
        ("control:bottom:0", "bottom", "bottom of the ranking"),
        ("control:mine", "mine", "control mine"),
        ("control:a:b", "a:b", "control a:b"),
        ("control:a:b:3", "a:b", "control a:b, seed 3"),
        ("control", None, "control"),
    ],
)
def test_a_condition_has_a_kind_and_words(condition: str, kind: str | None, words: str) -> None:
    assert control_kind(condition) == kind
    assert condition_in_words(condition) == words


@given(st.sampled_from(["random", "load-matched"]), st.integers(0), st.integers(0))
def test_seeds_keep_conditions_apart(kind: str, one: int, other: int) -> None:
    words = [condition_in_words(f"control:{kind}:{seed}") for seed in (one, other)]
    assert (words[0] == words[1]) == (one == other)
