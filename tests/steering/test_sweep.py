"""Sweeps: the table against the rows, and going on after SIGKILL."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from moescope.probe.demo.models import tuned_experts
from moescope.probe.errors import PlanError
from moescope.probe.models import load_model
from moescope.probe.prompts import Prompt, read_prompts
from moescope.probe.storage.store import Store
from moescope.steering import SteeringPlan
from moescope.steering.sweep import run_sweep, target_group
from moescope.steering.sweep_cells import (
    SweepCell,
    prompts_hash,
    sweep_grid,
    table_hash,
)
from moescope.steering.sweep_table import beats_controls, best_cell


def contrast() -> pd.DataFrame:
    """All experts of three layers, 0.9 down to 0.67 in effect; all are confirmed."""
    return pd.DataFrame({
        "layer": [at % 3 for at in range(24)],
        "expert": [at // 3 for at in range(24)],
        "effect": [0.9 - at / 100 for at in range(24)],
        "confirmed": True,
    })  # fmt: skip


def questions(num_units: int = 3) -> list[Prompt]:
    return [
        Prompt(prompt_id=2 * at + (label == "neutral"), text=f"What is {label} thing {at}?",
               set_name="s", label=label, pair_id=f"p{at}", lang="en", expected="no such answer")
        for at in range(num_units) for label in ("sensitive", "neutral")
    ]  # fmt: skip


def test_hashes_tell_content_apart() -> None:
    assert table_hash(contrast()) == table_hash(contrast().copy())
    assert table_hash(contrast()) != table_hash(contrast().assign(effect=0.5))
    assert prompts_hash(questions()) == prompts_hash(questions())
    for change in ({"label": "x"}, {"expected": None}, {"text": "?"}, {"lang": "de"}):
        changed = [replace(questions()[0], **change), *questions()[1:]]
        assert prompts_hash(changed) != prompts_hash(questions())


def test_the_group_is_the_only_one_that_is_not_neutral() -> None:
    assert target_group(questions(), "neutral", None) == "sensitive"
    assert target_group(questions(), "neutral", "neutral") == "neutral"
    with pytest.raises(PlanError, match="there are: neutral, sensitive"):
        target_group(questions(), "neutral", "odd")
    with pytest.raises(PlanError, match="only 'neutral'"):
        target_group(questions()[1:2], "neutral", None)
    with pytest.raises(PlanError, match="sensitive, unlabelled: name one"):
        target_group([*questions(), replace(questions()[0], label=None)], "neutral", None)


def evaluations(store: Path) -> pd.DataFrame:
    return Store(store).query("SELECT * FROM evaluations")


def test_finished_cells_are_found_and_the_table_says_what_the_rows_say(
    tiny_bundle: Any, tmp_path: Path
) -> None:
    store = tmp_path / "s.duckdb"
    other = SteeringPlan(name="o", interventions=[{"action": "mask", "layer": 0, "experts": [7]}])
    said: list[str] = []
    calls: list[tuple[int, int, str]] = []

    def sweep(counts: list[int], **changes: Any) -> Any:
        calls.clear()
        settings: dict[str, Any] = {
            "store_path": store, "name": "dose", "num_controls": 2, "max_new_tokens": 3,
            "make_controls": lambda plan, layers: {"other": other}, "say": said.append,
            "progress": lambda done, total, note="": calls.append((done, total, note)),
        }  # fmt: skip
        return run_sweep(
            tiny_bundle, contrast(), questions(), sweep_grid(counts), **(settings | changes)
        )

    first = sweep([1, 2])
    assert (first.num_found, said) == (0, [])
    # Unsteered once, then steered, two random controls and the given one of each cell.
    assert calls[-1][:2] == (6 * (1 + 2 * 4), 6 * (1 + 2 * 4))
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)
    assert calls[0][2] == "cell 1 of 2: 1 expert, replace"
    before = evaluations(store)

    more = sweep([1, 4, 2])
    assert more.num_found == 2
    assert said == [f"2 of 3 cells are in {store} already"]
    assert calls[-1][:2] == (6 * 5, 6 * 5)
    after = evaluations(store)
    pd.testing.assert_frame_equal(after[: len(before)], before)
    assert len(after) == 3 * len(before) / 2

    assert more.table["count"].tolist() == [1, 4, 2]
    assert [plan.plan_id for plan in more.plans] == more.table["plan_id"].tolist()
    pd.testing.assert_frame_equal(
        more.table.iloc[[0, 2]].reset_index(drop=True), first.table, check_exact=True
    )
    after["group"] = [json.loads(details)["group"] for details in after["details"]]
    for row in more.table.to_dict("records"):
        own = after[after["evaluation_id"] == row["evaluation_id"]]
        values = own.set_index(["condition", "group", "metric"])["value"]
        for outcome in ("correct", "other", "refused", "broken"):
            assert row[outcome] == values["steered", "sensitive", outcome]
            assert row[f"{outcome}_before"] == values["unsteered", "sensitive", outcome]
            assert row[f"{outcome}_other"] == values["control:other", "sensitive", outcome]
            band = [values[f"control:random:{seed}", "sensitive", outcome] for seed in (0, 1)]
            assert row[f"{outcome}_control_min"] == min(band)
            assert row[f"{outcome}_control_max"] == max(band)
            assert row[f"{outcome}_low"] <= row[outcome] <= row[f"{outcome}_high"]
        assert row["neutral_broken"] == values["steered", "neutral", "broken"]
        assert row["kl_answer"] == values["steered", "neutral", "kl_answer"]
        assert row["tokens_per_s"] == values["steered", "all", "tokens_per_s"]
        assert row["num_prompts"] == 3
    details = json.loads(after["details"].iloc[0])
    assert details["sweep"] == "dose"
    assert details["cell"] == {"count": 1, "mode": "replace", "layers": "all", "strength": None}


def test_a_cell_is_made_again_when_anything_it_depends_on_changed(
    tiny_bundle: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "store_path": tmp_path / "s.duckdb", "name": "dose", "num_controls": 0, "max_new_tokens": 1,
    }  # fmt: skip
    other = SteeringPlan(name="o", interventions=[{"action": "mask", "layer": 0, "experts": [7]}])

    def num_found(prompts: list[Prompt], frame: pd.DataFrame, **changes: Any) -> int:
        cells = [SweepCell(count=1)]
        return run_sweep(tiny_bundle, frame, prompts, cells, **(settings | changes)).num_found

    asked, table = questions(1), contrast()
    assert [num_found(asked, table), num_found(asked, table)] == [0, 1]
    for changes in (
        {"name": "again"}, {"seed": 1}, {"max_new_tokens": 2}, {"num_controls": 1},
        {"make_controls": lambda plan, layers: {"other": other}}, {"chat_template": "off"},
        {"judge_bundle": replace(tiny_bundle, name="another")},
    ):  # fmt: skip
        assert num_found(asked, table, **changes) == 0, changes
    assert num_found([replace(asked[0], expected="x"), asked[1]], table) == 0
    assert num_found(asked, table.assign(note="x")) == 0
    assert num_found(asked, table) == 1


def test_a_cell_without_room_stops_the_sweep_before_anything_is_made(
    tiny_bundle: Any, tmp_path: Path
) -> None:
    store = tmp_path / "s.duckdb"
    with pytest.raises(PlanError, match="cell '19 experts, replace'"):
        run_sweep(
            tiny_bundle, contrast(), questions(), sweep_grid([1, 19]), store_path=store, name="x"
        )
    assert not store.exists()


def cells_table(**changes: list[float]) -> pd.DataFrame:
    return pd.DataFrame({
        "count": [1, 2, 5, 10],
        "correct": [0.2, 0.6, 0.8, 0.8], "other": [0.0, 0.3, 0.0, 0.2],
        "refused": [0.8, 0.1, 0.2, 0.0],
        "correct_control_max": [0.2, 0.3, 0.3, 0.9], "other_control_max": [0.0, 0.0, 0.5, 0.0],
        "refused_control_max": [0.1, 0.9, 0.9, 0.9],
        "neutral_correct_before": [0.9] * 4, "neutral_correct": [0.9, 0.85, 0.84, 0.5],
        **changes,
    })  # fmt: skip


def test_the_best_cell_has_most_of_what_is_wanted_within_the_budget() -> None:
    table = cells_table()
    assert best_cell(table) == 2  # 10 experts do no more
    assert best_cell(table, budget=6) == 2
    assert best_cell(table, budget=5) == 1  # a fall of exactly 5 points is within it
    assert best_cell(table, budget=0) == 0
    assert best_cell(table, goal="complied") == 3
    assert best_cell(table, goal="refused") == 0
    with pytest.raises(PlanError, match=r"within 1 points; the cheapest costs 2\.0"):
        best_cell(cells_table(neutral_correct=[0.88, 0.5, 0.5, 0.5]), budget=1)
    unmeasured = cells_table(
        neutral_correct=[float("nan")] * 4, neutral_correct_before=[float("nan")] * 4
    )
    assert best_cell(unmeasured) == 2
    with pytest.raises(PlanError, match="gives none"):
        best_cell(unmeasured, budget=5)


def test_a_cell_beats_its_controls_when_it_has_more_than_each() -> None:
    table = cells_table()
    assert [beats_controls(table, row) for row in range(4)] == [False, True, True, False]
    assert beats_controls(table, 2, "complied") is False
    assert beats_controls(table, 0, "refused") is True
    assert beats_controls(cells_table(correct_control_max=[float("nan")] * 4), 0) is None


def demo_table() -> pd.DataFrame:
    """The tuned experts of the demo model first, then the others of layers 0 to 5."""
    tuned = tuned_experts("demo")
    rows = [
        {"layer": layer, "expert": expert, "confirmed": True,
         "effect": (0.9 if expert in tuned.get(layer, []) else 0.5) - (32 * layer + expert) / 1000}
        for layer in range(6) for expert in range(32)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def demo_prompts() -> list[Prompt]:
    return [one for one in read_prompts(["refusal"]) if one.lang == "en"][:8]


DEMO: dict[str, Any] = {"name": "demo", "num_controls": 1, "max_new_tokens": 16}

CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_sweep import DEMO, demo_prompts, demo_table
from moescope.probe.models import load_model
from moescope.steering.sweep import run_sweep
from moescope.steering.sweep_cells import sweep_grid

def progress(done, total, note=""):
    print(note, flush=True)
    if note.startswith({stop!r}):
        time.sleep(60)

run_sweep(load_model("demo", device="cpu"), demo_table(), demo_prompts(), sweep_grid({counts}),
          store_path={store!r}, progress=progress, **DEMO)
"""


