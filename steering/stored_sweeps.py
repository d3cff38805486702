"""The sweeps that a store holds: which cells belong together, and their rows by condition.

A sweep is what one command made: cells under one name, of one model, one table of experts, one set
of prompts and one way to judge. What differs in any of these is another sweep, though it may have
the same name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.probe.outcomes import OUTCOMES
from moescope.steering.condition_names import control_kind
from moescope.steering.evaluation import STEERED, UNSTEERED
from moescope.steering.plan import SteeringPlan
from moescope.steering.sweep_cells import LayerWindow, SweepCell
from moescope.steering.sweep_table import stored_rows

_NOT_SETTINGS: Final = ("cell", "group", "evaluated_plan_id")
_SIDE_EFFECTS: Final = ("kl_first", "kl_answer")
_KEYS: Final = (
    "evaluation_id", "count", "mode", "layers", "strength", "condition", "control",
)  # fmt: skip
_ENDS: Final = ("", "_low", "_high")
# Whose number of prompts is told, and under which name.
_COUNTED: Final = {"correct": "n", "neutral_correct": "n_neutral"}


@dataclass(frozen=True, kw_only=True)
class StoredSweep:
    """Cells that one sweep made.

    Attributes:
        settings: what all its cells share: `sweep` (its name), `model, revision, set_name,
            num_prompts, neutral_label, max_new_tokens, seed, detector, judge_model`, as stored
            with every row, and `table_sha256`.
        cells: evaluation id -> cell, in the order of modes, strengths, windows and counts.
        groups: the labels of its prompts that are not neutral.
        created_at: when its newest cell was stored.
        num_replaced: cells that were made again since, as after another choice of controls; of
            each the newest is kept.
    """

    settings: Mapping[str, Any]
    cells: Mapping[str, SweepCell]
    groups: tuple[str, ...]
    created_at: datetime
    num_replaced: int

    @property
    def name(self) -> str:
        """As the user called it."""
        return str(self.settings["sweep"])

    @property
    def neutral_label(self) -> str:
        """The label of prompts where nothing should change."""
        return str(self.settings.get("neutral_label", "neutral"))

    @property
    def model(self) -> str:
        """Model and revision."""
        revision = self.settings.get("revision")
        model = str(self.settings["model"])
        return model if revision is None else f"{model}@{revision}"


def stored_sweeps(
    store_path: str | Path, evaluation_ids: Sequence[str] | None = None
) -> list[StoredSweep]:
    """The sweeps of a store, newest first.

    Args:
        store_path: the store.
        evaluation_ids: only these cells.

    Raises:
        StoreError: the file is no store of this version.
        StoreBusyError: a writer kept it for too long.
    """
    found = _evaluations(store_path)
    if evaluation_ids is not None:
        found = found[found["evaluation_id"].isin(list(evaluation_ids))]
    by_settings: dict[str, list[Mapping[Any, Any]]] = {}
    for row in found.to_dict("records"):
        details = json.loads(row["details"])
        settings = {key: details[key] for key in details if key not in _NOT_SETTINGS}
        settings["table_sha256"] = row["table_sha256"]
        made = {**row, "cell": _cell(details["cell"]), "settings": settings}
        by_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(made)
    sweeps = [_sweep(rows) for rows in by_settings.values()]
    return sorted(sweeps, key=lambda one: one.created_at, reverse=True)


def sweep_conditions(store_path: str | Path, sweep: StoredSweep, group: str) -> pd.DataFrame:
    """One row per cell and condition: unsteered, steered, and each control by itself.

    Args:
        store_path: the store.
        sweep: whose cells.
        group: the label whose outcomes are the effect.

    Returns:
        `evaluation_id, count, mode, layers, strength, condition, control` (its kind; missing for
        unsteered and steered), `n` (prompts of the group), `n_neutral`; for each outcome the share
        with `_low` and `_high` (95 %, Wilson) and `_change` (against unsteered, paired) with
        `_change_low` and `_change_high` (95 %, bootstrap over pair_id); the same of neutral
        prompts with `neutral_` before it; `kl_first` and `kl_answer` (nats, neutral prompts) with
        `_low` and `_high`. What was not measured is NaN.
    """
    wanted = _wanted(group, sweep.neutral_label)
    places: dict[tuple[str, str], dict[str, Any]] = {}
    for row in stored_rows(store_path, list(sweep.cells)).to_dict("records"):
        name = wanted.get((row["group"], row["metric"]))
        if name is None:
            continue
        place = places.setdefault((row["evaluation_id"], row["condition"]), {})
        place |= {name: row["value"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
        if name in _COUNTED:
            place[_COUNTED[name]] = row["n"]
    numbers = [*_COUNTED.values(), *(f"{name}{end}" for name in wanted.values() for end in _ENDS)]
    order = {evaluation_id: at for at, evaluation_id in enumerate(sweep.cells)}
    found = sorted(places.items(), key=lambda item: (order[item[0][0]], _rank(item[0][1])))
    rows = [
        {
            "evaluation_id": evaluation_id, **sweep.cells[evaluation_id].to_json(),
            "condition": condition, "control": control_kind(condition), **values,
        }
        for (evaluation_id, condition), values in found
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=[*_KEYS, *numbers])
    return frame.astype(dict.fromkeys(("strength", *numbers), "float64"))


def stored_plan(store_path: str | Path, plan_id: str) -> SteeringPlan:
    """A plan that a store holds.

    Raises:
        PlanError: it holds none of this id.
    """
    from moescope.probe.storage.store import Store

    found = Store(store_path).query("SELECT plan FROM plans WHERE plan_id = ? LIMIT 1", [plan_id])
    if found.empty:
        raise PlanError(f"{store_path}: there is no plan {plan_id}")
    return SteeringPlan.parse(found["plan"].iloc[0], source=f"plan {plan_id}")


def _evaluations(store_path: str | Path) -> pd.DataFrame:
    """One row per evaluation that is a cell: id, time, details, groups, hash of its table."""
    from moescope.probe.storage.store import Store

    return Store(store_path).query(
        "SELECT evaluation_id, max(evaluations.created_at) AS created_at, min(details) AS details, "
        "list(DISTINCT json_extract_string(details, '$.group')) AS groups, "
        "min(json_extract_string(plan, '$.provenance.table_sha256')) AS table_sha256 "
        "FROM evaluations LEFT JOIN plans USING (plan_id) "
        "WHERE json_exists(details, '$.sweep') AND json_exists(details, '$.cell') "
        "AND metric = 'correct' AND condition IN ('unsteered', 'steered') "
        "GROUP BY evaluation_id ORDER BY created_at, evaluation_id"
    )


def _sweep(rows: Sequence[Mapping[Any, Any]]) -> StoredSweep:
    """The cells of one sweep; of a cell that is there again the newest."""
    newest = {row["cell"]: row for row in rows}
    kept = sorted(newest.values(), key=lambda row: _place(row["cell"]))
    settings = rows[-1]["settings"]
    labels = {label for row in kept for label in row["groups"]}
    neutral = settings.get("neutral_label", "neutral")
    return StoredSweep(
        settings=settings,
        cells={row["evaluation_id"]: row["cell"] for row in kept},
        groups=tuple(sorted(labels - {neutral})) or tuple(sorted(labels)),
        created_at=max(row["created_at"] for row in kept),
        num_replaced=len(rows) - len(kept),
    )


def _cell(stored: Mapping[str, Any]) -> SweepCell:
    return SweepCell(
        count=int(stored["count"]),
        mode=stored["mode"],
        window=LayerWindow.parse(str(stored["layers"])),
        strength=stored["strength"],
    )


def _place(cell: SweepCell) -> tuple[str, float, str, int]:
    return (cell.mode, cell.strength or 0.0, str(cell.window or ""), cell.count)


def _rank(condition: str) -> int:
    """Unsteered, steered, then the controls as they were stored."""
    return {UNSTEERED: 0, STEERED: 1}.get(condition, 2)


def _wanted(group: str, neutral: str) -> dict[tuple[str, str], str]:
    """Group and metric of a stored row -> column."""
    metrics = [f"{outcome}{end}" for outcome in OUTCOMES for end in ("", "_change")]
    wanted = {(neutral, metric): f"neutral_{metric}" for metric in metrics}
    wanted |= {(neutral, metric): metric for metric in _SIDE_EFFECTS}
    return wanted | {(group, metric): metric for metric in metrics}
