"""The rows of an evaluation: outcomes, changes, side effects, speed and achieved routing."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.probe.outcomes import OUTCOMES
from moescope.probe.prompts import Prompt, prompt_field
from moescope.steering.evaluation import STEERED, UNLABELLED, UNSTEERED, Condition
from moescope.steering.fluency import FluencyJudge
from moescope.steering.rates import Measured, mean_over_units, rate, unit_of
from moescope.steering.report import SteeringReport


def group_of(prompt: Prompt, field: str = "label") -> str:
    """The group that a prompt counts in: the value of a field, its label by default."""
    value = prompt_field(prompt, field)
    return UNLABELLED if value is None else str(value)


def evaluation_rows(
    prompts: Sequence[Prompt], groups: Sequence[str], conditions: Sequence[Condition], seed: int
) -> list[Measured]:
    """All rows of an evaluation but those of the bars, the unsteered condition first."""
    units = [unit_of(prompt) for prompt in prompts]
    rows: list[Measured] = []
    for condition in conditions:
        for group in sorted(set(groups)):
            members = [at for at, found in enumerate(groups) if found == group]
            rows += _outcome_rows(condition, conditions[0], group, members, units, seed)
            if condition.name == STEERED:
                rows += _beyond_rows(condition, conditions[2:], group, members, units, seed)
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


def bar_rows(fluency: FluencyJudge | None) -> list[Measured]:
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


def _beyond_rows(
    condition: Condition,
    controls: Sequence[Condition],
    group: str,
    members: Sequence[int],
    units: Sequence[str],
    seed: int,
) -> list[Measured]:
    """Each outcome's share against the mean of all controls, paired by prompt."""
    rows: list[Measured] = []
    for outcome in OUTCOMES if controls else ():
        differences = [
            float(condition.judgements[at].outcome == outcome)
            - sum(one.judgements[at].outcome == outcome for one in controls) / len(controls)
            for at in members
        ]
        mean, low, high = mean_over_units(differences, [units[at] for at in members], seed)
        rows.append(Measured(
            condition=condition.name, group=group, metric=f"{outcome}_beyond_controls",
            value=mean, low=low, high=high, n=len(members),
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
