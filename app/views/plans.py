"""Steering plans on pages: made from a contrast, shown, uploaded, handed to the steering page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app import state
from moescope.app.views import layout
from moescope.probe.errors import PlanError

if TYPE_CHECKING:
    import pandas as pd

    from moescope.probe.analysis import AnalysisTable
    from moescope.steering import SteeringPlan
    from moescope.steering.check import LayerShape

_SCOPES: Final = {"all": "all tokens", "generated": "answer tokens", "prompt": "prompt tokens"}


def show_maker(run: state.ShownRun, table: AnalysisTable) -> None:
    """Make a plan of the experts of a contrast: how many to mask, then hand it over."""
    st.subheader("Plan from these experts", anchor=False)
    confirmed = state.num_experts_of_a(table, confirmed_only=True)
    any_expert = state.num_experts_of_a(table, confirmed_only=False)
    unconfirmed = False
    if not confirmed:
        unconfirmed = st.checkbox(
            "Use experts that were not confirmed", key="unconfirmed", disabled=not any_expert,
            help="No expert that group a uses more was confirmed; a plan of unconfirmed ones is a "
            "guess, and its provenance says so.",
        )  # fmt: skip
    most = any_expert if unconfirmed else confirmed
    if not most:
        st.info("No expert that group a uses more was confirmed, so there is nothing to mask yet.")
        return
    number_column, scope_column, button_column, about = st.columns(
        [1.4, 1.6, 1.2, 3], vertical_alignment="bottom"
    )
    with number_column:
        number = st.number_input(
            f"Experts to mask (of {most})", 1, most, min(8, most), key="num_mask",
            help="Those that group a uses more, largest effect first.",
        )  # fmt: skip
    with scope_column:
        scope = st.selectbox(
            "On", list(_SCOPES), format_func=lambda name: _SCOPES[name], key="plan_scope"
        )
    with button_column:
        if st.button("Make plan", type="primary", width="stretch", icon=":material/build:"):
            state.keep_plan(state.plan_of(run, table, int(number), scope, not unconfirmed))
    about.caption(
        "Masking keeps the router from choosing these experts; the next best take their place."
    )
    plan = state.kept_plan()
    if plan is not None:
        show_plan(plan, key="made", beside=_offer_steering)


def _offer_steering() -> None:
    if st.button("Steer with this plan", icon=":material/arrow_forward:", type="primary"):
        st.switch_page("views/steering.py")


def show_plan(plan: SteeringPlan, *, key: str, beside: Callable[[], None] | None = None) -> None:
    """A plan as a table and as JSON, and its download; `beside` draws more buttons."""
    num_experts = sum(len(one.experts) for one in plan.interventions)
    num_layers = len({layer for one in plan.interventions for layer in one.on_layers})
    st.markdown(
        f"**{layout.escaped(plan.title)}**: {num_experts} experts in {num_layers} layers, "
        f"made for {layout.escaped(plan.model or 'any model')} :gray[(id {plan.plan_id})]"
    )
    text = plan.to_json()
    drawn, by_expert, written, as_json = st.tabs(["Map", "Experts", "Interventions", "JSON"])
    layers = _layers_for(plan)
    with drawn:
        _show_map(plan, layers, key)
    with by_expert:
        layout.show_frame(
            _expert_rows(plan, layers), key=f"{key}_experts", name=f"{plan.title}-experts",
            height=340,
        )  # fmt: skip

    def buttons() -> None:
        st.download_button(
            "Plan file",
            data=text,
            file_name="plan.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
            key=f"{key}_file",
        )
        if beside is not None:
            beside()

    with written:
        layout.show_frame(plan_rows(plan), key=f"{key}_plan", name=plan.title, height=340)
    with as_json:
        st.code(text, language="json", height=320)
    with st.container(horizontal=True, vertical_alignment="center"):
        buttons()


def _layers_for(plan: SteeringPlan) -> list[LayerShape] | None:
    """The routed layers of the shown run's model; None where the plan is of another model."""
    from moescope.steering.check import LayerShape

    run = state.shown_run()
    if plan.model not in (None, run.info.model):
        return None
    rows = state.open_store().layers(run.run_id)[["layer", "kind", "num_experts", "top_k"]]
    if rows.empty or rows.isna().any(axis=None):
        return None
    return [
        LayerShape(int(row["layer"]), row["kind"], int(row["num_experts"]), int(row["top_k"]))
        for row in rows.to_dict("records")
    ]


def _show_map(plan: SteeringPlan, layers: list[LayerShape] | None, key: str) -> None:
    """Layers x experts, with a choice where the model has several kinds of routers."""
    from moescope.steering.plan_view import kinds_of, plan_map

    alt = f"Plan {plan.title}: layers by experts, those that it acts on marked by action"
    try:
        kinds = [] if layers is None else kinds_of(plan, layers)
        kind = st.selectbox("Routers", kinds, key=f"{key}_kind") if len(kinds) > 1 else None
        figure = plan_map(plan, layers, kind=kind)
    except PlanError as error:
        st.warning(f"The plan does not fit this model: {layout.escaped(str(error))}.")
        figure, layers = plan_map(plan), None
    layout.show_figure(figure, key=f"{key}_map", alt=alt)
    if layers is None:
        st.caption(
            "Only what the plan names is drawn: how many experts its model has is not known here."
        )


def _expert_rows(plan: SteeringPlan, layers: list[LayerShape] | None) -> pd.DataFrame:
    """One row per intervention, layer and expert, without columns that say nothing."""
    from moescope.steering.plan_view import plan_table

    try:
        table = plan_table(plan, layers)
    except PlanError:  # the map says so
        table = plan_table(plan)
    return table.dropna(axis="columns", how="all")


def upload_plan() -> None:
    """A plan file from the reader's machine becomes the plan at hand."""
    file = st.file_uploader("Plan file", type="json", key="plan_file")
    if file is None:
        return
    from moescope.steering import SteeringPlan

    token = f"{file.file_id}"
    if st.session_state.get("_uploaded") == token:
        return
    text = file.getvalue().decode("utf-8-sig", errors="replace")
    state.keep_plan(SteeringPlan.parse(text, source=file.name))
    st.session_state["_uploaded"] = token


def plan_rows(plan: SteeringPlan) -> pd.DataFrame:
    """One row per intervention."""
    import pandas as pd

    from moescope.steering.report import scope_in_words

    rows: list[dict[str, Any]] = [
        {
            "layers": ", ".join(map(str, one.on_layers)),
            "action": one.setting,
            "experts": ", ".join(str(expert) for expert in one.experts),
            "tokens": scope_in_words(one.tokens),
        }
        for one in plan.interventions
    ]
    return pd.DataFrame(rows)
