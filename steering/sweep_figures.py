"""All figures of a sweep, as its command writes them."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from moescope.steering.stored_sweeps import StoredSweep, sweep_conditions
from moescope.steering.sweep_dose import sweep_dose
from moescope.steering.sweep_table import Goal
from moescope.steering.sweep_tradeoff import side_effects_of, sweep_tradeoff


def sweep_page(
    store_path: str | Path,
    sweep: StoredSweep,
    group: str,
    *,
    goal: Goal = "correct",
    budget: float | None = None,
    best: str | None = None,
) -> list[go.Figure]:
    """All figures of a sweep: effect against each side effect that was measured, then the dose.

    Raises:
        StoreError: the file is no store of this version.
    """
    conditions = sweep_conditions(store_path, sweep, group)
    against = [
        sweep_tradeoff(
            conditions, sweep, group, goal=goal, side_effect=name, budget=budget, best=best
        )
        for name in side_effects_of(conditions)
    ]
    return [*against, sweep_dose(conditions, sweep, group)]
