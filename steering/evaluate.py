"""Judging a plan: outcomes without it, with it, and with random experts in its place.

For each group of prompts (their label) and each condition: the share of each outcome with a Wilson
interval, and its paired change against the unsteered model with a bootstrap interval over units
(`pair_id`). Wilson treats prompts as independent; where units hold several prompts the bootstrap
interval of the change is the one to read. On neutral prompts also the side effects
(`moescope.steering.side_effects`); for each plan the routing it achieved.

A plan whose effect random experts have too has shown nothing, so controls are not optional here.
Other controls (the bottom of a ranking, experts of the same load) are given as plans.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from moescope.probe.errors import PlanError
from moescope.probe.generation import Answer
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import DETECTOR, OUTCOMES
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, render_prompt
from moescope.probe.routers import LayerInfo
from moescope.steering.check import check
from moescope.steering.derive import random_plan
from moescope.steering.evaluation import (
    RANDOM_CONTROL,
    STEERED,
    UNLABELLED,
    UNSTEERED,
    ChangedAnswer,
    Condition,
    EvaluationResult,
)
from moescope.steering.fluency import FLUENCY_DETECTOR, FluencyJudge, paired_neutral
from moescope.steering.generate import Asker, judged, proved_sites
from moescope.steering.plan import SteeringPlan
from moescope.steering.rates import Measured, mean_over_units, measured_frame, rate
from moescope.steering.report import SteeringReport
from moescope.steering.side_effects import Divergence, divergences


def evaluate_plan(
    bundle: ModelBundle,
    plan: SteeringPlan,
    prompts: Sequence[Prompt],
    *,
    neutral_label: str = "neutral",
    num_controls: int = 3,
    controls: Mapping[str, SteeringPlan] | None = None,
    judge_bundle: ModelBundle | None = None,
    unsteered: Condition | None = None,
    seed: int = 0,
    max_new_tokens: int = 32,
    tokens_per_batch: int = 4096,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Answer all prompts unsteered, steered and with random experts, greedily, and compare.

    Args:
        bundle: model and tokenizer.
        plan: what to judge.
        prompts: groups are their labels; `expected` decides what is correct.
        neutral_label: the label of prompts that have nothing to do with the behavior; on these
            the side effects are measured.
        num_controls: random plans of the same shape, with seeds `seed`, `seed + 1`, ...; none for
            a plan that names no experts (another top-k, say), which a note then tells.
        controls: further plans to compare with, by name; each is the condition `control:NAME`.
        judge_bundle: a model that does not refuse, to tell word salad (see `fluency`); `bundle`
            itself is asked the paired neutral prompts. Without one, fluency is not judged.
        unsteered: that condition of an earlier evaluation of the same prompts with the same
            settings, whose answers are then not made again.
        seed: also of the bootstrap.
        max_new_tokens: answers are cut here.
        tokens_per_batch: padded tokens a batch may hold, answers included.
        chat_template: whether prompts are rendered through the tokenizer's template.
        system: a system message.
        progress: called with (answers done, answers in all).

    Raises:
        PlanError: an empty plan, or one that does not fit the model; raised before anything is
            generated.
    """
    if not plan.interventions:
        raise PlanError(f"plan {plan.title!r} changes nothing, so there is nothing to evaluate")
    rendered = [
        render_prompt(bundle.tokenizer, prompt, chat_template=chat_template, system=system)
        for prompt in prompts
    ]
    sites = proved_sites(bundle, rendered)
    plans = _plans(plan, [site.info for site in sites], num_controls, seed, controls or {})
    asker = Asker(
        bundle, rendered, sites, max_new_tokens=max_new_tokens, tokens_per_batch=tokens_per_batch,
        num_rounds=len(plans) - (unsteered is not None), progress=progress,
    )  # fmt: skip
    neutral = [at for at, prompt in enumerate(prompts) if prompt.label == neutral_label]
    conditions = _conditions(asker, prompts, plans, neutral, unsteered)
    fluency: FluencyJudge | None = None
    if judge_bundle is not None:
        is_itself = judge_bundle is bundle
        fluency = FluencyJudge(
            judge_bundle, paired_neutral(prompts, neutral_label) if is_itself else prompts,
            [prompt.lang for prompt in prompts], chat_template=chat_template, system=system,
        )  # fmt: skip
        conditions = _judged_by_fluency(fluency, conditions, neutral)
    return EvaluationResult(
        evaluation_id=uuid.uuid4().hex,
        created_at=datetime.now(UTC),
        plan=plan,
        conditions=tuple(conditions),
        frame=measured_frame(_rows(prompts, conditions, seed) + _bar_rows(fluency)),
        examples=tuple(_changed_answers(prompts, *conditions[:2])),
        notes=_notes(conditions, neutral, neutral_label, fluency),
        context={
            "model": bundle.name,
            "revision": bundle.revision,
            "set_name": "+".join(sorted({prompt.set_name for prompt in prompts})),
            "num_prompts": len(prompts),
            "neutral_label": neutral_label,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "detector": DETECTOR if fluency is None else f"{DETECTOR}+{FLUENCY_DETECTOR}",
            "judge_model": None if judge_bundle is None else judge_bundle.name,
            "unit": "pair_id",
        },
    )


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


