"""Tasks of lm-evaluation-harness on a steered model, beside the unsteered one and controls.

The harness makes requests, prompts and scores and gives the standard error; here its model runs
inside `steer`. Each score is compared with the unsteered one: where it is the mean of one number
per document, the change is paired, with a 95 % bootstrap interval over units (the documents'
`pair_id`, else the document); otherwise it is a difference alone.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Real
from typing import Any, Final

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, render_prompt, uses_chat_template
from moescope.probe.routers import RouterSite
from moescope.steering.apply import steer
from moescope.steering.check import check
from moescope.steering.derive import random_plan
from moescope.steering.evaluation import RANDOM_CONTROL, STEERED, UNSTEERED
from moescope.steering.generate import achieved_in_words, proved_sites
from moescope.steering.harness_tasks import HarnessTasks, check_tasks, quiet, require_harness
from moescope.steering.plan import SteeringPlan
from moescope.steering.rates import mean_over_units
from moescope.steering.report import SteeringReport

#: Seed of the harness' own draws (few-shot examples, numpy, torch), its default.
HARNESS_SEED: Final = 1234
_EXAMPLE: Final = "What happened in the year in which the bridge was built, and who built it?"
_COLUMNS: Final = {
    "task": str, "metric": str, "condition": str, "value": float, "stderr": float, "n": int,
    "change": float, "change_low": float, "change_high": float,
}  # fmt: skip


@dataclass(frozen=True)
class HarnessCondition:
    """All tasks under one plan, or under none.

    Attributes:
        name: `unsteered`, `steered` or `control:random:SEED`.
        plan: the plan applied.
        report: requested against achieved routing over all requests.
        results: what `simple_evaluate` returned, every document included.
    """

    name: str
    plan: SteeringPlan | None
    report: SteeringReport | None
    results: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """Tasks run under several conditions.

    Attributes:
        evaluation_id: new each time.
        created_at: when it was made.
        plan: the plan judged, if any.
        conditions: unsteered, steered, then the controls.
        frame: task, metric (with its filter, where that has a name), condition, value, stderr (the
            harness'), n (documents); change against unsteered with the ends of its interval.
        notes: what could not be done, and why.
        context: model, versions, settings, seeds.
    """

    evaluation_id: str
    created_at: datetime
    plan: SteeringPlan | None
    conditions: tuple[HarnessCondition, ...]
    frame: pd.DataFrame
    notes: tuple[str, ...]
    context: Mapping[str, Any]

    def lines(self) -> list[str]:
        """Achieved routing and notes, for people."""
        return [
            *(
                f"routing, {one.name}: {achieved_in_words(one.report)}"
                for one in self.conditions
                if one.report is not None
            ),
            *self.notes,
        ]

    def to_json(self) -> dict[str, Any]:
        """The rows, the routing and the settings as plain data."""
        return {
            "evaluation_id": self.evaluation_id,
            "created_at": self.created_at.isoformat(),
            "plan_id": None if self.plan is None else self.plan.plan_id,
            "context": dict(self.context),
            "rows": [
                {name: None if pd.isna(value) else value for name, value in row.items()}
                for row in self.frame.to_dict("records")
            ],
            "achieved": {
                one.name: one.report.to_json() for one in self.conditions if one.report is not None
            },
            "notes": list(self.notes),
        }


def run_tasks(
    bundle: ModelBundle,
    tasks: HarnessTasks,
    plan: SteeringPlan | None = None,
    *,
    num_controls: int = 1,
    seed: int = 0,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat_template: ChatTemplate = "auto",
    bootstrap_iters: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> HarnessResult:
    """Run tasks unsteered, steered and with random experts in the plan's place.

    Args:
        bundle: model and tokenizer.
        tasks: from `load_tasks`.
        plan: what to change; without one, only the unsteered model is run.
        num_controls: random plans of the same shape, with seeds `seed`, `seed + 1`, ...; none for
            a plan that names no experts, which a note then tells.
        seed: also of the bootstrap over units.
        limit: only the first so many documents of each task.
        num_fewshot: examples before each question; tasks that fix 0 keep it.
        batch_size: requests in one forward.
        chat_template: whether prompts are rendered through the tokenizer's template, examples as
            turns of their own.
        bootstrap_iters: of the harness, for standard errors that have no formula.
        progress: called with (requests done, requests in all).

    Raises:
        PlanError: the plan changes nothing, or does not fit the model or the tasks; raised before
            anything is run.
        InputError: lm_eval is not installed, the model is an encoder-decoder, or it has no
            template where one is asked for.
    """
    harness = require_harness()
    templated = uses_chat_template(bundle.tokenizer, chat_template)
    plans: dict[str, SteeringPlan | None] = {UNSTEERED: None}
    sites: list[RouterSite] = []
    notes: list[str] = []
    if plan is not None:
        check_tasks(plan, tasks)
        example = Prompt(prompt_id=0, text=_EXAMPLE, set_name="example")
        sites = proved_sites(
            bundle, [render_prompt(bundle.tokenizer, example, chat_template=chat_template)]
        )
        plans |= _plans(plan, sites, num_controls, seed, notes)
    runner = _Runner(bundle, tasks, sites, batch_size, len(plans), progress)
    settings = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": templated,
        "bootstrap_iters": bootstrap_iters,
    }
    conditions = [runner.run(name, one, settings) for name, one in plans.items()]
    return HarnessResult(
        evaluation_id=uuid.uuid4().hex,
        created_at=datetime.now(UTC),
        plan=plan,
        conditions=tuple(conditions),
        frame=_frame(conditions, seed),
        notes=tuple(notes),
        context={
            "model": bundle.name,
            "revision": bundle.revision,
            "harness": f"lm_eval {harness}",
            "tasks": {
                name: conditions[0].results["versions"].get(name) for name in sorted(tasks.tasks)
            },
            "num_fewshot": {
                name: conditions[0].results["n-shot"].get(name) for name in sorted(tasks.tasks)
            },
            "limit": limit,
            "batch_size": batch_size,
            "chat_template": templated,
            "seed": seed,
            "harness_seed": HARNESS_SEED,
            "bootstrap_iters": bootstrap_iters,
            "unit": "pair_id",
        },
    )


def _plans(
    plan: SteeringPlan, sites: list[RouterSite], num_controls: int, seed: int, notes: list[str]
) -> dict[str, SteeringPlan]:
    """The steered condition and its random controls."""
    if not plan.interventions:
        raise PlanError(f"plan {plan.title!r} changes nothing, so there is nothing to compare")
    infos = [site.info for site in sites]
    check(plan, infos)
    plans = {STEERED: plan}
    if not any(one.experts for one in plan.interventions):
        notes.append("the plan names no experts, so random experts cannot be its control")
        return plans
    for control_seed in range(seed, seed + num_controls):
        name = f"{RANDOM_CONTROL}{control_seed}"
        plans[name] = random_plan(plan, infos, control_seed)
        if plans[name].provenance.get("overlap"):
            notes.append(f"{name} shares experts with the plan: its layers have too few others")
    return plans


class _Runner:
    """Runs the same tasks under several plans."""

    def __init__(
        self,
        bundle: ModelBundle,
        tasks: HarnessTasks,
        sites: list[RouterSite],
        batch_size: int,
        num_conditions: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        from moescope.steering.harness_model import SteerableHFLM

        self._bundle = bundle
        self._tasks = tasks
        self._sites = sites
        self._num_conditions = num_conditions
        self._num_begun = 0
        self._done = 0
        self._progress = progress
        with quiet():
            self._model = SteerableHFLM(bundle, batch_size=batch_size, advance=self._advance)

    def run(
        self, name: str, plan: SteeringPlan | None, settings: Mapping[str, Any]
    ) -> HarnessCondition:
        """One condition; seeds are set anew, so that all have the same few-shot examples."""
        from lm_eval import simple_evaluate

        self._num_begun += 1
        self._done = 0
        under = (
            nullcontext(None)
            if plan is None
            else steer(self._bundle.model, plan, sites=self._sites)
        )
        with quiet(), under as report:
            results = simple_evaluate(
                model=self._model,
                tasks=list(self._tasks.given),
                task_manager=self._tasks.manager,
                log_samples=True,
                fewshot_as_multiturn=True,
                random_seed=0,
                numpy_random_seed=HARNESS_SEED,
                torch_random_seed=HARNESS_SEED,
                fewshot_random_seed=HARNESS_SEED,
                **settings,
            )
        return HarnessCondition(name, plan, report, results)

    def _advance(self, num_rows: int) -> None:
        """Count requests; the harness has made those of a condition when its first one runs."""
        if self._progress is None:
            return
        each = sum(len(task.instances) for task in self._tasks.tasks.values())
        self._done = min(self._done + num_rows, each)  # a long text is several rows
        self._progress((self._num_begun - 1) * each + self._done, self._num_conditions * each)


@dataclass(frozen=True)
class _Score:
    """One metric of one task under one condition; values by document, where it is their mean."""

    value: float
    stderr: float
    n: int
    by_document: Mapping[int, float] | None


def _frame(conditions: list[HarnessCondition], seed: int) -> pd.DataFrame:
    """The scores of all conditions with their changes, task by task."""
    scores = [_scores(one.results) for one in conditions]
    rows: list[dict[str, Any]] = []
    for (task, metric), before in scores[0].items():
        units = _units(conditions[0].results, task)
        for condition, found in zip(conditions, scores, strict=True):
            score = found[task, metric]
            row = {"task": task, "metric": metric, "condition": condition.name,
                   "value": score.value, "stderr": score.stderr, "n": score.n}  # fmt: skip
            if condition.plan is not None:
                row |= _change(score, before, units, seed)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)


def _scores(results: Mapping[str, Any]) -> dict[tuple[str, str], _Score]:
    """Every number of the harness' results by task (or group) and metric."""
    found: dict[tuple[str, str], _Score] = {}
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            stderr = numbers.get(f"{metric}_stderr,{name}")
            values = _by_document(results.get("samples", {}).get(task, ()), metric, name)
            counts = numbers.get("sample_count") or {}
            n = len(values) if values else counts.get(key, numbers["sample_len"])
            plain = _numbers(values)
            is_mean = bool(plain) and math.isclose(
                math.fsum(plain.values()) / len(plain), float(value), abs_tol=1e-9
            )
            found[task, metric if name == "none" else key] = _Score(
                float(value),
                float(stderr) if isinstance(stderr, Real) else math.nan,
                int(n),
                plain if is_mean else None,
            )
    return found


def _by_document(samples: Any, metric: str, name: str) -> dict[int, Any]:
    return {
        one["doc_id"]: one[metric] for one in samples if one["filter"] == name and metric in one
    }


def _numbers(values: Mapping[int, Any]) -> dict[int, float]:
    """The values as numbers; none where one is something else."""
    if not all(isinstance(value, Real) for value in values.values()):
        return {}
    return {document: float(value) for document, value in values.items()}


def _units(results: Mapping[str, Any], task: str) -> dict[int, str]:
    """The unit of each document: its pair, or itself."""
    units: dict[int, str] = {}
    for one in results.get("samples", {}).get(task, ()):
        document = one["doc"]
        pair = document.get("pair_id") if isinstance(document, Mapping) else None
        units[one["doc_id"]] = f"document {one['doc_id']}" if pair is None else f"pair {pair}"
    return units


def _change(
    score: _Score, before: _Score, units: Mapping[int, str], seed: int
) -> dict[str, float | None]:
    """The change against unsteered, paired by document where the score is a mean over them."""
    now, then = score.by_document, before.by_document
    if now is None or then is None or now.keys() != then.keys():
        return {"change": score.value - before.value}
    changes = [now[document] - then[document] for document in now]
    mean, low, high = mean_over_units(changes, [units[document] for document in now], seed)
    return {"change": mean, "change_low": low, "change_high": high}
