"""What the dashboard says when there is little to show, and when something is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from moescope.app import state
from moescope.probe.storage.locks import writing
from moescope.probe.storage.store import Store

OpenApp = Callable[..., AppTest]
Texts = Callable[[AppTest], str]

PAGES = ("runs", "prompt", "specialization", "load", "languages", "refusal", "steering")

HOLD_THE_STORE = """
import sys, time
from moescope.probe.storage.locks import writing
from moescope.probe.storage.store import Store
with writing(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def changed_store(tmp_path: Path, recorded_store: Path) -> Callable[[str], Path]:
    """A copy of the store in which one statement was carried out."""

    def changed(statement: str) -> Path:
        copy = tmp_path / "changed.duckdb"
        shutil.copyfile(recorded_store, copy)
        with writing(copy) as con:
            con.execute(statement)
        return copy

    return changed


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_store_says_how_to_record(
    open_app: OpenApp, texts: Texts, tmp_path: Path, page: str
) -> None:
    store = tmp_path / "new.duckdb"
    with writing(store):
        pass
    app = open_app(store, page)
    assert not app.error and not app.exception
    assert app.title[0].value == "No runs yet"
    assert app.code[0].value.startswith("moescope trace demo --prompts refusal --store new.duckdb")


@pytest.mark.parametrize(
    ("run", "page", "sentence"),
    [
        ("counts", "prompt", "counts per prompt, not the routing of each token"),
        ("counts", "refusal", "no generated answers"),
        ("plain", "specialization", "there is nothing to compare"),
        ("plain", "languages", "the same content in several languages"),
        ("plain", "refusal", "there are no two groups"),
        ("base", "steering", "No plan is at hand"),
    ],
)  # fmt: skip
def test_a_page_that_has_nothing_to_show_says_what_it_needs(
    open_app: OpenApp, texts: Texts, recorded_store: Path, run: str, page: str, sentence: str
) -> None:
    app = open_app(recorded_store, page, run=run)
    assert not app.error and not app.exception
    assert any(sentence in info.value for info in app.info)


@pytest.mark.parametrize("page", ["specialization", "load", "languages"])
def test_a_run_of_counts_alone_is_analyzed_all_the_same(
    open_app: OpenApp, recorded_store: Path, page: str
) -> None:
    app = open_app(recorded_store, page, run="counts")
    assert not app.error and len(app.get("plotly_chart")) == 1


def test_a_run_without_weights_shows_the_experts_without_an_empty_map(
    open_app: OpenApp, changed_store: Callable[[str], Path]
) -> None:
    store = changed_store("UPDATE routing_arrays SET weights = NULL, bf16_weights = NULL")
    app = open_app(store, "prompt", run="base")
    assert not app.error and not app.exception
    assert any("no routing weights" in info.value for info in app.info)
    assert not app.get("plotly_chart")
    assert app.dataframe[0].value["weight"].isna().all()


def test_a_missing_store_is_one_sentence(open_app: OpenApp, tmp_path: Path) -> None:
    app = open_app(tmp_path / "gone.duckdb")
    assert len(app.error) == 1 and not app.exception
    assert "there is no store at" in app.error[0].value


def test_a_file_that_is_no_store_is_one_sentence(open_app: OpenApp, tmp_path: Path) -> None:
    file = tmp_path / "notes.duckdb"
    file.write_text("just notes, no database at all\n" * 50)
    app = open_app(file, "load")
    assert len(app.error) == 1 and not app.exception
    assert "is not a DuckDB file" in app.error[0].value


def test_a_store_of_another_version_is_one_sentence(
    open_app: OpenApp, changed_store: Callable[[str], Path]
) -> None:
    app = open_app(changed_store("UPDATE moescope_schema SET version = 99"))
    assert len(app.error) == 1 and not app.exception
    assert "99" in app.error[0].value


def test_an_app_without_a_store_says_how_to_start_it(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_app(Path())
    monkeypatch.delenv("MOESCOPE_STORE")
    app.run()
    assert "moescope dashboard --store FILE" in app.error[0].value.replace("\\", "")


def test_a_store_that_a_writer_keeps_is_one_sentence_and_opens_afterwards(
    open_app: OpenApp, texts: Texts, changed_store: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = changed_store("SELECT 1")
    monkeypatch.setattr(state, "_WAIT_S", 0.3)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_STORE, str(store)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        app = open_app(store)
        assert len(app.warning) == 1 and not app.exception
        assert "stayed busy" in app.warning[0].value
    finally:
        holder.kill()
        holder.wait()
    monkeypatch.undo()
    monkeypatch.setenv("MOESCOPE_STORE", str(store))
    app.run()
    assert not app.warning and app.header[0].value == "base"


def test_a_link_to_a_run_that_is_gone_says_so_and_shows_another(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    app = open_app(recorded_store, run="gone")
    assert "There is no run 'gone' in this store; it has: base, counts, plain." in texts(app)
    assert app.header[0].value == "base"


def test_a_run_that_is_being_recorded_shows_how_far_it_is(
    open_app: OpenApp, texts: Texts, changed_store: Callable[[str], Path]
) -> None:
    store = changed_store(
        "UPDATE runs SET status = 'running', num_prompts = 96, num_tokens = NULL, "
        "finished_at = NULL WHERE run_id = 'base'"
    )
    app = open_app(store, "specialization")
    assert not app.error
    assert "The run is running: 24 of 96 planned prompts so far." in texts(app)
    runs = open_app(store).dataframe[0].value.set_index("run_id")
    assert runs.at["base", "recorded"] == 0.25 and runs.at["counts", "recorded"] == 1.0


def test_a_model_that_is_gone_is_one_sentence(
    open_app: OpenApp, changed_store: Callable[[str], Path]
) -> None:
    app = open_app(changed_store("UPDATE runs SET model = './gone/model'"), "steering")
    next(button for button in app.button if button.label == "Answer").click()
    app.run()
    assert len(app.error) == 1 and not app.exception
    assert "./gone/model" in app.error[0].value.replace("\\", "")


def test_a_model_of_the_hub_is_never_downloaded_by_the_dashboard(
    open_app: OpenApp, changed_store: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    app = open_app(changed_store("UPDATE runs SET model = 'nobody/no-such-model'"), "steering")
    next(button for button in app.button if button.label == "Answer").click()
    app.run()
    assert len(app.error) == 1 and not app.exception
    assert "moescope doctor nobody/no-such-model" in app.error[0].value.replace("\\", "")


def test_a_model_that_answers_otherwise_than_recorded_is_announced(
    open_app: OpenApp, texts: Texts, recorded_store: Path, changed_store: Callable[[str], Path]
) -> None:
    warning = "1 of 1 unsteered answers differ from those that the run recorded"
    for store, is_announced in (
        (recorded_store, False),
        (changed_store("UPDATE prompts SET response = 'Something else.'"), True),
    ):
        app = open_app(store, "steering")
        next(button for button in app.button if button.label == "Answer").click()
        app.run()
        assert not app.error and "Unsteered" in texts(app)
        assert (warning in texts(app)) == is_announced


def test_an_evaluation_leaves_out_earlier_turns_and_is_kept_on_request(
    open_app: OpenApp, texts: Texts, changed_store: Callable[[str], Path]
) -> None:
    from moescope.steering import SteeringPlan

    store = changed_store(
        "UPDATE prompts SET rendered_text = 'Before. ' || rendered_text "
        "WHERE run_id = 'base' AND prompt_id % 6 = 0"
    )
    plan = SteeringPlan(interventions=[{"action": "mask", "layer": 1, "experts": [2]}])
    app = open_app(store, "steering", view="Many prompts")
    app.session_state["_plan"] = plan.to_json()
    app.run()
    app.number_input(key="controls").set_value(1).run()
    next(button for button in app.button if button.label.startswith("Evaluate on 24")).click()
    app.run()
    assert not app.error
    assert "4 prompts with earlier turns were left out" in texts(app)
    next(button for button in app.button if button.label == "Keep in the store").click()
    app.run()
    assert not app.error and "is in the tables plans and evaluations" in texts(app)
    kept = Store(store).query("SELECT DISTINCT plan_id, condition FROM evaluations")
    assert set(kept["condition"]) == {
        "unsteered", "steered", "control:random:0", "control:load-matched:0",
    }  # fmt: skip
    assert plan.plan_id in kept["plan_id"].tolist()


def test_what_nobody_expected_is_a_sentence_too_and_its_report_is_logged(
    open_app: OpenApp, recorded_store: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def broken(run: state.ShownRun) -> None:
        raise ZeroDivisionError("by *nothing*")

    monkeypatch.setattr(state, "comparable_fields", broken)
    app = open_app(recorded_store, "specialization")
    assert not app.exception
    assert "unexpected ZeroDivisionError: by \\*nothing\\*" in app.error[0].value
    assert "Traceback" in caplog.text


def test_text_of_a_store_is_never_read_as_markup(
    open_app: OpenApp, changed_store: Callable[[str], Path]
) -> None:
    store = changed_store("UPDATE runs SET run_id = '**x** $y$ <b>' WHERE run_id = 'base'")
    app = open_app(store)
    assert not app.error
    assert app.header[0].value == "\\*\\*x\\*\\* \\$y\\$ \\<b\\>"
