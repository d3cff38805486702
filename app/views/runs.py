"""Page: the runs of the store, and what is known of the chosen one."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st

from moescope.app import state
from moescope.app.views import layout

_LOOK_AGAIN_S = 3.0
_COLUMNS = {
    "run_id": st.column_config.TextColumn("run"),
    "recorded": st.column_config.ProgressColumn(
        "recorded",
        min_value=0,
        max_value=1,
        format="percent",
        help="Share of the planned prompts that is in the store.",
    ),
    "num_prompts": st.column_config.NumberColumn("prompts", format="localized"),
    "num_tokens": st.column_config.NumberColumn("tokens", format="localized"),
    "record_level": st.column_config.TextColumn(
        "level", help="usage: counts per prompt; topk: every token's experts and weights too."
    ),
    "created_at": st.column_config.DatetimeColumn("begun", format="YYYY-MM-DD HH:mm"),
    "finished_at": st.column_config.DatetimeColumn("finished", format="YYYY-MM-DD HH:mm"),
    "plan_id": st.column_config.TextColumn("plan", help="The steering plan in force, if any."),
}


def show() -> None:
    """Draw the page."""
    layout.heading("Runs", "What this store holds, and how the chosen run was recorded.")
    run = state.shown_run()
    _show_runs()
    st.header(layout.escaped(run.run_id), anchor=False, divider="gray")
    _show_facts(run)
    routers, prompts, manifest = st.tabs(
        ["Layers", "Prompts", "Manifest"], key="about", bind="query-params"
    )
    if routers.open:
        with routers:
            _show_layers(run)
    if prompts.open:
        with prompts:
            _show_prompts(run)
    if manifest.open:
        with manifest:
            _show_manifest(run)
    state.import_ahead(*state.ANALYSIS)


def _show_runs() -> None:
    """The table of runs; while one is recorded, it alone is drawn again every few seconds."""
    found = [state.all_runs()]
    is_recording = "running" in set(found[0]["status"])

    def draw() -> None:
        with layout.errors_as_sentences():
            frame = found.pop() if found else state.all_runs()
            layout.show_frame(frame, key="runs", name="runs", height=250, column_config=_COLUMNS)

    st.fragment(draw, run_every=_LOOK_AGAIN_S if is_recording else None)()


def _show_facts(run: state.ShownRun) -> None:
    info, manifest = run.info, run.info.manifest
    arguments = manifest.get("arguments", {})
    answers = arguments.get("max_new_tokens")
    facts = {
        "Model": info.model + (f" @ {info.revision}" if info.revision else ""),
        "Family": info.family or "not known",
        "Status": info.status,
        "Prompts": f"{run.recorded:,}",
        "Tokens": "not known" if info.num_tokens is None else f"{info.num_tokens:,}",
        "Answers": f"up to {answers} tokens" if answers else "none",
        "Computed as": " on ".join(str(manifest.get(name, "?")) for name in ("dtype", "device")),
    }
    with st.container(horizontal=True, gap="medium", key="facts"):
        for name, value in facts.items():
            st.markdown(f":small[:gray[{name}]]  \n**{layout.escaped(value)}**", width="content")


def _show_layers(run: state.ShownRun) -> None:
    frame = state.open_store().layers(run.run_id)
    rules = [json.loads(rule) if rule else {} for rule in frame["rule"]]
    frame["verified"] = [rule.pop("verified", None) for rule in rules]
    frame["reason"] = [rule.pop("reason", None) for rule in rules]
    frame["rule"] = [_in_words(rule) for rule in rules]
    st.caption(
        "A layer is verified when its rule repeats the router's own selection and weights, and "
        "when changing them changes the model's output; only verified layers can be steered."
    )
    config = {
        "num_experts": st.column_config.NumberColumn("experts"),
        "top_k": st.column_config.NumberColumn("top-k"),
        "num_shared_experts": st.column_config.NumberColumn("shared"),
        "moe_layer": st.column_config.NumberColumn("ordinal", help="Among routed layers, from 0."),
        "verified": st.column_config.CheckboxColumn("verified"),
        "reason": st.column_config.TextColumn("why not"),
    }
    layout.show_frame(
        frame, key="layers", name=f"{run.run_id}-layers", column_config=config, height=460
    )


def _show_prompts(run: state.ShownRun) -> None:
    frame = state.prompts(run)
    for field in ("outcome", "label", "lang"):
        counts = state.prompt_counts(run, field)
        if counts:
            text = " · ".join(f"{layout.escaped(name)} **{n:,}**" for name, n in counts.items())
            st.markdown(f":gray[{field}]: {text}")
    columns = ["prompt_id", "text", "response", "outcome", "expected", "lang", "label", "domain"]
    columns += [name for name in frame.columns if name not in columns]
    shown = frame[columns].dropna(axis="columns", how="all")
    layout.show_frame(
        shown,
        key="prompts",
        name=f"{run.run_id}-prompts",
        height=460,
        column_config={"text": st.column_config.TextColumn(width="large")},
    )


def _show_manifest(run: state.ShownRun) -> None:
    st.download_button(
        "Download manifest",
        data=json.dumps(run.info.manifest, ensure_ascii=False, indent=1),
        file_name=f"{run.run_id}-manifest.json",
        mime="application/json",
        icon=":material/download:",
        on_click="ignore",
    )
    st.json(dict(run.info.manifest), expanded=2)


def _in_words(rule: dict[str, Any]) -> str:
    """A routing rule as one short line; switches that are off are left out."""
    words = []
    for name, value in rule.items():
        if value is True:
            words.append(name)
        elif value is not False and value is not None:
            words.append(f"{name} {value}")
    return ", ".join(words)


if __name__ == "__main__":
    show()
