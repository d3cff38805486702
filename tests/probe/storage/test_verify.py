"""A run that contradicts itself is found out, with prompt, layer and numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest

from moescope.probe.errors import RunError
from moescope.probe.storage import Store, verify_run
from moescope.probe.storage.verify import (
    PROBLEMS_PER_CHECK,
    find_problems,
    weights_follow_rank,
)

Change = Callable[[Path, str], None]
Damage = Callable[[duckdb.DuckDBPyConnection, str], None]


@pytest.fixture(scope="module")
def opened(filled_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    copy = shutil.copy(filled_once, tmp_path_factory.mktemp("verify") / "runs.duckdb")
    with duckdb.connect(str(copy)) as con:
        yield con


@pytest.fixture
def con(opened: duckdb.DuckDBPyConnection) -> Iterator[duckdb.DuckDBPyConnection]:
    """One complete run, `base`, to damage: every test's changes are rolled back."""
    opened.execute("BEGIN").fetchall()
    yield opened
    opened.execute("ROLLBACK").fetchall()


def sentences(con: duckdb.DuckDBPyConnection) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in find_problems(con, "base"):
        assert str(problem) == problem.sentence
        found.setdefault(problem.check, []).append(problem.sentence)
    return found


def test_a_good_run_has_no_problems(store: Path) -> None:
    assert verify_run(Store(store), "base") == []


def test_an_unknown_run_is_an_error(store: Path) -> None:
    with pytest.raises(RunError, match="no run 'x'"):
        verify_run(Store(store), "x")


@pytest.mark.parametrize(
    ("sql", "check", "sentence"),
    [
        (
            "DELETE FROM prompts WHERE prompt_id = 2",
            "planned prompts",
            "prompt 2 is planned but not stored",
        ),
        (
            "UPDATE prompts SET prompt_id = 77 WHERE prompt_id = 2",
            "planned prompts",
            "prompt 77 is stored but not planned",
        ),
        (
            "DELETE FROM prompts WHERE prompt_id = 2",
            "planned prompts",
            "6 prompts are planned, 5 are stored",
        ),
        (
            "INSERT INTO prompts SELECT * FROM prompts WHERE prompt_id = 2",
            "prompts once",
            "prompt 2 is stored 2 times",
        ),
        (
            "DELETE FROM tokens WHERE prompt_id = 4 AND position = 1",
            "positions",
            "prompt 4 has 6 tokens, 3 of them generated; prompts says 4 + 3 generated",
        ),
        (
            "UPDATE tokens SET position = 9 WHERE prompt_id = 4 AND position = 1",
            "positions",
            "the positions of prompt 4 are not 0 to 6 once each: 7 rows, 0 to 9, 7 different",
        ),
        (
            "UPDATE tokens SET position = 2 WHERE prompt_id = 4 AND position = 1",
            "positions",
            "the positions of prompt 4 are not 0 to 6 once each: 7 rows, 0 to 6, 6 different",
        ),
        (
            "UPDATE tokens SET phase = 'prompt' WHERE prompt_id = 4 AND position = 5",
            "positions",
            "prompt 4 has 7 tokens, 2 of them generated; prompts says 4 + 3 generated",
        ),
        (
            "UPDATE tokens SET is_routed = false WHERE prompt_id = 5 AND position = 3",
            "routed tokens",
            "token 3 of prompt 5 is marked as not routed, only the last generated one can be",
        ),
        (
            "UPDATE tokens SET is_routed = true WHERE prompt_id = 5 AND position = 6",
            "usage",
            "prompt 5, layer 1 (mlp): usage counts 6 routed tokens, tokens has 7",
        ),
        (
            "DELETE FROM usage_arrays WHERE prompt_id = 1 AND layer = 0",
            "usage",
            "prompt 1, layer 0 (mlp): usage counts 0 routed tokens, tokens has 6",
        ),
        (
            "UPDATE usage_arrays SET num_tokens = [0, 0, 0, 0, 0, 1] "
            "WHERE prompt_id = 1 AND layer = 0 AND is_special",
            "usage",
            "prompt 1, layer 0 (mlp): usage sums to 11, 6 routed tokens x top-2 is 12",
        ),
        (
            "UPDATE usage_arrays SET num_tokens = num_tokens || [0] "
            "WHERE prompt_id = 1 AND layer = 0 AND is_special",
            "usage",
            "prompt 1, layer 0 (mlp): usage counts 7 experts, the layer has 6",
        ),
        (
            "UPDATE usage_arrays SET prob_sum = prob_sum[:5] "
            "WHERE prompt_id = 1 AND layer = 0 AND is_special",
            "usage",
            "prompt 1, layer 0 (mlp): usage counts 5 experts, the layer has 6",
        ),
        (
            "UPDATE usage_arrays SET layer = 7 WHERE prompt_id = 1 AND layer = 0",
            "usage",
            "usage has prompt 1 in layer 7 (mlp), tokens or layers have not",
        ),
        (
            "UPDATE routing SET expert = (expert + 1) % 6 "
            "WHERE prompt_id = 0 AND position = 2 AND layer = 1 AND rank = 0",
            "slots",
            "prompt 0, token 2, layer 1 (mlp): an expert is repeated, "
            "2 slots have 1 different experts",
        ),
        (
            "UPDATE routing SET expert = 6 "
            "WHERE prompt_id = 0 AND position = 2 AND layer = 1 AND rank = 0",
            "slots",
            "prompt 0, token 2, layer 1 (mlp): expert 6 is recorded, the layer has 6",
        ),
        (
            "UPDATE routing_arrays SET bf16_weights = bf16_weights[:1] "
            "WHERE prompt_id = 3 AND position = 0 AND layer = 0",
            "slots",
            "prompt 3, token 0, layer 0 (mlp): 2 slots have 1 weights",
        ),
        (
            "INSERT INTO routing_arrays SELECT * FROM routing_arrays "
            "WHERE prompt_id = 3 AND position = 0 AND layer = 0",
            "slots of tokens",
            "prompt 3, token 0, layer 0 (mlp): recorded 2 times",
        ),
        (
            "DELETE FROM routing WHERE prompt_id = 3 AND position = 0 AND layer = 0 AND rank = 1",
            "slots of tokens",
            "prompt 3, token 0, layer 0 (mlp): 1 slots are recorded, top-k is 2",
        ),
        (
            "DELETE FROM routing WHERE prompt_id = 3 AND position = 0 AND layer = 0",
            "slots of tokens",
            "prompt 3, token 0, layer 0 (mlp): 0 slots are recorded, top-k is 2",
        ),
        (
            "INSERT INTO routing SELECT * REPLACE (6 AS position) FROM routing "
            "WHERE prompt_id = 3 AND position = 0 AND layer = 0",
            "slots of tokens",
            "routing has 2 slots for prompt 3, token 6, layer 0 (mlp), "
            "which is no routed token in a layer of this run",
        ),
        (
            "UPDATE routing SET expert = (expert + 3) % 6 "
            "WHERE prompt_id = 2 AND position = 1 AND layer = 1 AND rank = 0",
            "usage by expert",
            "prompt 2, layer 1 (mlp): expert 2 is in 3 rows of routing, usage counts 2",
        ),
        (
            "UPDATE routing SET weight = 0.9 "
            "WHERE prompt_id = 2 AND position = 1 AND layer = 1 AND rank = 1",
            "weight order",
            "prompt 2, token 1, layer 1 (mlp): rank 1 has weight 0.9, the rank before it 0.625",
        ),
        (
            "UPDATE routing SET rank = 1 - rank WHERE prompt_id = 2 AND position = 1 AND layer = 1",
            "weight order",
            "prompt 2, token 1, layer 1 (mlp): rank 1 has weight 0.625, the rank before it 0.375",
        ),
    ],
)
def test_each_contradiction_is_found(
    con: duckdb.DuckDBPyConnection, damage: Damage, sql: str, check: str, sentence: str
) -> None:
    damage(con, sql)
    assert sentence in sentences(con)[check]