def _plans(
    plan: SteeringPlan,
    infos: Sequence[LayerInfo],
    num_controls: int,
    seed: int,
    controls: Mapping[str, SteeringPlan],
) -> dict[str, SteeringPlan | None]:
    """The conditions by name: unsteered, steered, random controls, then the given ones."""
    check(plan, infos)
    plans: dict[str, SteeringPlan | None] = {UNSTEERED: None, STEERED: plan}
    has_experts = any(one.experts for one in plan.interventions)
    for control_seed in range(seed, seed + num_controls) if has_experts else ():
        plans[f"{RANDOM_CONTROL}{control_seed}"] = random_plan(plan, infos, control_seed)
    for name, control in controls.items():
        condition = f"control:{name}"
        if not name or condition.startswith(RANDOM_CONTROL):
            raise PlanError(
                f"a control cannot be named {name!r}: give it a name that does not begin with "
                "'random:', which the random controls have"
            )
        check(control, infos)
        plans[condition] = control
    return plans


def _conditions(
    asker: Asker,
    prompts: Sequence[Prompt],
    plans: Mapping[str, SteeringPlan | None],
    neutral: Sequence[int],
    unsteered: Condition | None,
) -> list[Condition]:
    """Every plan's answers, outcomes and side effects, in the order of the plans."""
    if unsteered is not None and len(unsteered.answers) != len(prompts):
        raise ValueError("the unsteered condition must be of the same prompts")
    conditions: list[Condition] = []
    for name, plan in plans.items():
        moved: dict[int, Divergence] = {}
        if plan is None and unsteered is not None:
            answers, report, seconds = list(unsteered.answers), None, unsteered.seconds
        else:
            started = time.perf_counter()
            answers, report = asker.ask(plan)
            seconds = time.perf_counter() - started
        if plan is not None:
            moved = _side_effects(asker, plan, neutral, conditions[0].answers)
        judgements = tuple(map(judged, prompts, answers))
        conditions.append(Condition(name, plan, tuple(answers), judgements, report, moved, seconds))
    return conditions


def _judged_by_fluency(
    fluency: FluencyJudge, conditions: Sequence[Condition], neutral: Sequence[int]
) -> list[Condition]:
    """The conditions with word salad called broken; the bar is set by unsteered answers."""
    texts = [[answer.text for answer in one.answers] for one in conditions]
    fluency.fit(neutral, texts[0], conditions[0].judgements)
    return [
        replace(one, judgements=fluency.judge(answers, one.judgements))
        for one, answers in zip(conditions, texts, strict=True)
    ]


def _side_effects(
    asker: Asker, plan: SteeringPlan, neutral: Sequence[int], unsteered: Sequence[Answer]
) -> dict[int, Divergence]:
    """Divergences on the neutral prompts that the unsteered model answered with anything."""
    answered = [at for at in neutral if unsteered[at].token_ids]
    found = divergences(
        asker.bundle,
        plan,
        [asker.rendered[at] for at in answered],
        [unsteered[at] for at in answered],
        sites=asker.sites,
    )
    return dict(zip(answered, found, strict=True))


