"""Page: at which layers a language uses other experts than the pivot language."""

from __future__ import annotations

from typing import Final

import streamlit as st

from moescope.app import state
from moescope.app.views import choices, experts, layout

_DISTRIBUTIONS: Final = {
    "topk": "routing weights of the selected experts",
    "softmax": "all router scores",
    "counts": "selections",
}
_FLOORS: Final = {
    "auto": "best that the run allows",
    "halves": "two halves of the same passage",
    "other_passages": "another passage, same language",
    "none": "none",
}


def show() -> None:
    """Draw the page."""
    layout.heading(
        "Languages by layer",
        "At which layers, and how strongly, does a language use other experts than the pivot?",
    )
    run = state.shown_run()
    values = state.comparable_fields(run)
    languages = values.get("lang", [])
    if len(languages) < 2 or not state.has_field(run, "pair_id"):
        st.info(
            "This needs the same content in several languages: prompts with `lang`, and a "
            "`pair_id` that joins translations, as in the shipped set `parallel`."
        )
        return
    q_column, pivot_column, floor_column = st.columns(3, vertical_alignment="bottom")
    with q_column:
        q = choices.linked_choice(
            "Distribution over experts",
            list(_DISTRIBUTIONS),
            key="q",
            words=lambda name: _DISTRIBUTIONS[name],
            help="What is compared between languages. All router scores is the definition of "
            "the paper; weights and selections only look at the experts that were used.",
        )
    with pivot_column:
        pivot = choices.linked_choice("Pivot language", languages, key="pivot", default="en")
    with floor_column:
        floor = choices.linked_choice(
            "Floor",
            list(_FLOORS),
            key="floor",
            words=lambda name: _FLOORS[name],
            help="How far the same language is from itself: a divergence means something only "
            "above its floor.",
        )
    with st.spinner("Comparing languages …", show_time=True):
        table = state.analyze(run, "languages", q=q, pivot=pivot, floor=floor)
    from moescope.probe.figures import language_curves

    layout.show_figure(
        language_curves(table, kind=experts.choose_kind(table)),
        key="language_curves",
        alt=f"{table.title}: raw and normalized divergence of each language, with floor",
    )
    st.caption(
        "The raw divergence (JSD) stands beside the one divided by its entropy headroom, because "
        "the latter is mostly noise where routing is nearly uniform. Bands are 95 % intervals "
        "over passages; dashed lines are the floor."
    )
    layout.show_table(table, key="languages", height=420)


if __name__ == "__main__":
    show()
