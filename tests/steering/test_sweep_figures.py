"""Sweeps read back from the store, and their figures against the rows that they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from moescope.probe.errors import InputError, PlanError
from moescope.probe.prompts import Prompt
from moescope.probe.storage.store import Store
from moescope.steering import SteeringPlan
from moescope.steering.figure_page import write_figure_page
from moescope.steering.stored_sweeps import (
    StoredSweep,
    stored_plan,
    stored_sweeps,
    sweep_conditions,
)
from moescope.steering.sweep import run_sweep
from moescope.steering.sweep_cells import sweep_grid
from moescope.steering.sweep_dose import sweep_dose
from moescope.steering.sweep_figures import sweep_page
from moescope.steering.sweep_tradeoff import side_effects_of, sweep_tradeoff


def contrast() -> pd.DataFrame:
    """All experts of three layers, each with an effect of its own."""
    return pd.DataFrame({
        "layer": [at % 3 for at in range(24)],
        "expert": [at // 3 for at in range(24)],
        "effect": [0.9 - at / 100 for at in range(24)],
        "confirmed": True,
    })  # fmt: skip


def questions() -> list[Prompt]:
    return [
        Prompt(prompt_id=2 * at + (label == "neutral"), text=f"What is {label} thing {at}?",
               set_name="s", label=label, pair_id=f"p{at}", lang="en", expected="no such answer")
        for at in range(3) for label in ("sensitive", "neutral")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def store(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweeps: `dose` (two modes, two numbers, one made twice), then `soft` (strengths)."""
    path = tmp_path_factory.mktemp("sweeps") / "s.duckdb"
    bottom = SteeringPlan(name="b", interventions=[{"action": "mask", "layer": 0, "experts": [7]}])

    def sweep(name: str, cells: Any, num_controls: int = 2, frame: Any = None) -> None:
        run_sweep(
            tiny_bundle, contrast() if frame is None else frame, questions(), cells,
            store_path=path, name=name, num_controls=num_controls, max_new_tokens=2,
            make_controls=lambda plan, layers: {"bottom": bottom},
        )  # fmt: skip

    sweep("dose", sweep_grid([1]), num_controls=1)
    sweep("dose", sweep_grid([4, 1], modes=("replace", "drop")))
    sweep("soft", sweep_grid([2], strengths=(0.5, None, 2.0)), num_controls=0)
    sweep("soft", sweep_grid([2]), num_controls=0, frame=contrast().assign(effect=0.5))
    return path


def test_a_store_tells_its_sweeps_apart_newest_first(store: Path) -> None:
    other_table, soft, dose = stored_sweeps(store)
    assert [one.name for one in (other_table, soft, dose)] == ["soft", "soft", "dose"]
    assert [(cell.mode, cell.count) for cell in dose.cells.values()] == [
        ("drop", 1), ("drop", 4), ("replace", 1), ("replace", 4),
    ]  # fmt: skip
    assert dose.num_replaced == 1 and soft.num_replaced == 0
    assert dose.groups == ("sensitive",) and dose.neutral_label == "neutral"
    assert (len(soft.cells), len(other_table.cells)) == (3, 1)
    assert other_table.settings["table_sha256"] != soft.settings["table_sha256"]
    newest = stored_sweeps(store, list(dose.cells))
    assert [one.cells for one in newest] == [dose.cells] and newest[0].num_replaced == 0


def test_conditions_are_the_stored_rows(store: Path) -> None:
    dose = stored_sweeps(store)[2]
    found = sweep_conditions(store, dose, "sensitive")
    names = ["unsteered", "steered", "control:random:0", "control:random:1", "control:bottom"]
    assert found["condition"].tolist() == names * 4
    assert found["control"].iloc[:5].isna().tolist() == [True, True, False, False, False]
    assert found["n"].unique().tolist() == [3] and found["n_neutral"].unique().tolist() == [3]
    rows = Store(store).query("SELECT * FROM evaluations")
    rows["group"] = [json.loads(details)["group"] for details in rows["details"]]
    stored = rows.set_index(["evaluation_id", "condition", "group", "metric"])
    for row in found.to_dict("records"):
        at = (row["evaluation_id"], row["condition"])
        for metric in ("refused", "broken", "other_change"):
            if row["condition"] == "unsteered" and metric.endswith("_change"):
                assert np.isnan(row[metric])
                continue
            for group, name in (("sensitive", metric), ("neutral", f"neutral_{metric}")):
                expected = stored.loc[(*at, group, metric)]
                for end, column in (("", "value"), ("_low", "low"), ("_high", "high")):
                    np.testing.assert_equal(row[f"{name}{end}"], expected[column])