def _rows(prompts: Sequence[Prompt], conditions: Sequence[Condition], seed: int) -> list[Measured]:
    groups = [_group(prompt) for prompt in prompts]
    units = [
        f"pair {prompt.pair_id}" if prompt.pair_id is not None else f"prompt {prompt.prompt_id}"
        for prompt in prompts
    ]
    rows: list[Measured] = []
    for condition in conditions:
        for group in sorted(set(groups)):
            members = [at for at, found in enumerate(groups) if found == group]
            rows += _outcome_rows(condition, conditions[0], group, members, units, seed)
            moved = [at for at in members if at in condition.side_effects]
            for metric in ("first", "answer") if moved else ():
                values = [float(getattr(condition.side_effects[at], metric)) for at in moved]
                mean, low, high = mean_over_units(values, [units[at] for at in moved], seed)
                rows.append(Measured(
                    condition=condition.name, group=group, metric=f"kl_{metric}",
                    value=mean, low=low, high=high, n=len(moved),
                ))  # fmt: skip
        num_tokens = sum(len(answer.token_ids) for answer in condition.answers)
        rows.append(Measured(
            condition=condition.name, group="all", metric="tokens_per_s",
            value=num_tokens / condition.seconds, n=len(prompts),
        ))  # fmt: skip
        if condition.report is not None:
            rows += _achieved_rows(condition.name, condition.report)
    return rows


def _bar_rows(fluency: FluencyJudge | None) -> list[Measured]:
    """The bars answers were judged by: nats per token, and the neutral answers behind each."""
    return [
        Measured(
            condition=UNSTEERED, group="all", value=one.nats, n=one.n,
            metric=f"fluency_bar:{one.lang or 'all'}:{one.band or 'all'}",
        )
        for one in (fluency.bar.thresholds if fluency is not None else ())
    ]  # fmt: skip


def _outcome_rows(
    condition: Condition,
    unsteered: Condition,
    group: str,
    members: Sequence[int],
    units: Sequence[str],
    seed: int,
) -> list[Measured]:
    rows: list[Measured] = []
    for outcome in OUTCOMES:
        hits = [condition.judgements[at].outcome == outcome for at in members]
        value, low, high = rate(hits)
        rows.append(Measured(
            condition=condition.name, group=group, metric=outcome,
            value=value, low=low, high=high, n=len(members),
        ))  # fmt: skip
        if condition is unsteered:
            continue
        before = [unsteered.judgements[at].outcome == outcome for at in members]
        change = [float(now) - float(then) for now, then in zip(hits, before, strict=True)]
        mean, change_low, change_high = mean_over_units(change, [units[at] for at in members], seed)
        rows.append(Measured(
            condition=condition.name, group=group, metric=f"{outcome}_change",
            value=mean, low=change_low, high=change_high, n=len(members),
        ))  # fmt: skip
    return rows


def _achieved_rows(condition: str, report: SteeringReport) -> list[Measured]:
    """Shares of requests that held, with and without steering; no samples, so no interval."""
    rows = [row for row in report.rows if row.is_promise]
    requested = sum(row.requested for row in rows)
    counts = {
        "achieved": sum(row.achieved for row in rows),
        "held_anyway": sum(row.held_anyway for row in rows),
    }
    return [
        Measured(condition=condition, group="all", metric=metric,
                 value=count / requested if requested else None, n=requested)
        for metric, count in counts.items()
    ]  # fmt: skip


def _changed_answers(
    prompts: Sequence[Prompt], before: Condition, after: Condition
) -> list[ChangedAnswer]:
    return [
        ChangedAnswer(
            prompt_id=prompt.prompt_id,
            key=prompt.key,
            group=_group(prompt),
            lang=prompt.lang,
            prompt=prompt.text,
            expected=prompt.expected,
            before=before.answers[at].text,
            after=after.answers[at].text,
            outcome_before=before.judgements[at].outcome,
            outcome_after=after.judgements[at].outcome,
        )
        for at, prompt in enumerate(prompts)
        if before.answers[at].text != after.answers[at].text
    ]


def _group(prompt: Prompt) -> str:
    return UNLABELLED if prompt.label is None else prompt.label


def _notes(
    conditions: Sequence[Condition],
    neutral: Sequence[int],
    neutral_label: str,
    fluency: FluencyJudge | None,
) -> tuple[str, ...]:
    notes: list[str] = []
    steered = next(one.plan for one in conditions if one.name == STEERED)
    if steered is not None and not any(one.experts for one in steered.interventions):
        notes.append("the plan names no experts, so random experts cannot be its control")
    if not neutral:
        notes.append(f"no prompt is labelled {neutral_label!r}: side effects were not measured")
    silent = [at for at in neutral if not conditions[0].answers[at].token_ids]
    if silent:
        notes.append(
            f"{len(silent)} neutral prompts got no unsteered answer and are left out of KL"
        )
    if fluency is not None:
        notes.append(fluency.bar.in_words())
    for one in conditions:
        if one.plan is not None and one.plan.provenance.get("overlap"):
            notes.append(f"{one.name} shares experts with the plan: its layers have too few others")
    return tuple(notes)