def test_unknown_ranks_are_no_contradiction(con: duckdb.DuckDBPyConnection, damage: Damage) -> None:
    damage(con, "UPDATE routing SET rank = NULL")
    assert sentences(con) == {}


def test_weights_need_not_follow_the_rank_under_a_selection_bias(
    con: duckdb.DuckDBPyConnection, damage: Damage
) -> None:
    biased = json.dumps({"score": "softmax", "selection_bias": True})
    damage(con, "UPDATE routing SET weight = 1 - weight")
    assert list(sentences(con)) == ["weight order"]
    damage(con, f"UPDATE layers SET rule = '{biased}'")
    assert sentences(con) == {}


def test_slots_that_steering_dropped_are_no_contradiction(
    con: duckdb.DuckDBPyConnection, damage: Damage
) -> None:
    damage(con, "UPDATE routing SET weight = 0 WHERE rank = 0 AND position = 1")
    assert list(sentences(con)) == ["weight order"]
    damage(con, "UPDATE runs SET plan_id = 'p'")
    assert sentences(con) == {}


@pytest.mark.parametrize(
    ("rule", "follows"),
    [
        ({"score": "softmax", "renormalize": True}, True),
        ({"score": "softmax", "selection_bias": False}, True),
        ({"score": "softmax", "selection_bias": True}, False),
        ({"score": "softmax", "verified": True}, True),
        ({"score": "softmax", "verified": False}, False),
        ({"score": "sigmoid"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_which_rules_order_weights(rule: dict[str, object] | None, follows: bool) -> None:
    assert weights_follow_rank(rule) is follows


def test_counts_without_slots_are_verified_too(
    tmp_path: Path, filled: Callable[..., Path], change: Change
) -> None:
    store = filled(tmp_path / "runs.duckdb", record_level="usage")
    assert verify_run(Store(store), "base") == []
    change(store, "DELETE FROM usage_arrays WHERE prompt_id = 0 AND layer = 1 AND NOT is_special")
    assert [problem.sentence for problem in verify_run(Store(store), "base")] == [
        "prompt 0, layer 1 (mlp): usage counts 1 routed tokens, tokens has 6"
    ]


def test_a_problem_that_is_everywhere_is_reported_a_few_times(
    con: duckdb.DuckDBPyConnection, damage: Damage
) -> None:
    damage(con, "DELETE FROM routing")
    found = sentences(con)
    assert {check: len(lines) for check, lines in found.items()} == {
        "slots of tokens": PROBLEMS_PER_CHECK,
        "usage by expert": PROBLEMS_PER_CHECK,
    }


def test_other_runs_in_the_store_are_not_mixed_in(
    store: Path, filled: Callable[..., Path], change: Change
) -> None:
    filled(store, run="other", num_shards=2)
    change(store, "DELETE FROM routing WHERE run_id = 'other'")
    change(store, "DELETE FROM layers WHERE run_id = 'other' AND layer = 1")
    assert verify_run(Store(store), "base") == []
    assert verify_run(Store(store), "other") != []
