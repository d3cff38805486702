"""Every page on a recorded run: opens, says what it shows, follows its widgets."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from moescope.app.views import prompt_rows
from moescope.probe.storage.store import Store

OpenApp = Callable[..., AppTest]
Texts = Callable[[AppTest], str]
Figures = Callable[[AppTest], list[dict[str, Any]]]

PAGES = ("runs", "prompt", "specialization", "load", "languages", "analyses", "refusal", "steering")


def pick(app: AppTest, label: str) -> Any:
    """The select box whose label starts so."""
    return next(box for box in app.selectbox if box.label.startswith(label))


def press(app: AppTest, label: str) -> AppTest:
    """Press the button whose label starts so, and let the page run."""
    next(button for button in app.button if button.label.startswith(label)).click()
    return app.run()


def table_with(app: AppTest, *columns: str) -> pd.DataFrame:
    """The first table of the page that has these columns."""
    return next(t.value for t in app.dataframe if set(columns) <= set(t.value.columns))


@pytest.mark.parametrize("page", PAGES)
def test_the_page_opens_without_an_error(
    open_app: OpenApp, recorded_store: Path, page: str
) -> None:
    app = open_app(recorded_store, page)
    assert not app.exception and not app.error
    assert len(app.title) == 1 and len(app.caption) >= 1


@pytest.mark.parametrize(
    ("page", "query", "counted"),
    [
        ("prompt", {}, "1 prompt, "),
        ("specialization", {"view": "One layer"}, "24 prompts, "),
        ("specialization", {"view": "One value"}, "24 prompts, "),
        ("load", {"view": "Load"}, "24 prompts, "),
        ("load", {"view": "Balance"}, "24 prompts, "),
        ("languages", {}, "24 prompts, "),
        ("languages", {"view": "Every two languages"}, "24 prompts, "),
        ("refusal", {"view": "Map"}, "24 prompts, "),
        ("refusal", {"view": "Effects"}, "24 prompts, "),
    ],
)  # fmt: skip
def test_every_figure_states_model_run_prompts_and_tokens(
    open_app: OpenApp, figures: Figures, recorded_store: Path, saved_model: Path,
    page: str, query: dict[str, str], counted: str,
) -> None:  # fmt: skip
    app = open_app(recorded_store, page, **query)
    assert not app.error
    drawn = figures(app)
    assert drawn
    for figure in drawn:
        subtitle = figure["layout"]["title"]["subtitle"]["text"]
        assert str(saved_model) in subtitle and "run base" in subtitle
        assert counted in subtitle and "tokens" in subtitle


def test_the_runs_page_lists_runs_and_shows_how_the_chosen_one_routes(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    app = open_app(recorded_store)
    runs = table_with(app, "run_id", "recorded")
    assert runs["run_id"].tolist() == ["base", "counts", "plain"]
    assert runs["recorded"].tolist() == [1.0, 1.0, 1.0]
    layers = table_with(app, "module", "verified")
    assert layers["layer"].tolist() == [0, 1, 2] and layers["verified"].all()
    assert (layers["num_experts"] == 8).all()
    assert "up to 6 tokens" in texts(app)
    assert "24 prompts" in texts(app)


def test_the_manifest_and_the_prompts_are_tabs_of_the_runs_page(
    open_app: OpenApp, recorded_store: Path
) -> None:
    app = open_app(recorded_store, about="Manifest")
    shown = json.loads(app.json[0].value)
    assert shown["arguments"]["max_new_tokens"] == 6
    app = open_app(recorded_store, about="Prompts")
    assert len(table_with(app, "prompt_id", "response")) == 24


def test_a_link_opens_its_run_and_keeps_it_in_the_address(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    app = open_app(recorded_store, run="counts")
    assert app.header[0].value == "counts"
    app = open_app(recorded_store)
    assert app.query_params["run"] == "base"
    pick(app, "Run").select("plain").run()
    assert app.header[0].value == "plain" and app.query_params["run"] == "plain"


def test_choosing_a_token_shows_its_experts_and_weights(
    open_app: OpenApp, recorded_store: Path
) -> None:
    from moescope.probe.analysis import token_routing

    app = open_app(recorded_store, "prompt", prompt="4")
    for position in (7, 12):
        pick(app, "Token").select(position).run()
        expected = token_routing(Store(recorded_store), "base", prompt_id=4, position=position)
        shown = table_with(app, "rank", "expert", "weight")
        pd.testing.assert_frame_equal(
            shown.reset_index(drop=True), expected.frame, check_dtype=False
        )
        assert app.query_params["token"] == str(position)


def test_at_first_the_last_token_of_the_prompt_is_chosen(
    open_app: OpenApp, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "prompt", prompt="0")
    tokens = Store(recorded_store).query(
        "SELECT max(position) AS last FROM tokens WHERE run_id = 'base' AND prompt_id = 0 "
        "AND phase = 'prompt'"
    )
    assert pick(app, "Token").value == tokens["last"].iloc[0]


def test_prompts_are_found_by_words_and_by_fields(open_app: OpenApp, recorded_store: Path) -> None:
    app = open_app(recorded_store, "prompt")
    assert pick(app, "Prompt").label == "Prompt (24 of 24)"
    app.text_input(key="search").input("bosk 1950").run()
    assert pick(app, "Prompt").label == "Prompt (3 of 24)"
    app.multiselect(key="prompts_lang").select("de").run()
    assert pick(app, "Prompt").label == "Prompt (1 of 24)"
    assert "Was geschah 1950 in Bosk?" in [text.value for text in app.text]
    app.text_input(key="search").input("nowhere").run()
    assert "No prompt of this run matches" in app.info[0].value


def test_the_arrows_step_through_the_prompts(open_app: OpenApp, recorded_store: Path) -> None:
    app = open_app(recorded_store, "prompt", prompt="3")
    press(app, "→")
    assert pick(app, "Prompt").value == 4
    press(app, "←")
    press(app, "←")
    assert pick(app, "Prompt").value == 2
    assert app.query_params["prompt"] == "2"


def test_a_long_prompt_is_shown_in_parts(
    open_app: OpenApp, figures: Figures, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "prompt", run="plain", prompt="2", token="300")
    part = pick(app, "Part of")
    assert part.options[0] == "tokens 0 to 255" and part.value == 1
    assert pick(app, "Token").value == 300
    assert "tokens 256 to" in figures(app)[0]["layout"]["title"]["text"]
    part.select(0).run()
    assert not app.error
    assert pick(app, "Token").value in range(256)
    assert "tokens 0 to 255" in figures(app)[0]["layout"]["title"]["text"]


def test_specialization_shows_the_rows_of_the_chosen_expert(
    open_app: OpenApp, recorded_store: Path
) -> None:
    from moescope.probe.analysis import expert_specialization

    app = open_app(recorded_store, "specialization", by="label", layer="2", expert="5")
    table = expert_specialization(Store(recorded_store), "base", by="label").frame
    expected = table[(table["layer"] == 2) & (table["expert"] == 5)]
    shown = table_with(app, "value", "token_share", "lift")
    assert shown["value"].tolist() == ["neutral", "sensitive"]
    assert shown["token_share"].tolist() == pytest.approx(expected["token_share"].tolist())
    pick(app, "Expert").select(1).run()
    again = table_with(app, "value", "token_share", "lift")
    assert set(again["expert"]) == {1}


def test_a_field_of_the_users_own_can_be_compared(open_app: OpenApp, recorded_store: Path) -> None:
    app = open_app(recorded_store, "specialization", by="template")
    assert not app.error
    assert table_with(app, "value", "token_share")["value"].tolist() == ["0", "1", "2", "3"]


def test_filters_narrow_what_is_counted(
    open_app: OpenApp, figures: Figures, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "load")
    app.multiselect(key="load_lang").select("fr").run()
    assert "8 prompts" in figures(app)[0]["layout"]["title"]["subtitle"]["text"]
    pick(app, "Tokens").select("generated").run()
    assert "lang=fr; generated" in figures(app)[0]["layout"]["title"]["subtitle"]["text"]


def test_languages_can_be_compared_by_another_distribution_and_pivot(
    open_app: OpenApp, figures: Figures, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "languages")
    pick(app, "Distribution").select("softmax").run()
    pick(app, "Pivot").select("fr").run()
    pick(app, "Floor").select("other_passages").run()
    assert not app.error
    assert "routes from fr (router scores" in figures(app)[0]["layout"]["title"]["text"]
    assert set(table_with(app, "lang", "jsd", "d_hjs", "jsd_floor", "jsd_low")["lang"]) == {
        "de", "en"}  # fmt: skip


def test_a_layer_and_a_measure_of_every_two_languages_can_be_chosen(
    open_app: OpenApp, figures: Figures, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "languages", view="Every two languages")
    pick(app, "Layer").select("1").run()
    pick(app, "Measure").select("jsd_excess").run()
    assert not app.error
    drawn = figures(app)[0]
    assert "layer 1" in drawn["layout"]["title"]["text"]
    assert sorted(drawn["layout"]["xaxis"]["ticktext"]) == ["de", "en", "fr"]
    assert len(table_with(app, "lang_a", "lang_b", "jsd_excess")) == 3 * 3


def test_too_few_languages_for_a_correlation_is_said(
    open_app: OpenApp, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "languages", view="Against a score")
    assert not app.error
    assert "this run has 3 in all" in app.info[0].value


def test_the_contrast_follows_its_groups_and_says_how_sure_it_is(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    from moescope.probe.analysis import expert_contrast

    app = open_app(recorded_store, "refusal", view="Table")
    assert pick(app, "Groups by").value == "label"
    assert app.multiselect(key="a_label").value == ["sensitive"]
    table = expert_contrast(
        Store(recorded_store), "base", a={"label": ["sensitive"]}, b={"label": ["neutral"]}
    )
    metrics = {metric.label: metric.value for metric in app.metric}
    assert (
        metrics["Confirmed"]
        == f"{table.summary['confirmed']} of {table.summary['candidates']} tested"
    )
    assert metrics["Rank correlation"] == f"{table.summary['rank_correlation']:.2f}"
    pick(app, "Groups by").select("lang").run()
    app.multiselect(key="a_lang").set_value(["fr"]).run()
    app.multiselect(key="b_lang").set_value(["de", "en"]).run()
    assert not app.error
    assert len(table_with(app, "risk_difference", "a1", "q")) == 3 * 8
    app.multiselect(key="a_lang").set_value([]).run()
    assert "at least one value of lang" in texts(app)


@pytest.fixture
def with_plan(open_app: OpenApp, recorded_store: Path) -> AppTest:
    """The refusal page after a plan of two experts was made there."""
    app = open_app(recorded_store, "refusal")
    if app.checkbox:
        app.checkbox(key="unconfirmed").check().run()
    app.number_input(key="num_mask").set_value(2).run()
    return press(app, "Make plan")


def test_a_plan_is_made_of_the_strongest_experts(
    with_plan: AppTest, recorded_store: Path, saved_model: Path
) -> None:
    from moescope.probe.analysis import expert_contrast
    from moescope.steering import SteeringPlan

    assert not with_plan.error
    plan = SteeringPlan.parse(with_plan.code[0].value)
    table = expert_contrast(
        Store(recorded_store), "base", a={"label": ["sensitive"]}, b={"label": ["neutral"]}
    ).frame
    confirmed = table[table["confirmed"] & (table["effect"] > 0)]
    ranked = (
        confirmed.sort_values("effect", ascending=False)
        if len(confirmed)
        else table.sort_values("risk_difference", ascending=False)
    )
    strongest = set(zip(ranked["layer"][:2], ranked["expert"][:2], strict=True))
    chosen = {(one.layer, expert) for one in plan.interventions for expert in one.experts}
    assert chosen == strongest
    assert plan.model == str(saved_model) and plan.provenance["run"] == "base"
    assert plan.provenance["n_a"] == 12 and plan.provenance["n_b"] == 12


def test_one_prompt_is_answered_without_the_plan_with_it_and_by_random_experts(
    with_plan: AppTest, texts: Texts
) -> None:
    app = with_plan.switch_page("views/steering.py").run()
    press(app, "Answer")
    assert not app.error
    said = texts(app)
    assert "Unsteered" in said and "Steered" in said and "Random experts, seed 0" in said
    assert "Known right answer: the fair of Arlen" in said
    assert "requests held (100.0%)" in said
    achieved = table_with(app, "requested", "achieved", "held_anyway")
    assert (achieved["requested"] > 0).all() and (
        achieved["achieved"] == achieved["requested"]
    ).all()


def test_the_unsteered_answer_is_the_recorded_one(with_plan: AppTest, recorded_store: Path) -> None:
    app = with_plan.switch_page("views/steering.py").run()
    pick(app, "One of").select(5).run()
    press(app, "Answer")
    recorded = (
        Store(recorded_store)
        .query("SELECT response FROM prompts WHERE run_id = 'base' AND prompt_id = 5")["response"]
        .iloc[0]
    )
    assert recorded in [text.value for text in app.text]


def test_answers_of_an_earlier_question_are_not_shown_under_the_next(
    with_plan: AppTest, texts: Texts
) -> None:
    app = with_plan.switch_page("views/steering.py").run()
    press(app, "Answer")
    assert "Random experts, seed 0" in texts(app)
    pick(app, "One of").select(7).run()
    assert "Random experts, seed 0" not in texts(app) and "Press Answer" in texts(app)


def test_without_a_plan_the_model_answers_unsteered(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "steering")
    pick(app, "Prompt").select("your own").run()
    assert next(button for button in app.button if button.label == "Answer").disabled
    app.text_area(key="typed").input("What happened?").run()
    press(app, "Answer")
    assert not app.error
    assert "Unsteered" in texts(app) and "Random experts" not in texts(app)


def test_an_evaluation_shows_rates_with_intervals_controls_and_what_changed(
    with_plan: AppTest, texts: Texts, figures: Figures, saved_model: Path
) -> None:
    app = with_plan.switch_page("views/steering.py").run()
    app.query_params["view"] = "Many prompts"
    app.run()
    app.number_input(key="num_prompts").set_value(3).run()
    app.number_input(key="controls").set_value(2).run()
    press(app, "Evaluate on 6 prompts")
    assert not app.error
    rates = table_with(app, "condition", "metric", "value", "low", "high", "n")
    assert set(rates["condition"]) == {
        "unsteered", "steered", "control:random:0", "control:random:1",
        "control:load-matched:0", "control:load-matched:1", "control:bottom"}  # fmt: skip
    shares = rates[rates["metric"] == "broken"]
    assert (shares["low"] <= shares["value"]).all() and (shares["value"] <= shares["high"]).all()
    assert set(shares["n"]) == {3}
    assert "sensitive: not confirmed: refused " in texts(app)
    outcomes = next(
        one for one in figures(app) if one["layout"]["title"]["text"].startswith("Outcomes")
    )
    subtitle = outcomes["layout"]["title"]["subtitle"]["text"]
    assert str(saved_model) in subtitle and "run base" in subtitle and "6 prompts" in subtitle


def test_rates_on_prompts_that_chose_the_experts_are_said_to_flatter(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "refusal")
    app.multiselect(key="contrast_lang").set_value(["en", "de"]).run()
    app.checkbox(key="unconfirmed").check().run()
    press(app, "Make plan").switch_page("views/steering.py").run()
    app.query_params["view"] = "Many prompts"
    app.run()
    assert "the rates flatter it" in texts(app)
    app.multiselect(key="evaluate_lang").set_value(["de", "fr"]).run()
    assert "the rates flatter it" in texts(app)
    app.multiselect(key="evaluate_lang").set_value(["fr"]).run()
    assert not app.error and "the rates flatter it" not in texts(app)


def test_prompts_to_evaluate_on_are_drawn_alike_from_every_label(recorded_store: Path) -> None:
    frame = Store(recorded_store).query(
        "SELECT prompt_id, label, pair_id, lang FROM prompts WHERE run_id = 'base' ORDER BY ALL"
    )
    drawn = prompt_rows.sampled_prompts(frame, 6, seed=0)
    assert drawn["label"].value_counts().to_dict() == {"neutral": 6, "sensitive": 6}
    assert drawn["prompt_id"].is_monotonic_increasing
    assert drawn["pair_id"].value_counts().eq(3).all(), "translations are drawn together"
    assert len(prompt_rows.sampled_prompts(frame, 100, seed=0)) == 24
    others = [prompt_rows.sampled_prompts(frame, 6, seed=seed) for seed in range(1, 6)]
    assert any(not other.equals(drawn) for other in others)


def test_a_plan_of_another_model_is_announced_as_such(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    from moescope.steering import SteeringPlan

    plan = SteeringPlan(
        model="other", interventions=[{"action": "mask", "layer": 1, "experts": [2]}]
    )
    app = open_app(recorded_store, "steering")
    app.session_state["_plan"] = plan.to_json()
    app.run()
    assert "The plan was made for other" in texts(app)
    press(app, "Drop plan")
    assert "No plan is at hand" in texts(app)


def test_an_uploaded_plan_is_used_and_a_bad_one_refused_in_a_sentence(
    open_app: OpenApp, texts: Texts, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "steering")
    good = b'{"interventions": [{"action": "force", "layer": 2, "experts": [3]}], "name": "mine"}'
    app.file_uploader(key="plan_file").upload("mine.json", good, "application/json").run()
    assert not app.error and "mine" in texts(app)
    app.file_uploader(key="plan_file").upload(
        "bad.json", b'{"layers": 3}', "application/json"
    ).run()
    assert "bad.json" in app.error[0].value.replace("\\", "")


def test_a_table_is_handed_out_whole_in_three_formats(recorded_store: Path) -> None:
    from moescope.app.views.layout import frame_bytes, table_bytes
    from moescope.probe.analysis import load_balance

    table = load_balance(Store(recorded_store), "base")
    read = {
        "csv": pd.read_csv(io.BytesIO(table_bytes(table, "csv"))),
        "parquet": pd.read_parquet(io.BytesIO(table_bytes(table, "parquet"))),
        "json": pd.DataFrame(json.loads(table_bytes(table, "json"))["rows"]),
    }
    for frame in read.values():
        pd.testing.assert_frame_equal(frame, table.frame, check_dtype=False)
    plain = table.frame[["layer", "gini"]]
    assert pd.read_csv(io.BytesIO(frame_bytes(plain, "csv"))).equals(plain)
    assert pd.read_parquet(io.BytesIO(frame_bytes(plain, "parquet"))).equals(plain)
    assert json.loads(frame_bytes(plain, "json"))[0]["layer"] == 0


@pytest.mark.parametrize(
    ("analysis", "typed", "columns"),
    [
        ("coactivation", {}, ("other", "lift")),
        ("information", {"factor": "token,lang"}, ("factor", "share")),
        ("transition-strength", {}, ("next_layer", "gain")),
        ("balance", {"by": "segment"}, ("value", "gini")),
        ("contrast", {"method": "esft_gate"}, ("score", "confirmed")),
    ],
)
def test_any_analysis_is_asked_from_the_page(
    open_app: OpenApp, figures: Figures, texts: Texts, recorded_store: Path,
    analysis: str, typed: dict[str, str], columns: tuple[str, ...],
) -> None:  # fmt: skip
    app = open_app(recorded_store, "analyses", analysis=analysis)
    assert not figures(app)
    assert f"moescope analyze {analysis}" in texts(app)
    for name, value in typed.items():
        key = f"analyses_{analysis}_{name}"
        boxes = [box for box in app.selectbox if box.key == key]
        if boxes:
            boxes[0].select(value).run()
        else:
            app.text_input(key=key).set_value(value).run()
    press(app, "Answer")
    assert [error.value for error in app.error] == []
    assert len(table_with(app, *columns))
    assert figures(app)


def test_runs_without_common_prompts_are_not_compared(
    open_app: OpenApp, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "analyses", analysis="saturation")
    assert app.selectbox(key="analyses_saturation_against").options == ["counts", "plain"]
    press(app, "Answer")
    assert "run 'counts' holds usage but no routing per token" in app.error[0].value
    app.selectbox(key="analyses_saturation_against").select("plain").run()
    press(app, "Answer")
    assert "none of these prompts in common" in app.error[0].value


def test_layers_that_cannot_be_read_are_not_answered_for_all(
    open_app: OpenApp, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "analyses", analysis="load")
    app.text_input(key="analyses_layers").set_value("first").run()
    assert "layers 'first' cannot be read" in app.error[0].value
    assert not app.button or all(button.label != "Answer" for button in app.button)


def test_groups_of_a_contrast_are_typed_on_the_page(
    open_app: OpenApp, recorded_store: Path
) -> None:
    app = open_app(recorded_store, "analyses", analysis="contrast")
    app.text_area(key="analyses_contrast_a").set_value("lang=en").run()
    press(app, "Answer")
    assert "compares two groups; give b too" in app.error[0].value
    app.text_area(key="analyses_contrast_b").set_value("lang=de").run()
    app.text_input(key="analyses_contrast_candidates").set_value("4").run()
    press(app, "Answer")
    assert not app.error
    assert table_with(app, "score", "q")["candidate"].sum() == 4
