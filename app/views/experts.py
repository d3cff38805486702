"""One expert across pages: which one is looked at, and the ways to look at it elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import streamlit as st

from moescope.app.views.choices import linked_choice
from moescope.app.views.layout import show_table

if TYPE_CHECKING:
    import pandas as pd

    from moescope.probe.analysis import AnalysisTable

LAYER: Final = "layer"
EXPERT: Final = "expert"
"""Keys of the pickers of layer and expert on every page that has them."""

_OUTCOME_COLORS: Final = {
    "correct": "green", "refused": "red", "partial": "orange", "broken": "violet", "other": "gray",
}  # fmt: skip


def show_outcome(label: str, outcome: str | None) -> None:
    """A heading for an answer with how it was judged."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.caption(label, width="content")
        if outcome is not None:
            st.badge(outcome, color=_OUTCOME_COLORS.get(outcome, "gray"))  # type: ignore[arg-type]


def choose_kind(table: AnalysisTable) -> str | None:
    """The kind of router, asked only where a table has several."""
    kinds = list(dict.fromkeys(table.frame["kind"]))
    if len(kinds) < 2:
        return None
    return str(linked_choice("Routers", kinds, key="kind"))


def look_at(layer: int, expert: int) -> None:
    """Make an expert the one that pages with a picker of experts show."""
    st.session_state[LAYER] = layer
    st.session_state[EXPERT] = expert


def choose_expert(table: AnalysisTable, kind: str | None) -> tuple[int, int]:
    """Pickers of layer and expert, at first those of row one; a click on a map sets both."""
    frame = table.frame if kind is None else table.frame[table.frame["kind"] == kind]
    layer_column, expert_column, about = st.columns([1, 1, 3], vertical_alignment="bottom")
    with layer_column:
        layers = frame["layer"].unique().tolist()
        layer = linked_choice("Layer", sorted(layers), key=LAYER, default=layers[0])
    own = frame.loc[frame["layer"] == layer, "expert"].unique().tolist()
    with expert_column:
        expert = linked_choice("Expert", sorted(own), key=EXPERT, default=own[0])
    about.caption("Click a cell of the map to look at its expert, or choose one here.")
    return layer, expert


def rows_of(table: AnalysisTable, layer: int, expert: int, kind: str | None) -> pd.DataFrame:
    """The rows of one expert."""
    frame = table.frame
    kept = (frame["layer"] == layer) & (frame["expert"] == expert)
    return frame[kept] if kind is None else frame[kept & (frame["kind"] == kind)]


def show_rows(table: AnalysisTable, layer: int, expert: int, kind: str | None) -> None:
    """What a table says of one expert, under its name."""
    st.subheader(f"Layer {layer}, expert {expert}", anchor=False)
    show_table(table, key="one_expert", rows=rows_of(table, layer, expert, kind))


def show_links(frame: pd.DataFrame, *, key: str) -> None:
    """Choose one of the experts of a table, and go to what is known of it.

    Args:
        frame: rows with `layer` and `expert`.
        key: unique on the page.
    """
    pairs = zip(frame["layer"].tolist(), frame["expert"].tolist(), strict=True)
    found = list(dict.fromkeys(pairs))
    if st.session_state.get(key) not in found:
        st.session_state[key] = found[0]
    picker, first, second = st.columns([2, 2, 2], vertical_alignment="bottom")
    with picker:
        layer, expert = st.selectbox(
            "Expert", found, key=key, format_func=lambda pair: f"layer {pair[0]}, expert {pair[1]}"
        )
    with first:
        if st.button("Its specialization", key=f"{key}_specialization", width="stretch"):
            look_at(layer, expert)
            st.switch_page("views/specialization.py")
    with second:
        if st.button("In the contrast", key=f"{key}_refusal", width="stretch"):
            look_at(layer, expert)
            st.switch_page("views/refusal.py")