def start(store: Path, counts: list[int], stop: str) -> subprocess.Popen[str]:
    code = CHILD.format(
        tests=str(Path(__file__).parent), stop=stop, counts=counts, store=str(store)
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_after_sigkill_a_sweep_goes_on_and_makes_no_finished_cell_again(tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    counts = [1, 8, 12]
    child = start(store, counts, stop="cell 2 of 3")
    try:
        assert child.stdout is not None
        lines = iter(child.stdout.readline, "")
        assert any(line.startswith("cell 2 of 3") for line in lines)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
    before = evaluations(store)
    assert before["evaluation_id"].nunique() == 1
    said: list[str] = []
    found = run_sweep(
        load_model("demo", device="cpu"), demo_table(), demo_prompts(), sweep_grid(counts),
        store_path=store, say=said.append, **DEMO,
    )  # fmt: skip
    assert said == [f"1 of 3 cells are in {store} already"]
    after = evaluations(store)
    pd.testing.assert_frame_equal(after[: len(before)], before)
    assert after["evaluation_id"].nunique() == 3
    assert after.groupby("evaluation_id").size().nunique() == 1
    assert found.table["count"].tolist() == counts
    # The truth of the demo model: the first twelve are tuned experts, one of which does little.
    best = best_cell(found.table, budget=5)
    assert found.table["correct"][best] > found.table["correct"][0]
    assert beats_controls(found.table, best)


@pytest.mark.soak
def test_twenty_cells_survive_kills_at_any_moment(tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    counts = list(range(1, 21))
    moments = random.Random(0)
    kept = pd.DataFrame()
    status = -signal.SIGKILL
    for _ in range(60):
        child = start(store, counts, stop="never")
        assert child.stdout is not None
        first = child.stdout.readline()  # of its first cell, or the end
        if first:
            time.sleep(moments.uniform(0, 12))
        child.kill()
        status = child.wait()
        child.stdout.close()
        if store.exists():
            now = evaluations(store)
            pd.testing.assert_frame_equal(now[: len(kept)], kept if len(kept) else now[:0])
            kept = now
        if status == 0:
            break
    assert status == 0
    assert kept["evaluation_id"].nunique() == len(counts)
    assert not kept.duplicated(["evaluation_id", "condition", "metric", "details"]).any()
    assert kept.groupby("evaluation_id").size().nunique() == 1


def test_the_command_prints_cells_and_writes_the_best_plan(tmp_path: Path) -> None:
    import typer

    from moescope.app.commands import sweep

    app = typer.Typer()
    sweep.register(app)
    table, plan, out = tmp_path / "t.csv", tmp_path / "best.json", tmp_path / "cells.csv"
    demo_table().to_csv(table, index=False)
    arguments = [
        "demo", "--table", str(table), "--prompts", "refusal", "--where", "lang=en",
        "--limit", "8", "--counts", "2,12", "--mode", "drop", "--controls", "1",
        "--max-new-tokens", "16", "--store", str(tmp_path / "s.duckdb"), "--name", "cli",
        "--device", "cpu",
    ]  # fmt: skip
    wishes = ["--budget", "5", "--plan-out", str(plan), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, [*arguments, *wishes], catch_exceptions=False)
    assert done.exit_code == 0
    rows = json.loads(done.stdout)
    assert [row["count"] for row in rows] == [2, 12]
    assert "correct_bottom" in rows[0]
    assert SteeringPlan.read(plan).plan_id in [row["plan_id"] for row in rows]
    assert pd.read_csv(out)["evaluation_id"].tolist() == [row["evaluation_id"] for row in rows]
    for wrong, words in (
        (["--counts", "1,x"], "--counts is a list of numbers"),
        (["--mode", "off"], "a mode is replace"),
        (["--goal", "win"], "--goal is correct"),
        (["--budget", "5", "--where", "label=sensitive"], "no neutral prompt"),
        (["--plan-out", str(tmp_path / "no" / "p.json")], "there is no folder"),
    ):
        failed = CliRunner().invoke(app, [*arguments, *wrong])
        assert words in str(failed.exception)
