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
_MEASURES: Final = {
    "jsd": "divergence (JSD)",
    "jsd_excess": "divergence above the floor",
    "d_hjs": "divergence over its entropy headroom",
}


def show() -> None:
    """Draw the page."""
    layout.heading(
        "Languages by layer",
        "At which layers, and how strongly, does a language use other experts than the pivot?",
    )
    run = state.shown_run()
    languages = state.comparable_fields(run).get("lang", [])
    if len(languages) < 2 or not state.has_field(run, "pair_id"):
        st.info(
            "This needs the same content in several languages: prompts with `lang`, and a "
            "`pair_id` that joins translations, as in the shipped set `parallel`."
        )
        return
    q, pivot, floor = _ask(languages)
    from_pivot, every_two, scores = st.tabs(
        ["From the pivot", "Every two languages", "Against a score"],
        key="view",
        bind="query-params",
    )
    if from_pivot.open:
        with from_pivot:
            _show_curves(run, q, pivot, floor)
    if every_two.open:
        with every_two, layout.errors_as_sentences():
            _show_tree(run, q, floor)
    if scores.open:
        with scores, layout.errors_as_sentences():
            _show_scores(run, q, pivot, floor, len(languages))


def _ask(languages: list[str]) -> tuple[str, str, str]:
    """Distribution, pivot and floor."""
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
    return q, pivot, floor


def _show_curves(run: state.ShownRun, q: str, pivot: str, floor: str) -> None:
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


def _show_tree(run: state.ShownRun, q: str, floor: str) -> None:
    with st.spinner("Comparing every two languages …", show_time=True):
        table = state.analyze(run, "language-pairs", q=q, floor=floor)
    from moescope.probe.figures import language_tree

    measures = {name: words for name, words in _MEASURES.items() if table.frame[name].notna().any()}
    layer_column, measure_column = st.columns(2, vertical_alignment="bottom")
    with layer_column:
        layers = [str(layer) for layer in sorted(table.frame["layer"].unique())]
        layer = choices.linked_choice("Layer", layers, key="layer")
    with measure_column:
        measure = choices.linked_choice(
            "Measure", list(measures), key="measure", words=lambda name: measures[name]
        )
    layout.show_figure(
        language_tree(table, int(layer), measure=measure, kind=experts.choose_kind(table)),
        key="language_tree",
        alt=f"{table.title}, layer {layer}: languages by languages, ordered by their tree",
    )
    st.caption(
        "Languages are joined where their mean divergence is smallest first (average linkage). "
        "A tree of so few languages shows this run; it proves nothing about families of languages."
    )
    layout.show_table(table, key="language_pairs", height=420)


def _show_scores(run: state.ShownRun, q: str, pivot: str, floor: str, num_languages: int) -> None:
    from moescope.probe.analysis.languages.scores import FEWEST_LANGUAGES

    if num_languages <= FEWEST_LANGUAGES:
        st.info(
            f"A correlation over languages needs {FEWEST_LANGUAGES} of them beside the pivot; this "
            f"run has {num_languages} in all."
        )
        return
    outcomes = state.comparable_fields(run).get("outcome", [])
    if not outcomes:
        st.info(
            "This needs a score of each language: record answers (`--generate`) to prompts with a "
            "known `answer`, or bring scores with `moescope analyze language-scores --scores FILE`."
        )
        return
    outcome = choices.linked_choice(
        "Score: share of prompts with outcome", outcomes, key="outcome", default="correct"
    )
    measure = "jsd" if floor == "none" else "jsd_excess"
    with st.spinner("Comparing languages …", show_time=True):
        table = state.analyze(
            run, "language-scores", q=q, pivot=pivot, floor=floor, measure=measure,
            score={"outcome": (outcome,)},
        )  # fmt: skip
    from moescope.probe.figures import score_curves

    layout.show_figure(
        score_curves(table, kind=experts.choose_kind(table)),
        key="score_curves",
        alt=f"{table.title}: correlation by layer with its interval",
    )
    st.caption(
        "Bars are 95 % intervals with languages as units. Hover for p after the search over layers."
    )
    layout.show_table(table, key="language_scores", height=420)


if __name__ == "__main__":
    show()
