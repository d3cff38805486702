"""What an evaluation of a plan found: conditions, measured rows, changed answers, and its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import pandas as pd

from moescope.probe.generation import Answer
from moescope.probe.outcomes import OUTCOMES, Judgement, Outcome
from moescope.steering.condition_names import control_kind, kind_in_words
from moescope.steering.generate import achieved_in_words
from moescope.steering.plan import SteeringPlan
from moescope.steering.report import SteeringReport
from moescope.steering.side_effects import Divergence
from moescope.steering.verdict import Verdict, verdicts

UNSTEERED: Final = "unsteered"
STEERED: Final = "steered"
UNLABELLED: Final = "unlabelled"
#: How the names of random controls begin; their seed follows.
RANDOM_CONTROL: Final = "control:random:"


@dataclass(frozen=True)
class Condition:
    """What the model did under one plan, or under none; one entry per prompt.

    Attributes:
        name: `unsteered`, `steered`, `control:random:SEED`, `control:load-matched:SEED`,
            `control:bottom`, or `control:NAME` of a given plan.
        plan: the plan applied.
        answers: what the model wrote.
        judgements: the outcomes.
        report: requested against achieved routing while it wrote.
        side_effects: by prompt index, of the neutral prompts.
        seconds: that the answers took, all prompts together.
    """

    name: str
    plan: SteeringPlan | None
    answers: tuple[Answer, ...]
    judgements: tuple[Judgement, ...]
    report: SteeringReport | None
    side_effects: Mapping[int, Divergence]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ChangedAnswer:
    """A prompt that the steered model answered otherwise than the unsteered one."""

    prompt_id: int
    key: str | None
    group: str
    lang: str | None
    prompt: str
    expected: str | None
    before: str
    after: str
    outcome_before: str
    outcome_after: str


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """An evaluation, ready to be shown and stored.

    Attributes:
        evaluation_id: of this evaluation, new each time.
        created_at: when it was made.
        plan: the plan judged.
        conditions: unsteered, steered, then the controls.
        frame: condition, group, metric, value, low, high, n.
        examples: all answers that steering changed.
        notes: what could not be measured, and why.
        context: model, revision, set names, settings.
    """

    evaluation_id: str
    created_at: datetime
    plan: SteeringPlan
    conditions: tuple[Condition, ...]
    frame: pd.DataFrame
    examples: tuple[ChangedAnswer, ...]
    notes: tuple[str, ...]
    context: Mapping[str, Any]

    def value(self, condition: str, group: str, metric: str) -> float:
        """One number of the frame; KeyError where it was not measured."""
        frame = self.frame
        rows = frame[
            (frame["condition"] == condition)
            & (frame["group"] == group)
            & (frame["metric"] == metric)
        ]
        if rows.empty:
            raise KeyError((condition, group, metric))
        return float(rows["value"].iloc[0])

    def verdicts(self) -> tuple[Verdict, ...]:
        """Whether the plan is confirmed, for each group of prompts that are not neutral."""
        behavior: Outcome = self.context["behavior"]
        return verdicts(self.frame, neutral_label=self.context["neutral_label"], behavior=behavior)

    def lines(self) -> list[str]:
        """For people to read: outcomes, verdicts, side effects, routing, speed, notes."""
        return [
            *_outcome_lines(self),
            *(one.in_words() for one in self.verdicts()),
            *_side_effect_lines(self),
            *_routing_lines(self),
            *_speed_lines(self),
            *self.notes,
        ]


def _outcome_lines(result: EvaluationResult) -> list[str]:
    lines: list[str] = []
    rows = [(UNSTEERED, [UNSTEERED]), (STEERED, [STEERED])]
    for kind, names in _controls(result).items():
        said = kind_in_words(kind)
        rows.append((said if len(names) == 1 else f"{said} ({len(names)} plans)", names))
    width = max(24, *(len(title) for title, _ in rows))
    rates = result.frame[result.frame["metric"].isin(OUTCOMES)]
    # Broken answers are shown also where there are none: that is what one wants to know.
    seen = {*rates.loc[rates["value"] > 0, "metric"], "broken"}
    outcomes = [outcome for outcome in OUTCOMES if outcome in seen]
    for group, found in rates.groupby("group", sort=True):
        head = f"{group}, {found['n'].iloc[0]} prompts"
        lines.append(f"{head:<{width + 2}}" + "".join(f"{outcome:>20}" for outcome in outcomes))
        for title, names in rows:
            cells = [_rates(found, names, outcome) for outcome in outcomes]
            lines.append(f"  {title:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return lines


def _rates(found: pd.DataFrame, names: Sequence[str], outcome: str) -> str:
    """One condition's rate with its interval, or the span of several conditions' rates."""
    rows = found[found["condition"].isin(names) & (found["metric"] == outcome)]
    if len(rows) != 1:
        return _span(rows["value"].tolist())
    row = rows.iloc[0]
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _side_effect_lines(result: EvaluationResult) -> list[str]:
    frame = result.frame[result.frame["metric"].isin(("kl_first", "kl_answer"))]
    lines: list[str] = []
    for group in sorted(set(frame["group"])):
        parts = []
        for metric, words in (("kl_first", "first token"), ("kl_answer", "answer")):
            found = frame[(frame["group"] == group) & (frame["metric"] == metric)]
            values = dict(zip(found["condition"], found["value"], strict=True))
            beside = [
                f"{kind_in_words(kind)} {_span([values[name] for name in names], 4)}"
                for kind, names in _controls(result).items()
            ]
            said = f" ({', '.join(beside)})" if beside else ""
            parts.append(f"{words} {_span([values[STEERED]], 4)}{said}")
        lines.append(f"side effects on {group}: KL in nats, {'; '.join(parts)}")
    return lines


def _controls(result: EvaluationResult) -> dict[str, list[str]]:
    """The controls' conditions by kind, in their order; a given plan is a kind of its own."""
    found: dict[str, list[str]] = {}
    for one in result.conditions:
        kind = control_kind(one.name)
        if kind is not None:
            found.setdefault(kind, []).append(one.name)
    return found


def _speed_lines(result: EvaluationResult) -> list[str]:
    found = result.frame[result.frame["metric"] == "tokens_per_s"].set_index("condition")["value"]
    return [
        f"speed: {found[UNSTEERED]:.0f} generated tokens a second unsteered, "
        f"{found[STEERED]:.0f} steered"
    ]


def _routing_lines(result: EvaluationResult) -> list[str]:
    return [
        f"routing: {achieved_in_words(one.report)}"
        for one in result.conditions
        if one.name == STEERED and one.report is not None
    ]


def _span(values: Sequence[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}–{high}"
