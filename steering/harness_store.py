"""Keeping what lm-evaluation-harness said of a plan: rows of `plans` and `evaluations`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from moescope.steering.harness_run import HarnessResult
from moescope.steering.stored_rows import append_plans, timestamp


def store_tasks(store_path: str | Path, result: HarnessResult) -> None:
    """Keep a result: its plans in `plans`, its rows in `evaluations`.

    A score is a row with the task as its `set_name`, without `low` and `high`: the harness'
    standard error is in `details`. Its change is a row `METRIC_change` with the interval over
    units. For each plan `achieved` is the share of requests that held.

    Raises:
        StoreError: the file is no store of this version.
        StoreBusyError: others kept the store for too long.
    """
    from moescope.probe.storage.locks import append

    plans = [one.plan for one in result.conditions if one.plan is not None]
    append_plans(store_path, plans, result.created_at)
    rows = [*_scores(result), *_achieved(result)]
    schema = pa.schema([
        ("plan_id", pa.string()), ("condition", pa.string()), ("set_name", pa.string()),
        ("metric", pa.string()), ("value", pa.float64()), ("low", pa.float64()),
        ("high", pa.float64()), ("n", pa.int32()), ("details", pa.string()),
    ])  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=schema)
    table = table.append_column("created_at", pa.repeat(timestamp(result.created_at), len(rows)))
    table = table.append_column(
        "evaluation_id", pa.repeat(pa.scalar(result.evaluation_id), len(rows))
    )
    append(store_path, "evaluations", table)


def _scores(result: HarnessResult) -> list[dict[str, Any]]:
    plan_ids = {one.name: one.plan.plan_id if one.plan else None for one in result.conditions}
    rows: list[dict[str, Any]] = []
    for one in result.frame.to_dict("records"):
        common = {
            "plan_id": plan_ids[one["condition"]],
            "condition": one["condition"],
            "set_name": one["task"],
            "n": one["n"],
        }
        details = _details(result, stderr=_or_none(one["stderr"]))
        rows.append(common | {"metric": one["metric"], "value": _or_none(one["value"]),
                              "details": details})  # fmt: skip
        if not pd.isna(one["change"]):
            rows.append(common | {
                "metric": f"{one['metric']}_change", "value": one["change"],
                "low": _or_none(one["change_low"]), "high": _or_none(one["change_high"]),
                "details": _details(result),
            })  # fmt: skip
    return rows


def _achieved(result: HarnessResult) -> list[dict[str, Any]]:
    """Of each plan the share of requests that held, over all tasks."""
    rows: list[dict[str, Any]] = []
    for one in result.conditions:
        if one.report is None or one.plan is None:
            continue
        requested = sum(row.requested for row in one.report.rows if row.is_promise)
        rows.append({
            "plan_id": one.plan.plan_id, "condition": one.name,
            "set_name": "+".join(sorted(result.context["tasks"])), "metric": "achieved",
            "value": one.report.share, "n": requested, "details": _details(result),
        })  # fmt: skip
    return rows


def _details(result: HarnessResult, **more: Any) -> str:
    plan_id = None if result.plan is None else result.plan.plan_id
    return json.dumps({**result.context, "group": "all", "evaluated_plan_id": plan_id, **more})


def _or_none(value: float) -> float | None:
    return None if pd.isna(value) else float(value)
