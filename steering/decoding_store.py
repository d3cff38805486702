"""Keeping a comparison of ways of decoding in a store, beside the evaluations of plans."""

from __future__ import annotations

import json
from pathlib import Path

from moescope.steering.decoding import DecodingComparison
from moescope.steering.stored_rows import append_measured


def store_decoding(store_path: str | Path, found: DecodingComparison) -> None:
    """Keep a comparison: its rows in `evaluations`, which have no plan.

    `details` holds the method and, under `settings`, what its condition was run with.

    Raises:
        StoreError: the file is no store of this version.
        StoreBusyError: others kept the store for too long.
    """
    frame = found.frame
    settings = {one.name: dict(one.settings) for one in found.conditions}
    append_measured(
        store_path, frame, evaluation_id=found.evaluation_id, created_at=found.created_at,
        set_name=found.context["set_name"], plan_ids=[None] * len(frame),
        details=[
            json.dumps({**found.context, "group": group, "settings": settings[condition]})
            for condition, group in zip(frame["condition"], frame["group"], strict=True)
        ],
    )  # fmt: skip
