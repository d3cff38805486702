"""Keeping an evaluation: its plans and its rows in a store."""

from __future__ import annotations

import json
from pathlib import Path

from moescope.steering.evaluation import EvaluationResult
from moescope.steering.stored_rows import append_measured, append_plans


def store_evaluation(store_path: str | Path, result: EvaluationResult) -> None:
    """Keep an evaluation: its plans in `plans`, its rows in `evaluations`.

    Raises:
        StoreError: the file is no store of this version.
        StoreBusyError: others kept the store for too long.
    """
    plans = [one.plan for one in result.conditions if one.plan is not None]
    append_plans(store_path, plans, result.created_at)
    frame = result.frame
    plan_ids = {one.name: one.plan.plan_id if one.plan else None for one in result.conditions}
    append_measured(
        store_path, frame, evaluation_id=result.evaluation_id, created_at=result.created_at,
        set_name=result.context["set_name"],
        plan_ids=[plan_ids[name] for name in frame["condition"]],
        details=[
            json.dumps({**result.context, "group": group, "evaluated_plan_id": result.plan.plan_id})
            for group in frame["group"]
        ],
    )  # fmt: skip
