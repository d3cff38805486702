"""Judging a plan: outcomes without it, with it, and with random experts in its place.

For each group of prompts (their label) and each condition: the share of each outcome with a Wilson
interval, and its paired change against the unsteered model with a bootstrap interval over units
(`pair_id`). Wilson treats prompts as independent; where units hold several prompts the bootstrap
interval of the change is the one to read. On neutral prompts also the side effects
(`moescope.steering.side_effects`); for each plan the routing it achieved.

A plan whose effect other experts have too has shown nothing, so controls are there without being
asked for (`moescope.steering.standard_controls`); further ones are given as plans.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from moescope.probe.errors import PlanError
from moescope.probe.generation import Answer
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import DETECTOR, Outcome
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, render_prompt
from moescope.probe.routers import LayerInfo
from moescope.steering.check import check
from moescope.steering.condition_names import condition_in_words
from moescope.steering.evaluation import (
    STEERED,
    UNSTEERED,
    ChangedAnswer,
    Condition,
    EvaluationResult,
)
from moescope.steering.evaluation_rows import bar_rows, evaluation_rows, group_of
from moescope.steering.fluency import FLUENCY_DETECTOR, FluencyJudge, paired_neutral
from moescope.steering.generate import Asker, judged, proved_sites
from moescope.steering.plan import SteeringPlan
from moescope.steering.rates import measured_frame
from moescope.steering.side_effects import Divergence, divergences
from moescope.steering.standard_controls import (
    CONTROL_KINDS,
    ControlKind,
    StandardControls,
    measured_load,
)

#: How the names of controls that are drawn begin.
_DRAWN = ("random:", "load-matched:")


def evaluate_plan(
    bundle: ModelBundle,
    plan: SteeringPlan,
    prompts: Sequence[Prompt],
    *,
    neutral_label: str = "neutral",
    group_by: str = "label",
    behavior: Outcome = "refused",
    num_controls: int = 3,
    kinds: Sequence[ControlKind] = CONTROL_KINDS,
    controls: Mapping[str, SteeringPlan] | None = None,
    judge_bundle: ModelBundle | None = None,
    judges_fluency: bool = True,
    unsteered: Condition | None = None,
    seed: int = 0,
    max_new_tokens: int = 32,
    tokens_per_batch: int = 4096,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Answer all prompts unsteered, steered and under each control, greedily, and compare.

    Args:
        bundle: model and tokenizer.
        plan: what to judge.
        prompts: what to ask; `expected` decides what is correct.
        neutral_label: the group of prompts that have nothing to do with the behavior; on these
            the side effects are measured.
        group_by: the field of prompts that makes the groups.
        behavior: the outcome that the plan is about, for the verdict.
        num_controls: draws of each kind of control that is drawn, with seeds `seed`, `seed + 1`,
            ...; at 0 there are no controls but the given ones.
        kinds: of controls; what a plan cannot have (another top-k names no experts) a note tells.
        controls: further plans to compare with, by name; each is the condition `control:NAME`.
        judge_bundle: a model that does not refuse, to tell word salad (see `fluency`); without one
            `bundle` itself is asked the paired neutral prompts.
        judges_fluency: whether word salad is told at all.
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
    infos = [site.info for site in sites]
    check(plan, infos)
    standard = StandardControls(plan, infos, num_seeds=num_controls, seed=seed, kinds=kinds)
    given = _given_controls(controls or {}, standard.names, infos)
    if unsteered is not None and len(unsteered.answers) != len(prompts):
        raise ValueError("the unsteered condition must be of the same prompts")
    asker = Asker(
        bundle, rendered, sites, max_new_tokens=max_new_tokens, tokens_per_batch=tokens_per_batch,
        num_rounds=1 + (unsteered is None) + len(standard.names) + len(given), progress=progress,
    )  # fmt: skip
    groups = [group_of(prompt, group_by) for prompt in prompts]
    neutral = [at for at, group in enumerate(groups) if group == neutral_label]
    first = _unsteered(asker, prompts, unsteered)
    load = (
        measured_load(bundle, rendered, first.answers, sites, tokens_per_batch=tokens_per_batch)
        if standard.needs_load
        else None
    )
    plans = {STEERED: plan, **_as_conditions(standard.plans(load)), **_as_conditions(given)}
    conditions = [first, *_steered(asker, prompts, plans, neutral, first)]
    fluency: FluencyJudge | None = None
    if judges_fluency:
        is_itself = judge_bundle is None or judge_bundle is bundle
        fluency = FluencyJudge(
            judge_bundle or bundle,
            paired_neutral(prompts, groups, neutral_label) if is_itself else prompts,
            [prompt.lang for prompt in prompts], chat_template=chat_template, system=system,
        )  # fmt: skip
        conditions = _judged_by_fluency(fluency, conditions, neutral)
    return EvaluationResult(
        evaluation_id=uuid.uuid4().hex,
        created_at=datetime.now(UTC),
        plan=plan,
        conditions=tuple(conditions),
        frame=measured_frame(
            evaluation_rows(prompts, groups, conditions, seed) + bar_rows(fluency)
        ),
        examples=tuple(_changed_answers(prompts, groups, *conditions[:2])),
        notes=(*standard.notes, *_notes(conditions, neutral, neutral_label, fluency)),
        context={
            "model": bundle.name,
            "revision": bundle.revision,
            "set_name": "+".join(sorted({prompt.set_name for prompt in prompts})),
            "num_prompts": len(prompts),
            "neutral_label": neutral_label,
            "group_by": group_by,
            "behavior": behavior,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "detector": DETECTOR if fluency is None else f"{DETECTOR}+{FLUENCY_DETECTOR}",
            "judge_model": (judge_bundle or bundle).name if judges_fluency else None,
            "unit": "pair_id",
        },
    )


def _given_controls(
    controls: Mapping[str, SteeringPlan], taken: Sequence[str], infos: Sequence[LayerInfo]
) -> Mapping[str, SteeringPlan]:
    """The controls that the caller brings, checked."""
    for name, control in controls.items():
        if not name or name in taken or name.startswith(_DRAWN):
            raise PlanError(
                f"a control cannot be named {name!r}: give it a name that does not begin with "
                "'random:' or 'load-matched:' and is none of the evaluation's own"
            )
        check(control, infos)
    return controls


def _as_conditions(controls: Mapping[str, SteeringPlan]) -> dict[str, SteeringPlan]:
    return {f"control:{name}": plan for name, plan in controls.items()}


def _unsteered(asker: Asker, prompts: Sequence[Prompt], known: Condition | None) -> Condition:
    """What the model does without a plan, asked or known."""
    if known is not None:
        answers, seconds = list(known.answers), known.seconds
    else:
        started = time.perf_counter()
        answers, _ = asker.ask(None)
        seconds = time.perf_counter() - started
    judgements = tuple(map(judged, prompts, answers))
    return Condition(UNSTEERED, None, tuple(answers), judgements, None, {}, seconds)


def _steered(
    asker: Asker,
    prompts: Sequence[Prompt],
    plans: Mapping[str, SteeringPlan],
    neutral: Sequence[int],
    unsteered: Condition,
) -> list[Condition]:
    """Every plan's answers, outcomes and side effects, in the order of the plans."""
    conditions: list[Condition] = []
    for name, plan in plans.items():
        started = time.perf_counter()
        answers, report = asker.ask(plan)
        seconds = time.perf_counter() - started
        moved = _side_effects(asker, plan, neutral, unsteered.answers)
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


def _changed_answers(
    prompts: Sequence[Prompt], groups: Sequence[str], before: Condition, after: Condition
) -> list[ChangedAnswer]:
    return [
        ChangedAnswer(
            prompt_id=prompt.prompt_id,
            key=prompt.key,
            group=groups[at],
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


def _notes(
    conditions: Sequence[Condition],
    neutral: Sequence[int],
    neutral_label: str,
    fluency: FluencyJudge | None,
) -> tuple[str, ...]:
    notes: list[str] = []
    if not neutral:
        notes.append(f"no prompt is in the group {neutral_label!r}: side effects were not measured")
    silent = [at for at in neutral if not conditions[0].answers[at].token_ids]
    if silent:
        notes.append(
            f"{len(silent)} neutral prompts got no unsteered answer and are left out of KL"
        )
    if fluency is not None:
        notes.append(fluency.bar.in_words())
    for one in conditions:
        if one.plan is not None and one.plan.provenance.get("overlap"):
            notes.append(
                f"{condition_in_words(one.name)}: shares experts with the plan, whose layers have "
                "too few others"
            )
    return tuple(notes)
