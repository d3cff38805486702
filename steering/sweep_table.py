"""The cells of a sweep side by side: effect, side effects, controls; and the best of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.steering.evaluation import RANDOM_CONTROL, STEERED, UNSTEERED
from moescope.steering.sweep_cells import SweepCell

Goal = Literal["correct", "complied", "refused"]

#: What a goal wants more of.
_WANTED: Final[Mapping[str, tuple[str, ...]]] = {
    "correct": ("correct",),
    "complied": ("correct", "other"),
    "refused": ("refused",),
}
GOALS: Final = tuple(_WANTED)


def sweep_table(
    store_path: str | Path,
    cells: Mapping[str, SweepCell],
    *,
    group: str,
    neutral_label: str = "neutral",
) -> pd.DataFrame:
    """The stored rows of cells as one table.

    Args:
        store_path: the store.
        cells: evaluation id -> cell.
        group: the label whose outcomes are the effect.
        neutral_label: the label of prompts where nothing should change.

    Returns:
        One row per cell: `count, mode, layers, strength`; `num_prompts` of the group; for each of
        its outcomes `correct, other, refused, broken` the share steered, `_low` and `_high` (95 %,
        Wilson), `_before` (unsteered) and, over the random controls, `_control_min` and
        `_control_max`; the same with `neutral_` before it for `correct` and `broken`;
        `kl_first, kl_answer` in nats on neutral prompts; `tokens_per_s` steered; `plan_id,
        evaluation_id`. Other controls have `OUTCOME_NAME`. What was not measured is NaN.
    """
    rows = stored_rows(store_path, list(cells))
    found: list[dict[str, Any]] = []
    for evaluation_id, cell in cells.items():
        own = rows[rows["evaluation_id"] == evaluation_id]
        row: dict[str, Any] = dict(cell.to_json())
        row["num_prompts"] = int(_number(own, UNSTEERED, group, "correct", "n"))
        for prefix, of, outcomes in (
            ("", group, ("correct", "other", "refused", "broken")),
            ("neutral_", neutral_label, ("correct", "broken")),
        ):
            for outcome in outcomes:
                row |= _shares(own, of, outcome, prefix + outcome)
        for metric, of in (
            ("kl_first", neutral_label), ("kl_answer", neutral_label), ("tokens_per_s", "all"),
        ):  # fmt: skip
            row[metric] = _number(own, STEERED, of, metric)
        row["plan_id"] = str(own[own["condition"] == STEERED]["plan_id"].iloc[0])
        row["evaluation_id"] = evaluation_id
        found.append(row)
    return pd.DataFrame(found)


def best_cell(table: pd.DataFrame, *, goal: Goal = "correct", budget: float | None = None) -> int:
    """Index of the row with the largest share of what is wanted.

    Of equal ones that with the fewest experts, then that which costs fewest right neutral answers.

    Args:
        table: from `sweep_table`.
        goal: `correct` answers, `complied` (correct or other), or `refused`.
        budget: by how many percentage points right answers to neutral prompts may fall.

    Raises:
        PlanError: no cell keeps to the budget, or nothing tells.
    """
    wanted = sum((table[outcome] for outcome in _WANTED[goal]), start=0.0 * table["count"])
    cost = 100 * (table["neutral_correct_before"] - table["neutral_correct"])
    allowed = pd.Series(True, index=table.index)
    if budget is not None:
        if not (table["neutral_correct_before"] > 0).any():
            raise PlanError(
                "a budget is of right answers to neutral prompts, and the unsteered model gives "
                "none; give neutral prompts whose answer is known"
            )
        allowed = cost <= budget + 1e-9
        if not allowed.any():
            raise PlanError(
                f"no cell keeps right neutral answers within {budget:g} points; the cheapest costs "
                f"{cost.min():.1f}"
            )
    order = pd.DataFrame({"wanted": -wanted, "count": table["count"], "cost": cost.fillna(0.0)})
    return int(order[allowed].sort_values(["wanted", "count", "cost"], kind="stable").index[0])


def beats_controls(table: pd.DataFrame, row: int, goal: Goal = "correct") -> bool | None:
    """Whether a cell has more of what is wanted than each random control; None without controls.

    For `complied` the controls' best shares of its two outcomes are added, so that a yes is sure.
    """
    wanted = _WANTED[goal]
    limit = sum(float(table[f"{outcome}_control_max"].iloc[row]) for outcome in wanted)
    if math.isnan(limit):
        return None
    return sum(float(table[outcome].iloc[row]) for outcome in wanted) > limit


def stored_rows(store_path: str | Path, evaluation_ids: Sequence[str]) -> pd.DataFrame:
    """The stored rows of evaluations with their group.

    Each row comes once, though two sweeps side by side may have stored it twice.
    """
    from moescope.probe.storage.store import Store

    rows = Store(store_path).query(
        "SELECT evaluation_id, plan_id, condition, metric, value, low, high, n, details "
        "FROM evaluations WHERE evaluation_id IN (SELECT unnest(?))",
        [list(evaluation_ids)],
    )
    rows["group"] = [json.loads(details)["group"] for details in rows["details"]]
    return rows.drop_duplicates(["evaluation_id", "condition", "group", "metric"])


def _shares(own: pd.DataFrame, group: str, outcome: str, name: str) -> dict[str, float]:
    """One outcome of a cell: steered with its interval, unsteered, and the controls."""
    found = own[(own["group"] == group) & (own["metric"] == outcome)]
    values: dict[str, float] = dict(zip(found["condition"], found["value"], strict=True))
    is_random = found["condition"].str.startswith(RANDOM_CONTROL)
    random_values = found["value"][is_random]
    shares = {
        f"{name}_before": values.get(UNSTEERED, math.nan),
        name: values.get(STEERED, math.nan),
        f"{name}_low": _number(own, STEERED, group, outcome, "low"),
        f"{name}_high": _number(own, STEERED, group, outcome, "high"),
        f"{name}_control_min": float(random_values.min()),
        f"{name}_control_max": float(random_values.max()),
    }
    for condition, value in values.items():
        if condition.startswith("control:") and not condition.startswith(RANDOM_CONTROL):
            shares[f"{name}_{condition.removeprefix('control:')}"] = value
    return shares


def _number(
    own: pd.DataFrame, condition: str, group: str, metric: str, column: str = "value"
) -> float:
    """One stored number, or NaN."""
    is_it = (own["condition"] == condition) & (own["group"] == group) & (own["metric"] == metric)
    found = own[column][is_it]
    return float(found.iloc[0]) if len(found) else math.nan
