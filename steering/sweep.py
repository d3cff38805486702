"""Dose and response of a contrast table: many plans from it, each judged against its controls.

Every cell's rows are stored as soon as it is done, under an id that is a hash of all it depends on;
a sweep that was killed goes on where it stopped, and one with more cells keeps those it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import DETECTOR
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, render_prompt
from moescope.steering.check import RoutedLayer
from moescope.steering.derive import random_plan
from moescope.steering.evaluate import evaluate_plan
from moescope.steering.evaluation import UNLABELLED, Condition
from moescope.steering.evaluation_store import store_evaluation
from moescope.steering.fluency import FLUENCY_DETECTOR
from moescope.steering.generate import proved_sites
from moescope.steering.plan import SteeringPlan
from moescope.steering.sweep_cells import SweepCell, cell_plan, hash_of, prompts_hash, table_hash
from moescope.steering.sweep_table import stored_rows, sweep_table

MakeControls = Callable[[SteeringPlan, Sequence[RoutedLayer]], Mapping[str, SteeringPlan]]


class SweepProgress(Protocol):
    """Called with the answers made, those to make in all, and the cell in words."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report progress."""


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        table: one row per cell (see `sweep_table`).
        plans: the plan of each cell, in the order of the rows.
        num_found: cells whose rows were in the store already.
    """

    table: pd.DataFrame
    plans: tuple[SteeringPlan, ...]
    num_found: int


@dataclass(frozen=True)
class _Job:
    """A cell with all that is made from it."""

    cell: SweepCell
    plan: SteeringPlan
    controls: Mapping[str, SteeringPlan]
    evaluation_id: str


def run_sweep(
    bundle: ModelBundle,
    frame: pd.DataFrame,
    prompts: Sequence[Prompt],
    cells: Sequence[SweepCell],
    *,
    store_path: str | Path,
    name: str,
    group: str | None = None,
    neutral_label: str = "neutral",
    num_controls: int = 3,
    make_controls: MakeControls | None = None,
    judge_bundle: ModelBundle | None = None,
    confirmed_only: bool = True,
    seed: int = 0,
    max_new_tokens: int = 32,
    tokens_per_batch: int = 4096,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    progress: SweepProgress | None = None,
    say: Callable[[str], None] | None = None,
) -> SweepResult:
    """Judge the plan of every cell, skipping those whose rows the store has.

    Args:
        bundle: model and tokenizer.
        frame: a contrast table.
        prompts: their labels are the groups.
        cells: what to try; see `sweep_grid`.
        store_path: the store, made when missing; rows go into its table `evaluations`.
        name: of the sweep; another name makes all cells again.
        group: the label whose outcomes are wanted; the only one that is not neutral by default.
        neutral_label: the label of prompts where nothing should change.
        num_controls: random plans per cell.
        make_controls: further controls of a plan, by name, given the model's routed layers.
        judge_bundle: tells word salad; see `evaluate_plan`.
        confirmed_only: take only experts whose effect was confirmed.
        seed: of the first random plan and of the bootstrap.
        max_new_tokens: answers are cut here.
        tokens_per_batch: padded tokens a batch may hold, answers included.
        chat_template: whether prompts are rendered through the tokenizer's template.
        system: a system message.
        progress: told the answers done.
        say: told how many cells were there already.

    Raises:
        PlanError: no group to judge, no cells, or a cell that the table or the model has no room
            for; raised before anything is generated.
        StoreError: the file is no store of this version.
    """
    if not cells:
        raise PlanError("a sweep needs at least one cell")
    group = target_group(prompts, neutral_label, group)
    rendered = [
        render_prompt(bundle.tokenizer, prompt, chat_template=chat_template, system=system)
        for prompt in prompts
    ]
    layers = [site.info for site in proved_sites(bundle, rendered)]
    # All that the rows of a cell depend on, beside its plan and controls.
    common = {
        "sweep": name, "model": bundle.name, "revision": bundle.revision,
        "dtype": str(bundle.model.dtype), "prompts": prompts_hash(prompts),
        "neutral_label": neutral_label, "seed": seed, "max_new_tokens": max_new_tokens,
        "tokens_per_batch": tokens_per_batch, "chat_template": chat_template, "system": system,
        "judge_model": (judge_bundle or bundle).name,
        "detector": f"{DETECTOR}+{FLUENCY_DETECTOR}",
    }  # fmt: skip
    jobs = _jobs(
        frame, cells, layers, common, confirmed_only=confirmed_only, num_controls=num_controls,
        make_controls=make_controls,
    )  # fmt: skip
    finished = _finished(store_path, [job.evaluation_id for job in jobs])
    if finished and say is not None:
        say(f"{len(finished)} of {len(jobs)} cells are in {store_path} already")
    left = [job for job in jobs if job.evaluation_id not in finished]
    meter = _Meter(progress, left, num_controls, len(prompts))
    unsteered: Condition | None = None
    for number, job in enumerate(left, start=1):
        result = evaluate_plan(
            bundle, job.plan, prompts, neutral_label=neutral_label, num_controls=num_controls,
            kinds=("random",),
            controls=job.controls, judge_bundle=judge_bundle, unsteered=unsteered, seed=seed,
            max_new_tokens=max_new_tokens, tokens_per_batch=tokens_per_batch,
            chat_template=chat_template, system=system,
            progress=meter.of(f"cell {number} of {len(left)}: {job.cell.title}"),
        )  # fmt: skip
        unsteered = result.conditions[0]
        context = {**result.context, "sweep": name, "cell": job.cell.to_json()}
        store_evaluation(
            store_path, replace(result, evaluation_id=job.evaluation_id, context=context)
        )
    table = sweep_table(
        store_path, {job.evaluation_id: job.cell for job in jobs},
        group=group, neutral_label=neutral_label,
    )  # fmt: skip
    return SweepResult(table, tuple(job.plan for job in jobs), len(finished))


def target_group(prompts: Sequence[Prompt], neutral_label: str, group: str | None) -> str:
    """The label whose outcomes a sweep is about.

    Raises:
        PlanError: no prompt has it, or there are several to choose from.
    """
    labels = {UNLABELLED if one.label is None else one.label for one in prompts}
    others = sorted(labels - {neutral_label})
    if group is not None:
        if group not in labels:
            raise PlanError(
                f"no prompt is labelled {group!r}; there are: {', '.join(sorted(labels))}"
            )
        return group
    if len(others) != 1:
        there = f"{', '.join(others)}: name one" if others else f"only {neutral_label!r}"
        raise PlanError(f"a sweep is about one group of prompts, and there are {there}")
    return others[0]


def _jobs(
    frame: pd.DataFrame,
    cells: Sequence[SweepCell],
    layers: Sequence[RoutedLayer],
    common: Mapping[str, Any],
    *,
    confirmed_only: bool,
    num_controls: int,
    make_controls: MakeControls | None,
) -> list[_Job]:
    """Plan, controls and id of every cell; what cannot be done is refused here."""
    table_id = table_hash(frame)
    seed = int(common["seed"])
    jobs: list[_Job] = []
    for cell in cells:
        plan = cell_plan(
            frame, cell, layers, name=common["sweep"], confirmed_only=confirmed_only,
            model=common["model"], provenance={"table_sha256": table_id},
        )  # fmt: skip
        controls = dict(make_controls(plan, layers)) if make_controls is not None else {}
        random_plans = [random_plan(plan, layers, seed + at) for at in range(num_controls)]
        content = {
            **common,
            "table": table_id,
            "cell": cell.to_json(),
            "plan": plan.plan_id,
            "controls": {key: control.plan_id for key, control in controls.items()},
            "random": [control.plan_id for control in random_plans],
        }
        jobs.append(_Job(cell, plan, controls, hash_of(content)[:32]))
    return jobs


class _Meter:
    """One count of answers over all cells; the unsteered ones are made once."""

    def __init__(
        self,
        progress: SweepProgress | None,
        jobs: Sequence[_Job],
        num_controls: int,
        num_prompts: int,
    ) -> None:
        self._progress = progress
        rounds = sum(1 + num_controls + len(job.controls) for job in jobs) + bool(jobs)
        self._total = rounds * num_prompts
        self._before = 0

    def of(self, note: str) -> Callable[[int, int], None]:
        """The progress of one cell."""

        def update(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(self._before + done, self._total, note)
            if done == total:
                self._before += total

        return update


def _finished(store_path: str | Path, evaluation_ids: Sequence[str]) -> set[str]:
    if not Path(store_path).exists():
        return set()
    return set(stored_rows(store_path, evaluation_ids)["evaluation_id"])
