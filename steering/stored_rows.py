"""Rows of the tables `plans` and `evaluations`, as every kind of evaluation keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa

from moescope.probe.storage.locks import append
from moescope.steering.plan import SteeringPlan


def append_plans(
    store_path: str | Path, plans: Sequence[SteeringPlan], created_at: datetime
) -> None:
    """Keep plans; none is fine.

    Raises:
        StoreError: the file is no store of this version.
        StoreBusyError: others kept the store for too long.
    """
    if not plans:
        return
    append(
        store_path,
        "plans",
        pa.table({
            "plan_id": [plan.plan_id for plan in plans],
            "name": pa.array([plan.name for plan in plans], pa.string()),
            "created_at": pa.repeat(timestamp(created_at), len(plans)),
            "plan": [json.dumps(plan.to_dict(), ensure_ascii=False) for plan in plans],
        }),
    )  # fmt: skip


def append_measured(
    store_path: str | Path,
    frame: pd.DataFrame,
    *,
    evaluation_id: str,
    created_at: datetime,
    set_name: str,
    plan_ids: Sequence[str | None],
    details: Sequence[str],
) -> None:
    """Keep measured rows of one evaluation.

    Args:
        store_path: the store.
        frame: condition, metric, value, low, high, n.
        evaluation_id: of the evaluation.
        created_at: when it was made.
        set_name: of the prompts.
        plan_ids: of each row's plan; None where it had none.
        details: JSON of each row.

    Raises:
        StoreError: the file is no store of this version.
        StoreBusyError: others kept the store for too long.
    """
    numbers = {
        name: pa.array(frame[name], pa.float64(), from_pandas=True)
        for name in ("value", "low", "high")
    }
    append(
        store_path,
        "evaluations",
        pa.table({
            "evaluation_id": [evaluation_id] * len(frame),
            "plan_id": pa.array(plan_ids, pa.string()),
            "created_at": pa.repeat(timestamp(created_at), len(frame)),
            "condition": frame["condition"].tolist(),
            "set_name": [set_name] * len(frame),
            "metric": frame["metric"].tolist(),
            **numbers,
            "n": pa.array(frame["n"], pa.int32()),
            "details": list(details),
        }),
    )  # fmt: skip


def timestamp(created_at: datetime) -> pa.Scalar:
    """A time as both tables hold it."""
    return pa.scalar(created_at, pa.timestamp("us", tz="UTC"))
