"""Page: how much each expert is used, and how evenly each layer spreads its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app import state
from moescope.app.views import choices, experts, layout

if TYPE_CHECKING:
    from moescope.probe.analysis import Filters

_MEASURES: Final = {
    "load": "load: share of slots",
    "token_share": "share of tokens",
    "importance": "importance: share of weight",
}
_TOGETHER: Final = "all prompts together"


def show() -> None:
    """Draw the page."""
    layout.heading(
        "Load and balance",
        "How much is each expert used, and how evenly does each layer spread its tokens?",
    )
    run = state.shown_run()
    filters, measure, by = _ask(run)
    load_tab, balance_tab = st.tabs(["Load", "Balance"], key="view", bind="query-params")
    if load_tab.open:
        with load_tab:
            _show_load(run, filters, measure, by)
    if balance_tab.open:
        with balance_tab:
            _show_balance(run, filters, by)


def _ask(run: state.ShownRun) -> tuple[Filters, str, str | None]:
    fields = state.comparable_fields(run)
    measure_column, by_column, tokens_column, filter_column = st.columns(
        [2, 2, 2, 1.2], vertical_alignment="bottom"
    )
    with measure_column:
        measure = choices.linked_choice(
            "Measure", list(_MEASURES), key="load_measure", words=lambda name: _MEASURES[name]
        )
    with by_column:
        by = choices.linked_choice("Split by", [_TOGETHER, *fields], key="split")
    with tokens_column:
        tokens = choices.choose_scope("tokens", choices.scopes_of(run), "all")
    with filter_column:
        kept = choices.conditions(fields, key="load")
    filters = choices.make_filters(tokens=tokens, fields=kept)
    return filters, measure, None if by == _TOGETHER else by


def _show_load(run: state.ShownRun, filters: Filters, measure: str, by: str | None) -> None:
    from moescope.probe.figures import load_heatmap

    table = state.analyze(run, "load", filters=filters, by=by)
    kind = experts.choose_kind(table)
    value = None
    if by is not None:
        values = list(dict.fromkeys(table.frame["value"]))
        value = choices.linked_choice(f"Value of {by}", values, key="value")
    layer, expert = experts.choose_expert(table, kind)
    figure = load_heatmap(table, measure=measure, value=value, kind=kind)

    def clicked(point: Mapping[str, Any]) -> None:
        experts.look_at(int(point["y"]), int(point["x"]))

    layout.show_clickable(
        layout.with_click_layer(figure, chosen=(expert, layer)),
        key="load_map",
        alt=f"{table.title}: layers by experts",
        on_click=clicked,
    )
    experts.show_rows(table, layer, expert, kind)
    with st.expander("Whole table"):
        layout.show_table(table, key="load", height=420)


def _show_balance(run: state.ShownRun, filters: Filters, by: str | None) -> None:
    from moescope.probe.figures import balance_curves

    table = state.analyze(run, "balance", filters=filters, by=by)
    kind = experts.choose_kind(table)
    layout.show_figure(
        balance_curves(table, kind=kind),
        key="balance_curves",
        alt=f"{table.title}: usage entropy, Gini and unused experts by layer",
    )
    layout.show_table(table, key="balance", height=420)


if __name__ == "__main__":
    show()