def conditions_by_hand() -> tuple[pd.DataFrame, StoredSweep]:
    """Two cells, each with two controls; shares and changes are round numbers."""
    rows = []
    for count, correct, lost, controls in ((1, 0.5, 0.1, (0.1, 0.3)), (4, 0.9, 0.3, (0.2, -0.1))):
        base = {"evaluation_id": f"e{count}", "count": count, "mode": "drop", "layers": "all",
                "strength": np.nan, "n": 10, "n_neutral": 10, "kl_answer": 0.01 * count,
                "kl_answer_low": 0.0, "kl_answer_high": 0.1}  # fmt: skip
        changes = [("unsteered", None, np.nan, np.nan), ("steered", None, correct, -lost)]
        changes += [(f"control:random:{at}", "random", value, 0.0)
                    for at, value in enumerate(controls)]  # fmt: skip
        for condition, control, change, neutral in changes:
            row = base | {"condition": condition, "control": control}
            for outcome, value in (("correct", change), ("other", 0.0), ("partial", 0.0),
                                   ("refused", -change), ("broken", 0.0)):  # fmt: skip
                before = 1.0 if outcome == "refused" else 0.0
                share = before if np.isnan(change) else before + value
                row |= {outcome: share, f"{outcome}_low": share - 0.1,
                        f"{outcome}_high": share + 0.1, f"{outcome}_change": value,
                        f"{outcome}_change_low": value - 0.2,
                        f"{outcome}_change_high": value + 0.2}  # fmt: skip
            share = 1.0 if np.isnan(neutral) else 1.0 + neutral
            row |= {"neutral_correct": share, "neutral_correct_change": neutral,
                    "neutral_correct_change_low": neutral - 0.05,
                    "neutral_correct_change_high": neutral + 0.02}  # fmt: skip
            rows.append(row)
    settings = {"sweep": "by hand", "model": "m", "set_name": "s", "num_prompts": 20,
                "max_new_tokens": 8, "seed": 3}  # fmt: skip
    sweep = StoredSweep(
        settings=settings, cells={}, groups=("a",), num_replaced=0,
        created_at=pd.Timestamp("2026-01-01", tz="UTC"),
    )  # fmt: skip
    return pd.DataFrame(rows), sweep


def trace(figure: Any, name: str) -> Any:
    return next(one for one in figure.data if one.name == name)


def test_effect_and_side_effects_of_cells_controls_and_the_best() -> None:
    conditions, sweep = conditions_by_hand()
    figure = sweep_tradeoff(conditions, sweep, "a", budget=20, best="e1")
    cells = trace(figure, "drop")
    assert cells.x == pytest.approx([10, 30]) and cells.y == pytest.approx([50, 90])
    assert cells.error_y.array == pytest.approx([20, 20])
    # Points lost are the change turned around, and so are its ends.
    assert cells.error_x.array == pytest.approx([5, 5])
    assert cells.error_x.arrayminus == pytest.approx([2, 2])
    assert [text.strip() for text in cells.text] == ["1", "4"] and cells.marker.size[
        0
    ] < cells.marker.size[1]
    band = trace(figure, "range of 4 controls")
    assert (min(band.y), max(band.y)) == pytest.approx((-10, 30))
    assert trace(figure, "random experts").y == pytest.approx([10, 30, 20, -10])
    assert trace(figure, "best: 1 expert, drop").x == pytest.approx([10])
    assert any(shape.x0 == 20 for shape in figure.layout.shapes)
    said = figure.layout.title.subtitle.text
    for words in ("m ·", "sweep by hand", "10 prompts and 10 neutral of s", "seed 3",
                  "2 control plans a cell", "greedy, up to 8 tokens"):  # fmt: skip
        assert words in said
    against_kl = sweep_tradeoff(conditions, sweep, "a", side_effect="kl_answer", goal="complied",
                                budget=20)  # fmt: skip
    assert trace(against_kl, "drop").x == pytest.approx([0.01, 0.04])
    assert np.isnan(np.array(trace(against_kl, "drop").error_y.array, dtype=float)).all()
    assert not against_kl.layout.shapes, "a budget is of answers, not of nats"
    refused = sweep_tradeoff(conditions, sweep, "a", goal="refused")
    assert trace(refused, "drop").y == pytest.approx([-50, -90])
    assert all(one.name != "best: 1 expert, drop" for one in refused.data)


def test_a_cell_within_the_range_of_controls_has_no_label() -> None:
    conditions, sweep = conditions_by_hand()
    is_first = (conditions["count"] == 1) & (conditions["condition"] == "steered")
    conditions.loc[is_first, "correct_change"] = 0.2
    cells = trace(sweep_tradeoff(conditions, sweep, "a"), "drop")
    assert [text.strip() for text in cells.text] == ["", "4"]


