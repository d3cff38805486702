"""Answers by another way of decoding beside the model's own, for the same prompts.

    controls, _ = contrast_controls(bundle.model, SelfContrast(), number=2)
    compare_decoding(bundle, prompts, lambda _: contrasting(bundle.model), name="self-contrast",
                     controls=controls)

Outcomes are judged on the answers; each rate has a Wilson interval over prompts, each change is
paired, with a bootstrap interval over units (`pair_id`, else the prompt). A method whose effect any
other routing has too has shown nothing, so controls (`moescope.steering.decoding_controls`) stand
beside it as further conditions.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any, TypeAlias

import pandas as pd

from moescope.probe.errors import InputError
from moescope.probe.generation import GREEDY, Answer, Sampling, generate_answers
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import DETECTOR, OUTCOMES, Judgement
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, render_prompt
from moescope.probe.routers import RouterSite
from moescope.steering.evaluation import STEERED, UNSTEERED
from moescope.steering.generate import Asker, Progress, judged, proved_sites
from moescope.steering.rates import Measured, mean_over_units, measured_frame, rate, unit_of

#: Given the model's proved routers, the block in which `generate` decodes otherwise.
Decoding: TypeAlias = Callable[[Sequence[RouterSite]], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class DecodingControl:
    """The method with something arbitrary in place of what it chooses.

    Attributes:
        name: `KIND:SEED`; its condition is `control:KIND:SEED`.
        decoding: the block in which `generate` decodes so.
        settings: what it is run with.
    """

    name: str
    decoding: Decoding
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DecodedCondition:
    """What the model wrote in one condition.

    Attributes:
        name: `unsteered`, `steered` (by the method), or `control:KIND:SEED`.
        settings: what the method, or its control, was run with; sampling and seed included.
        answered: answers and outcomes, one per prompt.
    """

    name: str
    settings: Mapping[str, Any]
    answered: tuple[tuple[Answer, Judgement], ...]


@dataclass(frozen=True, kw_only=True)
class DecodingComparison:
    """Answers side by side.

    Attributes:
        evaluation_id: of this comparison, new each time.
        created_at: when it was made.
        name: of the method.
        prompts: what was asked.
        conditions: unsteered, steered, then the controls.
        context: model, revision, set names, detector, unit.
        notes: what to know of the controls.
        frame: condition, group, metric (an outcome, or `OUTCOME_change` against unsteered), value,
            low, high, n.
    """

    evaluation_id: str
    created_at: datetime
    name: str
    prompts: tuple[Prompt, ...]
    conditions: tuple[DecodedCondition, ...]
    context: Mapping[str, Any]
    notes: tuple[str, ...]
    frame: pd.DataFrame = field(repr=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the method was run with, sampling and seed included."""
        return self.conditions[1].settings

    def answers(self, condition: str) -> tuple[tuple[Answer, Judgement], ...]:
        """Answers and outcomes of one condition, one per prompt; KeyError where there is none."""
        return {one.name: one.answered for one in self.conditions}[condition]

    def lines(self) -> list[str]:
        """Every condition's outcomes, their changes, and how many answers differ."""
        names = [one.name for one in self.conditions]
        words = {name: self._words(name) for name in names}
        width = max(20, *(len(f"change, {word}") + 2 for word in words.values()))
        head = f"{len(self.prompts)} prompts"
        lines = [f"{head:<{width}}" + "".join(f"{outcome:>22}" for outcome in OUTCOMES)]
        for name in names:
            cells = [self._cell(name, outcome) for outcome in OUTCOMES]
            lines.append(f"{words[name]:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
        for name in names[1:]:
            cells = [self._cell(name, f"{outcome}_change") for outcome in OUTCOMES]
            title = f"change, {words[name]}"
            lines.append(f"{title:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
        differing = [f"{words[name]} {self._num_differing(name)}" for name in names[1:]]
        total = len(self.prompts)
        return [*lines, f"answers of {total} that differ: {', '.join(differing)}", *self.notes]

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {
            "evaluation_id": self.evaluation_id,
            "method": self.name,
            "context": dict(self.context),
            "settings": dict(self.settings),
            "controls": {one.name: dict(one.settings) for one in self.conditions[2:]},
            "notes": list(self.notes),
            "rows": [
                {key: None if pd.isna(value) else value for key, value in row.items()}
                for row in self.frame.to_dict("records")
            ],
            "answers": [self._record(at) for at in range(len(self.prompts))],
        }

    def _record(self, at: int) -> dict[str, Any]:
        prompt = self.prompts[at]
        (own, before), (other, after) = (one.answered[at] for one in self.conditions[:2])
        return {
            "prompt_id": prompt.prompt_id, "key": prompt.key, "prompt": prompt.text,
            "expected": prompt.expected,
            UNSTEERED: own.text, f"{UNSTEERED}_outcome": before.outcome,
            STEERED: other.text, f"{STEERED}_outcome": after.outcome,
            "controls": {
                one.name: {"text": one.answered[at][0].text, "outcome": one.answered[at][1].outcome}
                for one in self.conditions[2:]
            },
        }  # fmt: skip

    def _words(self, condition: str) -> str:
        return self.name if condition == STEERED else condition.removeprefix("control:")

    def _num_differing(self, condition: str) -> int:
        pairs = zip(self.answers(UNSTEERED), self.answers(condition), strict=True)
        return sum(one[0].token_ids != two[0].token_ids for one, two in pairs)

    def _cell(self, condition: str, metric: str) -> str:
        found = self.frame[
            (self.frame["condition"] == condition) & (self.frame["metric"] == metric)
        ].iloc[0]
        sign = "+" if metric.endswith("_change") else ""
        if pd.isna(found["low"]):
            return f"{found['value']:{sign}.2f}"
        return f"{found['value']:{sign}.2f} [{found['low']:{sign}.2f}, {found['high']:{sign}.2f}]"


def compare_decoding(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    name: str,
    settings: Mapping[str, Any] | None = None,
    controls: Sequence[DecodingControl] = (),
    notes: Sequence[str] = (),
    max_new_tokens: int = 32,
    tokens_per_batch: int = 4096,
    sampling: Sampling = GREEDY,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> DecodingComparison:
    """Answer prompts by the model's own decoding, by another and by its controls, in one batching.

    Args:
        bundle: model and tokenizer.
        prompts: what to ask.
        decoding: given the model's proved routers, the block in which `generate` decodes otherwise.
        name: of the method.
        settings: of the method, kept with the result.
        controls: further conditions; see `moescope.steering.decoding_controls`.
        notes: what to know of them, kept with the result.
        max_new_tokens: answers are cut here.
        tokens_per_batch: padded tokens a batch may hold, answers included.
        sampling: the same seeds for all conditions.
        chat_template: whether prompts are rendered through the tokenizer's template.
        system: a system message.
        seed: of the bootstrap.
        progress: called with (answers done, answers in all).

    Raises:
        InputError: there is no prompt, or the method does not fit the model.
    """
    rendered = [
        render_prompt(bundle.tokenizer, prompt, chat_template=chat_template, system=system)
        for prompt in prompts
    ]
    sites = proved_sites(bundle, rendered)
    asker = Asker(
        bundle, rendered, sites, max_new_tokens=max_new_tokens, tokens_per_batch=tokens_per_batch,
        sampling=sampling, num_rounds=2 + len(controls), progress=progress,
    )  # fmt: skip
    shared = {"max_new_tokens": max_new_tokens, "sampling": asdict(sampling), "seed": seed}

    def answer(condition: str, block: Decoding | None, own: Mapping[str, Any]) -> DecodedCondition:
        if block is None:
            answers, _ = asker.ask(None)
        else:
            with block(sites):
                answers, _ = asker.ask(None)
        answered = zip(answers, map(judged, prompts, answers), strict=True)
        return DecodedCondition(
            name=condition, settings={**own, **shared}, answered=tuple(answered)
        )

    # The method first, so that what does not fit stops before the long work.
    steered = answer(STEERED, decoding, settings or {})
    unsteered = answer(UNSTEERED, None, {})
    others = [answer(f"control:{one.name}", one.decoding, one.settings) for one in controls]
    conditions = (unsteered, steered, *others)
    return DecodingComparison(
        evaluation_id=uuid.uuid4().hex,
        created_at=datetime.now(UTC),
        name=name,
        prompts=tuple(prompts),
        conditions=conditions,
        context={
            "model": bundle.name, "revision": bundle.revision,
            "set_name": "+".join(sorted({prompt.set_name for prompt in prompts})),
            "num_prompts": len(prompts), "method": name, "detector": DETECTOR, "unit": "pair_id",
        },
        notes=tuple(notes),
        frame=measured_frame(_rows(prompts, conditions, seed)),
    )  # fmt: skip


def right_prompts(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    *,
    at_most: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 32,
    progress: Progress | None = None,
) -> list[Prompt]:
    """The prompts that the model answers right by itself, greedily: references for re-mixing.

    Args:
        bundle: model and tokenizer.
        prompts: prompts that say what is right.
        at_most: ask only so many of them, drawn at random.
        seed: of that draw.
        max_new_tokens: answers are cut here.
        progress: called with (answers done, answers in all).

    Raises:
        InputError: it answers none right, or no prompt says what is right.
    """
    if at_most is not None and at_most < len(prompts):
        drawn = sorted(Random(seed).sample(range(len(prompts)), at_most))
        prompts = [prompts[at] for at in drawn]
    rendered = [render_prompt(bundle.tokenizer, prompt) for prompt in prompts]
    answers = generate_answers(bundle, rendered, max_new_tokens=max_new_tokens, progress=progress)
    pairs = zip(prompts, answers, strict=True)
    right = [prompt for prompt, answer in pairs if judged(prompt, answer).outcome == "correct"]
    if not right:
        raise InputError(
            f"none of {len(prompts)} reference prompts is answered right; references need the "
            "field 'answer', and a model that knows it"
        )
    return right


def _rows(
    prompts: Sequence[Prompt], conditions: Sequence[DecodedCondition], seed: int
) -> list[Measured]:
    """Rates of each outcome in every condition, and their paired changes against the first."""
    units = [unit_of(prompt) for prompt in prompts]
    rows: list[Measured] = []
    for condition in conditions:
        for outcome in OUTCOMES:
            hits, before = (
                [judgement.outcome == outcome for _, judgement in one.answered]
                for one in (condition, conditions[0])
            )
            value, low, high = rate(hits)
            rows.append(Measured(
                condition=condition.name, group="all", metric=outcome, value=value, low=low,
                high=high, n=len(prompts),
            ))  # fmt: skip
            if condition is conditions[0]:
                continue
            change = [float(now) - float(then) for now, then in zip(hits, before, strict=True)]
            mean, change_low, change_high = mean_over_units(change, units, seed)
            rows.append(Measured(
                condition=condition.name, group="all", metric=f"{outcome}_change", value=mean,
                low=change_low, high=change_high, n=len(prompts),
            ))  # fmt: skip
    return rows
