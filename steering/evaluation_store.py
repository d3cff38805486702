"""Keeping an evaluation: its plans and its rows in a store."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from moescope.steering.evaluation import EvaluationResult


def store_evaluation(store_path: str | Path, result: EvaluationResult) -> None:
    """Keep an evaluation: its plans in `plans`, its rows in `evaluations`.

    Raises:
        StoreError: the file is no store of this version.
        StoreBusyError: others kept the store for too long.
    """
    from moescope.probe.storage.locks import append

    plans = [one.plan for one in result.conditions if one.plan is not None]
    created = pa.scalar(result.created_at, pa.timestamp("us", tz="UTC"))
    append(
        store_path,
        "plans",
        pa.table({
            "plan_id": [plan.plan_id for plan in plans],
            "name": pa.array([plan.name for plan in plans], pa.string()),
            "created_at": pa.repeat(created, len(plans)),
            "plan": [json.dumps(plan.to_dict(), ensure_ascii=False) for plan in plans],
        }),
    )  # fmt: skip
    frame = result.frame
    plan_ids = {one.name: one.plan.plan_id if one.plan else None for one in result.conditions}
    details = [
        json.dumps({**result.context, "group": group, "evaluated_plan_id": result.plan.plan_id})
        for group in frame["group"]
    ]
    numbers = {
        name: pa.array(frame[name], pa.float64(), from_pandas=True)
        for name in ("value", "low", "high")
    }
    append(
        store_path,
        "evaluations",
        pa.table({
            "evaluation_id": [result.evaluation_id] * len(frame),
            "plan_id": pa.array([plan_ids[name] for name in frame["condition"]], pa.string()),
            "created_at": pa.repeat(created, len(frame)),
            "condition": frame["condition"].tolist(),
            "set_name": [result.context["set_name"]] * len(frame),
            "metric": frame["metric"].tolist(),
            **numbers,
            "n": pa.array(frame["n"], pa.int32()),
            "details": details,
        }),
    )  # fmt: skip
