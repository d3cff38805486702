"""The sweeps of a store on a page: effect against side effects, outcomes by dose, all numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import streamlit as st

from moescope.app import state
from moescope.app.views import choices, layout
from moescope.probe.errors import PlanError

if TYPE_CHECKING:
    import pandas as pd

    from moescope.steering.stored_sweeps import StoredSweep
    from moescope.steering.sweep_table import Goal
    from moescope.steering.sweep_tradeoff import SideEffect

_SIDE_EFFECTS: Final = {
    "neutral_correct": "right answers to neutral prompts",
    "kl_answer": "KL on neutral prompts",
}


def show_sweeps() -> None:
    """Choose a sweep of the store and see it."""
    from moescope.steering.stored_sweeps import stored_sweeps

    path = state.store_path()
    found = stored_sweeps(path)
    if not found:
        st.info(
            "This store holds no sweep yet. A sweep makes plans of several sizes from one table of "
            "experts and judges each against its controls:"
        )
        st.code(
            f"moescope contrast --store {path.name} --a outcome=refused --b outcome=correct "
            "--out experts.csv\n"
            "moescope sweep demo --table experts.csv --prompts refusal --counts 1,2,5,10 "
            f"--store {path.name} --name dose",
            language="bash", wrap_lines=True,
        )  # fmt: skip
        return
    sweep, group, goal, budget = _choose(found)
    _show(sweep, group, goal, budget)


def _choose(found: list[StoredSweep]) -> tuple[StoredSweep, str, Goal, float]:
    """The sweep, the label to look at, what is wanted of it, and the budget in points."""
    from moescope.steering.sweep_table import GOALS

    times = {f"{one.name} {one.created_at:%Y-%m-%d %H:%M:%S}": one for one in found}
    names = [one.name for one in found]
    by_key = {one.name if names.count(one.name) == 1 else key: one for key, one in times.items()}
    sweep_column, group_column, goal_column, budget_column = st.columns(
        [4, 1.4, 1.4, 1.4], vertical_alignment="bottom"
    )
    with sweep_column:
        key = choices.linked_choice(
            "Sweep", list(by_key), key="sweep", words=lambda key: _in_a_line(by_key[key])
        )
    sweep = by_key[key]
    with group_column:
        group = choices.linked_choice("Prompts", list(sweep.groups), key="sweep_group")
    with goal_column:
        goal = choices.linked_choice(
            "Wanted", list(GOALS), key="goal",
            help="complied: correct or other answers; what the best cell has most of.",
        )  # fmt: skip
    with budget_column:
        budget = st.number_input(
            "Budget", 0.0, 100.0, 5.0, 1.0, format="%g", key="budget",
            help="By how many percentage points right answers to neutral prompts may fall.",
        )  # fmt: skip
    return sweep, group, cast("Goal", goal), float(budget)


def _in_a_line(sweep: StoredSweep) -> str:
    cells = f"{len(sweep.cells)} cells" if len(sweep.cells) > 1 else "1 cell"
    prompts = f"{sweep.settings['num_prompts']} prompts of {sweep.settings['set_name']}"
    return f"{sweep.name} · {cells} · {sweep.model} · {prompts} · {sweep.created_at:%Y-%m-%d %H:%M}"


def _show(sweep: StoredSweep, group: str, goal: Goal, budget: float) -> None:
    """Both figures, what is best, and the table."""
    from moescope.steering.stored_sweeps import sweep_conditions
    from moescope.steering.sweep_dose import sweep_dose
    from moescope.steering.sweep_table import sweep_table
    from moescope.steering.sweep_tradeoff import side_effects_of, sweep_tradeoff

    path = state.store_path()
    conditions = sweep_conditions(path, sweep, group)
    table = sweep_table(path, sweep.cells, group=group, neutral_label=sweep.neutral_label)
    best = _say_best(sweep, table, goal, budget)
    measured = side_effects_of(conditions)
    if measured:
        across = _choose_side_effect(measured)
        layout.show_figure(
            sweep_tradeoff(
                conditions, sweep, group, goal=goal, side_effect=across, budget=budget, best=best
            ),
            key="sweep_tradeoff",
            alt=f"Sweep {sweep.name}: change of {goal} answers against side effects, by cell",
        )
    else:
        st.caption(":material/info: Without neutral prompts no side effects were measured.")
    layout.show_figure(
        sweep_dose(conditions, sweep, group),
        key="sweep_dose",
        alt=f"Sweep {sweep.name}: share of each outcome by number of experts",
    )
    if sweep.num_replaced:
        st.caption(
            f":material/info: {sweep.num_replaced} cells were made twice, as with other controls "
            "or prompts; of each the newest is shown."
        )
    st.caption(
        "One row a cell. Shares of prompts with Wilson intervals; _before is unsteered, "
        "_control_min and _control_max are the range of the random controls; kl in nats."
    )
    layout.show_frame(table, key="sweep_table", name=f"sweep-{sweep.name}", height=420)


def _choose_side_effect(measured: list[SideEffect]) -> SideEffect:
    if len(measured) == 1:
        return measured[0]
    chosen = st.segmented_control(
        "Side effect", measured, default=measured[0], key="side_effect",
        format_func=lambda name: _SIDE_EFFECTS[name],
    )  # fmt: skip
    return chosen or measured[0]


def _say_best(sweep: StoredSweep, table: pd.DataFrame, goal: Goal, budget: float) -> str | None:
    """The best cell within the budget, in a sentence with a button that takes its plan.

    Returns:
        Its evaluation id; None where no cell keeps to the budget.
    """
    from moescope.steering.sweep_table import beats_controls, best_cell

    known = (table["neutral_correct_before"] > 0).any()
    try:
        at = best_cell(table, goal=goal, budget=budget if known else None)
    except PlanError as error:
        st.warning(layout.escaped(f"No best cell: {error}."))
        return None
    row = table.iloc[at]
    cell = sweep.cells[row["evaluation_id"]]
    within = f"within {budget:g} points" if known else "whatever it costs"
    st.markdown(
        f"**Best {within}:** {layout.escaped(cell.title)} :gray[(correct {row['correct']:.0%}, "
        f"refused {row['refused']:.0%}, broken {row['broken']:.0%} of {row['num_prompts']} "
        "prompts)]"
    )
    beaten = beats_controls(table, at, goal)
    if beaten is False:
        st.warning(
            "Random experts do as well as this cell, so it says nothing about the chosen ones.",
            icon=":material/casino:",
        )
    elif beaten is None:
        st.caption(":material/info: Without random controls nothing is known of the experts' part.")
    if st.button("Take its plan", icon=":material/tune:", help="It becomes the plan at hand."):
        from moescope.steering.stored_sweeps import stored_plan

        state.keep_plan(stored_plan(state.store_path(), row["plan_id"]))
        st.rerun()
    return str(row["evaluation_id"])
