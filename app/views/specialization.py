"""Page: which experts a kind of text uses, by any field of the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app import state
from moescope.app.views import choices, experts, layout

if TYPE_CHECKING:
    from moescope.probe.analysis import AnalysisTable

_MEASURES: Final = {
    "token_share": "share of tokens",
    "composition": "share of the expert's use",
    "lift": "lift over the other values",
}
_PREFERRED: Final = ("lang", "label", "outcome", "domain")


def show() -> None:
    """Draw the page."""
    layout.heading(
        "Specialization",
        "Which experts does a kind of text use: a language, a label, an outcome, any prompt field?",
    )
    run = state.shown_run()
    fields = state.comparable_fields(run)
    if not fields:
        st.info(
            "All prompts of this run share the values of every field, so there is nothing to "
            "compare: record prompts that differ in `lang`, `label` or a field of your own."
        )
        return
    table, measure = _ask(run, fields)
    kind = experts.choose_kind(table)
    layer, expert = experts.choose_expert(table, kind)
    by_layer, by_value, leaders = st.tabs(
        ["One layer", "One value", "All experts"], key="view", bind="query-params"
    )
    if by_layer.open:
        with by_layer:
            _show_layer(table, measure, kind, layer, expert)
    if by_value.open:
        with by_value:
            _show_value(table, measure, kind, layer, expert)
    if leaders.open:
        with leaders:
            _show_leaders(table, kind, layer, expert)
    experts.show_rows(table, layer, expert, kind)
    with st.expander("Whole table"):
        layout.show_table(table, key="specialization", height=420)


def _ask(run: state.ShownRun, fields: dict[str, list[str]]) -> tuple[AnalysisTable, str]:
    """The choices of the page, and the table that answers them."""
    by_column, measure_column, tokens_column, filter_column = st.columns(
        [2, 2, 2, 1.2], vertical_alignment="bottom"
    )
    preferred = [name for name in _PREFERRED if name in fields]
    names = preferred + [name for name in fields if name not in preferred]
    with by_column:
        by = choices.linked_choice(
            "Compare", names, key="by", words=lambda name: f"{name} ({len(fields[name])} values)"
        )
    with measure_column:
        measure = choices.linked_choice(
            "Measure", list(_MEASURES), key="measure", words=lambda name: _MEASURES[name]
        )
    with tokens_column:
        tokens = choices.choose_scope("tokens", choices.scopes_of(run), "all")
    with filter_column:
        kept = choices.conditions(fields, key="specialization")
    filters = choices.make_filters(tokens=tokens, fields=kept)
    with st.spinner("Counting …", show_time=True):
        return state.analyze(run, "specialization", filters=filters, by=by), measure


def _show_layer(
    table: AnalysisTable, measure: str, kind: str | None, layer: int, expert: int
) -> None:
    from moescope.probe.figures import specialization_by_value

    figure = specialization_by_value(table, layer=layer, measure=measure, kind=kind)

    def clicked(point: Mapping[str, Any]) -> None:
        experts.look_at(layer, int(point["x"]))

    layout.show_clickable(
        layout.with_click_layer(figure, chosen=(expert, None)),
        key="specialization_layer",
        alt=f"{table.title}, layer {layer}: values by experts",
        on_click=clicked,
    )


def _show_value(
    table: AnalysisTable, measure: str, kind: str | None, layer: int, expert: int
) -> None:
    from moescope.probe.figures import specialization_map

    values = list(dict.fromkeys(table.frame["value"]))
    value = choices.linked_choice("Value", values, key="value")
    figure = specialization_map(table, value=value, measure=measure, kind=kind)

    def clicked(point: Mapping[str, Any]) -> None:
        experts.look_at(int(point["y"]), int(point["x"]))

    layout.show_clickable(
        layout.with_click_layer(figure, chosen=(expert, layer)),
        key="specialization_value",
        alt=f"{table.title}, {value}: layers by experts",
        on_click=clicked,
    )


def _show_leaders(table: AnalysisTable, kind: str | None, layer: int, expert: int) -> None:
    from moescope.probe.figures import specialization_leaders

    def clicked(point: Mapping[str, Any]) -> None:
        experts.look_at(int(point["y"]), int(point["x"]))

    with layout.errors_as_sentences():
        figure = specialization_leaders(table, kind=kind)
        layout.show_clickable(
            layout.with_click_layer(figure, chosen=(expert, layer)),
            key="specialization_leaders",
            alt=f"{table.title}: what each expert specializes in",
            on_click=clicked,
        )


if __name__ == "__main__":
    show()
