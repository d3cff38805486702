"""Beside every page: which store, which run, and a way to look again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from moescope.app import state
from moescope.app.views.choices import linked_choice
from moescope.app.views.layout import escaped

if TYPE_CHECKING:
    import pandas as pd


RUN: str = "run"
"""Key of the run picker, and its name in the address of the page."""


def pick_run() -> bool:
    """Draw the sidebar and choose the run to show.

    Returns:
        Whether there is a run; where there is none, the page says how to record one.
    """
    path = state.store_path()
    with st.sidebar, st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f":material/database: **{escaped(path.name)}**", help=escaped(str(path)))
        st.button(
            "Refresh",
            icon=":material/refresh:",
            type="tertiary",
            on_click=state.forget_results,
            help="Read the store again: new runs, and rows recorded since.",
        )
    store = state.open_store()
    runs = store.runs()
    if runs.empty:
        _say_how_to_record(path.name)
        return False
    with st.sidebar:
        run = state.choose_run(store, _picked(runs))
        _say_about(run)
    return True


def _picked(runs: pd.DataFrame) -> str:
    """The run chosen in the picker; at first the one in the address, else the newest."""
    names = [str(name) for name in reversed(runs["run_id"].tolist())]
    asked = st.query_params.get(RUN)
    if asked is not None and asked not in names:
        known = ", ".join(names)
        st.warning(escaped(f"There is no run {asked!r} in this store; it has: {known}."))
    return linked_choice("Run", names, key=RUN)


def _say_about(run: state.ShownRun) -> None:
    info = run.info
    planned = info.num_prompts
    counted = f"{run.recorded:,} prompts"
    if info.status == "running" and planned:
        st.progress(min(run.recorded / planned, 1.0), f"running: {run.recorded:,} of {planned:,}")
    elif info.status != "complete":
        st.warning(f"This run is {info.status}: {counted} so far.")
    tokens = f", {info.num_tokens:,} tokens" if info.num_tokens else ""
    st.caption(f"{escaped(info.model)} · {counted}{tokens}")


def _say_how_to_record(store_name: str) -> None:
    st.title("No runs yet", anchor=False)
    st.markdown("This store holds no run so far; record one, then press **Refresh**:")
    st.code(
        f"moescope trace demo --prompts refusal --store {store_name} --run base --generate 24",
        language="bash",
    )
