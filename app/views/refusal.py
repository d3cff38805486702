"""Page: which experts differ between two groups, confirmed on held-back prompts; a plan of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app import state
from moescope.app.views import choices, experts, layout, plans

if TYPE_CHECKING:
    from moescope.probe.analysis import AnalysisTable

_USUAL: Final = (("outcome", "refused", "correct"), ("label", "sensitive", "neutral"))
"""Field and values of the groups that are asked for first, where a run has them."""


def show() -> None:
    """Draw the page."""
    layout.heading(
        "Refusal experts",
        "Which experts go with a behavior, found on one half of the prompts and confirmed on the "
        "other?",
    )
    run = state.shown_run()
    fields = state.comparable_fields(run)
    if not fields:
        st.info(
            "All prompts of this run share the values of every field, so there are no two groups "
            "to compare: record prompts with a `label`, or let the model answer (`--generate`)."
        )
        return
    if not run.has_answers:
        st.info(
            "This run has no generated answers, so nothing was refused or answered in it: groups "
            "can be made of labels, not of outcomes. Record with `--generate` for outcomes."
        )
    table = _ask(run, fields)
    if table is None:
        return
    _show_summary(table)
    kind = experts.choose_kind(table)
    layer, expert = experts.choose_expert(table, kind)
    by_map, by_effect, rows = st.tabs(["Map", "Effects", "Table"], key="view", bind="query-params")
    if by_map.open:
        with by_map:
            _show_map(table, kind, layer, expert)
    if by_effect.open:
        with by_effect:
            _show_effects(table, kind)
    if rows.open:
        with rows:
            layout.show_table(table, key="contrast", height=520)
    experts.show_rows(table, layer, expert, kind)
    plans.show_maker(run, table)


def _ask(run: state.ShownRun, fields: Mapping[str, Sequence[str]]) -> AnalysisTable | None:
    """The pickers of the two groups, and the contrast between them."""
    by, first_group, second_group, tokens_column, filters, more = st.columns(
        [1.5, 2, 2, 1.9, 1.5, 1.6], vertical_alignment="bottom"
    )
    field_name, usual_a, usual_b = _usual_groups(fields)
    with by:
        field = choices.linked_choice("Groups by", list(fields), key="groups", default=field_name)
    values = fields[field]
    if field == field_name:
        a, b = [usual_a], [usual_b]
    else:
        a, b = [values[0]], [values[1]]
    with first_group:
        group_a = st.multiselect(
            "Group a", values, default=a, key=f"a_{field}", persist_state="session"
        )
    with second_group:
        rest = [value for value in values if value not in group_a]
        group_b = st.multiselect(
            "against group b", rest, default=[value for value in b if value in rest],
            key=f"b_{field}", persist_state="session",
        )  # fmt: skip
    with tokens_column:
        tokens = choices.choose_scope("tokens", choices.scopes_of(run), "all")
    with filters:
        others = {name: found for name, found in fields.items() if name != field}
        kept = choices.conditions(others, key="contrast")
    with more:
        settings = _settings()
    if not group_a or not group_b:
        st.info(f"Choose at least one value of {layout.escaped(field)} for each group.")
        return None
    with st.spinner("Finding experts on one half, testing them on the other …", show_time=True):
        return state.analyze(
            run,
            "contrast",
            filters=choices.make_filters(tokens=tokens, fields=kept),
            a={field: tuple(group_a)},
            b={field: tuple(group_b)},
            **settings,
        )


def _usual_groups(fields: Mapping[str, Sequence[str]]) -> tuple[str, str, str]:
    for field, a, b in _USUAL:
        if a in fields.get(field, ()) and b in fields[field]:
            return field, a, b
    field = "label" if "label" in fields else next(iter(fields))
    return field, fields[field][0], fields[field][1]


def _settings() -> dict[str, Any]:
    """What a careful reader may want to change; the defaults are those of the command."""
    with st.popover("Settings", icon=":material/settings:", width="stretch"):
        average = st.radio(
            "Average",
            ["pooled", "unit"],
            key="average",
            captions=["every token counts alike", "every prompt pair counts alike"],
            persist_state="session",
        )
        candidates = st.number_input(
            "Experts to test", 1, 500, 50, key="candidates", persist_state="session",
            help="The strongest on the discovery half go on to the confirmation half.",
        )  # fmt: skip
        level = st.number_input(
            "False discovery rate", 0.001, 0.5, 0.05, format="%.3f", key="level",
            persist_state="session",
        )  # fmt: skip
        seed = st.number_input(
            "Seed of the halves", 0, value=0, key="seed", persist_state="session"
        )
    return {"average": average, "candidates": candidates, "q": level, "seed": seed}


def _show_summary(table: AnalysisTable) -> None:
    """How many were confirmed, on how much, and how stable the ranking is."""
    summary = table.summary
    numbers = (
        ("Confirmed", f"{summary['confirmed']} of {summary['candidates']} tested",
         "Experts whose difference was found again on the confirmation half, at this rate of "
         "false discoveries."),
        ("Units a / b", f"{summary['units_a']} / {summary['units_b']}",
         "Units of the confirmation half: prompts, or pairs of prompts that belong together."),
        ("Rank correlation", f"{summary['rank_correlation']:.2f}",
         "Spearman, between the rankings of all experts on the two halves."),
        ("Top overlap", f"{summary['top_overlap']:.0%}",
         "Share of the strongest experts of one half that are among those of the other."),
        ("Overlap by chance", f"{summary['top_overlap_chance']:.0%}",
         "What two random choices of as many experts would share."),
    )  # fmt: skip
    with st.container(horizontal=True, gap="medium", key="summary"):
        for name, value, about in numbers:
            st.metric(name, value, help=about, width="content")


def _show_map(table: AnalysisTable, kind: str | None, layer: int, expert: int) -> None:
    from moescope.probe.figures import contrast_map

    def clicked(point: Mapping[str, Any]) -> None:
        experts.look_at(int(point["y"]), int(point["x"]))

    layout.show_clickable(
        layout.with_click_layer(contrast_map(table, kind=kind), chosen=(expert, layer)),
        key="contrast_map",
        alt=f"{table.title}: risk difference, layers by experts, confirmed ones circled",
        on_click=clicked,
    )


def _show_effects(table: AnalysisTable, kind: str | None) -> None:
    from moescope.probe.figures import contrast_forest

    def clicked(point: Mapping[str, Any]) -> None:
        named = re.fullmatch(r"L(\d+) E(\d+)", str(point["y"]))
        if named is not None:
            experts.look_at(int(named[1]), int(named[2]))

    layout.show_clickable(
        contrast_forest(table, kind=kind),
        key="contrast_forest",
        alt=f"{table.title}: effect of each confirmed expert with its interval",
        on_click=clicked,
    )
    st.caption(
        "A confirmed expert goes with the difference between the groups. Whether it causes it is "
        "another question: mask it and see, on the steering page."
    )


if __name__ == "__main__":
    show()
