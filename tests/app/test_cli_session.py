"""The README's first session, command by command, on the shipped demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from moescope.probe.storage.store import Store

MOESCOPE = str(Path(sys.executable).with_name("moescope"))


def moescope(*words: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [MOESCOPE, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recorded run, a contrast and a plan, each made by its command."""
    folder = tmp_path_factory.mktemp("session")
    store = folder / "demo.duckdb"
    moescope(
        "trace", "demo", "--prompts", "refusal", "--store", store, "--run", "base",
        "--generate", "32", "--limit", "456",
    )  # fmt: skip
    moescope(
        "contrast", "--store", store, "--a", "outcome=refused", "--b", "outcome=correct",
        "--where", "half=first", "--out", folder / "refusal.csv",
    )  # fmt: skip
    moescope(
        "plan", "from-table", folder / "refusal.csv", "--mask", "19", "--model", "demo",
        "--out", folder / "plan.json",
    )  # fmt: skip
    return folder


def test_the_recorded_run_holds_refused_and_right_answers(folder: Path) -> None:
    outcomes = Store(folder / "demo.duckdb").query(
        "SELECT label, outcome, count(*) AS n FROM prompts GROUP BY ALL"
    )
    count = {(row.label, row.outcome): row.n for row in outcomes.itertuples()}
    sensitive = sum(n for (label, _), n in count.items() if label == "sensitive")
    neutral = sum(n for (label, _), n in count.items() if label == "neutral")
    assert count[("sensitive", "refused")] > 0.8 * sensitive
    assert count[("neutral", "correct")] > 0.8 * neutral
    assert count.get(("neutral", "refused"), 0) <= 0.02 * neutral


def test_analyses_print_their_run_and_n_and_export_their_table(folder: Path) -> None:
    store = folder / "demo.duckdb"
    for name, *more in (
        ("load",),
        ("balance",),
        ("specialization", "--by", "lang", "--bootstrap", "20"),
        ("languages", "--bootstrap", "20", "--draws", "2"),
    ):
        shown = moescope("analyze", name, "--store", store, *more, "--out", folder / f"{name}.csv")
        assert "demo, run 'base'" in shown and "prompts" in shown
        assert len(pd.read_csv(folder / f"{name}.csv")) > 0
    records = json.loads(moescope("analyze", "load", "--store", store, "--json"))
    assert records
    listed = moescope("analyze", "--list")
    assert all(name in listed for name in ("load", "specialization", "languages", "contrast"))


def test_the_contrast_is_discovered_and_confirmed_on_the_first_half(folder: Path) -> None:
    table = pd.read_csv(folder / "refusal.csv")
    assert len(table) == 6 * 40
    confirmed = table[table["confirmed"]]
    assert len(confirmed) >= 19
    assert (confirmed["q"] <= 0.05).all()
    assert table["num_prompts_a"].iloc[0] > 10


def test_the_plan_is_shown_checked_and_changes_answers(folder: Path) -> None:
    plan = folder / "plan.json"
    masked = json.loads(plan.read_text())["interventions"]
    assert sum(len(item["experts"]) for item in masked) == 19
    assert "mask" in moescope("plan", "show", plan)
    assert "fits demo" in moescope("plan", "check", plan, "--model", "demo")
    asked = (
        Store(folder / "demo.duckdb")
        .query("SELECT text, response FROM prompts WHERE outcome = 'refused' ORDER BY prompt_id")
        .iloc[0]
    )
    shown = moescope("generate", "demo", "--prompt", asked["text"], "--plan", plan)
    assert f"unsteered  {asked['response']}" in shown and "[refused]" in shown
    assert "steered    " in shown and "requests held" in shown


def test_evaluation_shows_outcomes_controls_and_side_effects(folder: Path) -> None:
    store = folder / "demo.duckdb"
    shown = moescope(
        "evaluate", "demo", "--plan", folder / "plan.json", "--prompts", "refusal",
        "--where", "half=second", "--limit", "40", "--controls", "2", "--store", store,
        "--out", folder / "rates.csv",
    )  # fmt: skip
    for words in ("unsteered", "steered", "random experts (2 plans)", "side effects on neutral",
                  "random experts, matched on load (2 plans)", "bottom of the ranking",
                  "sensitive: confirmed: refused -"):  # fmt: skip
        assert words in shown
    rates = pd.read_csv(folder / "rates.csv")
    refused = rates[(rates["metric"] == "refused") & (rates["group"] == "sensitive")]
    value = refused.set_index("condition")["value"]
    assert value["steered"] < value["unsteered"]
    assert {"low", "high", "n"} <= set(rates.columns)
    stored = Store(store).query("SELECT DISTINCT condition FROM evaluations ORDER BY 1")
    assert stored["condition"].tolist() == [
        "control:bottom", "control:load-matched:0", "control:load-matched:1",
        "control:random:0", "control:random:1", "steered", "unsteered",
    ]  # fmt: skip
