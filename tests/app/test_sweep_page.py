"""Sweeps and plans on the steering page: figures, tables, what to do where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

OpenApp = Callable[..., AppTest]
Texts = Callable[[AppTest], str]
Figures = Callable[[AppTest], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def swept_store(
    recorded_store: Path, saved_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The recorded store with a sweep of two numbers of experts."""
    from moescope.probe.models import load_model
    from moescope.probe.prompts import Prompt
    from moescope.steering.sweep import run_sweep
    from moescope.steering.sweep_cells import sweep_grid

    store = tmp_path_factory.mktemp("swept") / "runs.duckdb"
    shutil.copy(recorded_store, store)
    prompts = [
        Prompt(prompt_id=at, text=f"What is {label} thing {at // 2}?", set_name="things",
               label=label, pair_id=f"p{at // 2}", lang="en", expected="no such answer")
        for at, label in enumerate(("sensitive", "neutral") * 2)
    ]  # fmt: skip
    frame = pd.DataFrame({
        "layer": [at % 3 for at in range(24)], "expert": [at // 3 for at in range(24)],
        "effect": [0.9 - at / 100 for at in range(24)], "confirmed": True,
    })  # fmt: skip
    run_sweep(
        load_model(str(saved_model)), frame, prompts, sweep_grid([1, 3]), store_path=store,
        name="dose", num_controls=1, max_new_tokens=2,
    )  # fmt: skip
    return store


def table_with(app: AppTest, *columns: str) -> pd.DataFrame:
    return next(t.value for t in app.dataframe if set(columns) <= set(t.value.columns))


def test_a_store_without_sweeps_names_the_command_that_makes_one(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "steering", view="Sweeps")
    assert not app.error and not app.exception
    assert "This store holds no sweep yet" in texts(app)
    assert f"--store {recorded_store.name} --name dose" in app.code[0].value


def test_a_sweep_is_seen_and_its_best_plan_taken(
    open_app: OpenApp, texts: Texts, figures: Figures, swept_store: Path, saved_model: Path
) -> None:
    app = open_app(swept_store, "steering", view="Sweeps")
    assert not app.error and not app.exception
    titles = [one["layout"]["title"]["text"] for one in figures(app)]
    assert titles == [
        "Effect and side effects, sensitive prompts", "Outcomes by experts, sensitive prompts",
    ]  # fmt: skip
    for figure in figures(app):
        said = figure["layout"]["title"]["subtitle"]["text"]
        assert str(saved_model) in said and "sweep dose" in said
        assert "2 prompts and 2 neutral of things" in said and "seed 0" in said
    shown = table_with(app, "count", "correct_control_max", "kl_answer")
    assert shown["count"].tolist() == [1, 3]
    # Nothing is right before or after, so the smaller plan is as good, and so are random experts.
    assert "Best whatever it costs: 1 expert, replace" in texts(app).replace("**", "")
    assert "Random experts do as well as this cell" in texts(app)
    next(button for button in app.button if button.label == "Take its plan").click()
    app.run()
    assert not app.error and not app.exception
    assert "dose: 1 expert, replace" in texts(app)
    by_expert = table_with(app, "expert", "basis", "basis_value")
    assert by_expert[["layer", "expert", "basis", "basis_value"]].values.tolist() == [
        [0, 0, "effect", 0.9]
    ]
    plan_map = next(
        one for one in figures(app) if one["layout"]["title"]["text"].startswith("Plan dose")
    )
    assert [trace.get("name") for trace in plan_map["data"]] == [None, "mask (1)"]


def test_a_plan_that_does_not_fit_or_is_of_another_model_is_drawn_as_far_as_known(
    open_app: OpenApp, texts: Texts, figures: Figures, recorded_store: Path
) -> None:
    from moescope.steering import SteeringPlan

    app = open_app(recorded_store, "steering")
    for model, words in ((None, "The plan does not fit this model"), ("other", "made for other")):
        plan = SteeringPlan(
            model=model, interventions=[{"action": "mask", "layers": [1, 50], "experts": [2]}]
        )
        app.session_state["_plan"] = plan.to_json()
        app.run()
        assert not app.error and not app.exception
        assert words in texts(app) and "Only what the plan names is drawn" in texts(app)
        assert "2 experts in 2 layers" in figures(app)[0]["layout"]["title"]["subtitle"]["text"]