def test_outcomes_by_dose_start_unsteered_with_the_controls_behind() -> None:
    conditions, sweep = conditions_by_hand()
    figure = sweep_dose(conditions, sweep, "a")
    line = trace(figure, "correct")
    assert line.y == pytest.approx([0, 0.5, 0.9])
    assert line.error_y.array[1:] == pytest.approx([0.1, 0.1])
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "4"]
    band = next(one for one in figure.data if one.legendgroup == "correct" and one.fill)
    assert band.y == pytest.approx([0, 0.3, 0.2, -0.1, 0.1, 0])
    assert {one.name for one in figure.data if one.showlegend} == {
        "correct", "correct, neutral prompts", "refused", "broken",
    }  # fmt: skip
    assert trace(figure, "correct, neutral prompts").y == pytest.approx([1, 0.9, 0.7])


def test_one_number_of_experts_is_drawn_by_strength(store: Path) -> None:
    soft = stored_sweeps(store)[1]
    figure = sweep_dose(sweep_conditions(store, soft, "sensitive"), soft, "sensitive")
    assert list(figure.layout.xaxis.ticktext) == ["0", "0.5", "2", "mask"]
    assert "strength" in figure.layout.xaxis.title.text


def test_a_sweep_without_neutral_prompts_has_no_figure_of_side_effects() -> None:
    conditions, sweep = conditions_by_hand()
    alone = conditions.drop(columns=[name for name in conditions if name.startswith("neutral")])
    assert side_effects_of(alone) == ["kl_answer"]
    alone["kl_answer"] = np.nan
    assert side_effects_of(alone) == []
    with pytest.raises(PlanError, match="needs neutral prompts"):
        sweep_tradeoff(alone, sweep, "a")
    assert (
        "10 prompts of s"
        in sweep_dose(alone.assign(n_neutral=np.nan), sweep, "a").layout.title.subtitle.text
    )


def test_a_page_holds_all_figures_and_the_plans_of_cells_are_found(
    store: Path, tmp_path: Path
) -> None:
    dose = stored_sweeps(store)[2]
    figures = sweep_page(store, dose, "sensitive")
    assert len(figures) == 2, "no neutral answer is right, so only KL tells"
    write_figure_page(tmp_path / "page.html", "a <b>", figures, ["n < 3"])
    text = (tmp_path / "page.html").read_text()
    assert text.count("Plotly.newPlot(") == 2 and "<title>a &lt;b&gt;" in text
    assert "n &lt; 3" in text
    with pytest.raises(InputError, match=r"must end in \.html"):
        write_figure_page(tmp_path / "page.png", "a", figures)
    plan_id = Store(store).query("SELECT plan_id FROM evaluations WHERE plan_id IS NOT NULL")
    first = plan_id["plan_id"].iloc[0]
    assert stored_plan(store, first).plan_id == first
    with pytest.raises(PlanError, match="no plan nowhere"):
        stored_plan(store, "nowhere")


def test_the_commands_write_figures(tmp_path: Path) -> None:
    from moescope.app.commands import plans, sweep

    app = typer.Typer()
    plans.register(app)
    sweep.register(app)

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, list(words))

    plan, page = tmp_path / "p.json", tmp_path / "p.html"
    SteeringPlan(name="mine", interventions=[{"action": "mask", "layer": 1, "experts": [2]}]).write(
        plan
    )
    done = run("plan", "show", str(plan), "--figure", str(page))
    assert done.exit_code == 0 and "only what the plan names is drawn" in done.output
    assert "Plan mine" in page.read_text()
    done = run("plan", "show", str(plan), "--figure", str(page), "--model", "demo")
    assert done.exit_code == 0 and "not acted on" in page.read_text()
    beyond = tmp_path / "beyond.json"
    SteeringPlan(interventions=[{"action": "mask", "layer": 99, "experts": [2]}]).write(beyond)
    failed = run("plan", "show", str(beyond), "--model", "demo")
    assert "layer 99 has no router" in str(failed.exception)
    failed = run("plan", "show", str(plan), "--figure", str(tmp_path / "p.pdf"))
    assert "must end in .html" in str(failed.exception)

    table, page = tmp_path / "t.csv", tmp_path / "sweep.html"
    contrast().to_csv(table, index=False)
    done = run(
        "sweep", "demo", "--table", str(table), "--prompts", "refusal", "--where", "lang=en",
        "--limit", "4", "--counts", "1", "--controls", "1", "--max-new-tokens", "4",
        "--store", str(tmp_path / "s.duckdb"), "--name", "cli", "--device", "cpu",
        "--figure", str(page),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "sweep cli" in page.read_text()
