"""Keeping a comparison of ways of decoding in a store, beside the evaluations of plans."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from moescope.steering.decoding import DecodingComparison


def store_decoding(store_path: str | Path, found: DecodingComparison) -> None:
    """Keep a comparison: its rows in `evaluations`, which have no plan.

    `details` holds the method and, under `settings`, what its condition was run with.

    Raises:
        StoreError: the file is no store of this version.
        StoreBusyError: others kept the store for too long.
    """
    from moescope.probe.storage.locks import append

    frame = found.frame
    settings = {one.name: dict(one.settings) for one in found.conditions}
    details = [
        json.dumps({**found.context, "group": group, "settings": settings[condition]})
        for condition, group in zip(frame["condition"], frame["group"], strict=True)
    ]
    numbers = {
        name: pa.array(frame[name], pa.float64(), from_pandas=True)
        for name in ("value", "low", "high")
    }
    created = pa.scalar(found.created_at, pa.timestamp("us", tz="UTC"))
    append(
        store_path,
        "evaluations",
        pa.table({
            "evaluation_id": [found.evaluation_id] * len(frame),
            "plan_id": pa.nulls(len(frame), pa.string()),
            "created_at": pa.repeat(created, len(frame)),
            "condition": frame["condition"].tolist(),
            "set_name": [found.context["set_name"]] * len(frame),
            "metric": frame["metric"].tolist(),
            **numbers,
            "n": pa.array(frame["n"], pa.int32()),
            "details": details,
        }),
    )  # fmt: skip
