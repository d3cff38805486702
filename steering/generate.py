"""Answers without and with a plan, side by side, for the same prompts in the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moescope.probe.errors import InputError
from moescope.probe.generation import GREEDY, Answer, Sampling, generate_answers
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import Judgement, judge
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, RenderedPrompt, render_prompt
from moescope.probe.routers import RouterSite, verify_routers
from moescope.steering.apply import steer
from moescope.steering.check import check
from moescope.steering.plan import SteeringPlan
from moescope.steering.report import SteeringReport

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ComparedAnswer:
    """One prompt's answers; the steered ones are None where no plan was given."""

    prompt: Prompt
    unsteered: Answer
    unsteered_outcome: Judgement
    steered: Answer | None
    steered_outcome: Judgement | None

    @property
    def is_changed(self) -> bool:
        """Whether steering changed the text."""
        return self.steered is not None and self.steered.text != self.unsteered.text


@dataclass(frozen=True)
class Comparison:
    """Answers side by side, and whether the routing was what the plan asks."""

    plan: SteeringPlan | None
    answers: tuple[ComparedAnswer, ...]
    report: SteeringReport | None

    def lines(self) -> list[str]:
        """The comparison for people to read."""
        lines: list[str] = []
        for one in self.answers:
            lines.append(f"prompt     {one.prompt.text}")
            lines.append(f"unsteered  {one.unsteered.text}  [{one.unsteered_outcome.outcome}]")
            if one.steered is not None and one.steered_outcome is not None:
                lines.append(f"steered    {one.steered.text}  [{one.steered_outcome.outcome}]")
            lines.append("")
        if self.plan is not None and self.report is not None:
            lines.append(f"{self.plan.title}: {achieved_in_words(self.report)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {
            "plan": None if self.plan is None else self.plan.to_dict(),
            "plan_id": None if self.plan is None else self.plan.plan_id,
            "answers": [_answer_record(one) for one in self.answers],
            "achieved": None if self.report is None else self.report.to_json(),
        }


def compare(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    plan: SteeringPlan | None,
    *,
    max_new_tokens: int = 32,
    tokens_per_batch: int = 4096,
    sampling: Sampling = GREEDY,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Answer prompts without and with a plan; without one, unsteered only.

    Args:
        bundle: model and tokenizer.
        prompts: what to ask.
        plan: what to change.
        max_new_tokens: answers are cut here.
        tokens_per_batch: padded tokens a batch may hold, answers included.
        sampling: the same seeds for both.
        chat_template: whether prompts are rendered through the tokenizer's template.
        system: a system message.
        progress: called with (answers done, answers in all).

    Raises:
        PlanError: the plan does not fit the model; raised before anything is generated.
    """
    rendered = [
        render_prompt(bundle.tokenizer, prompt, chat_template=chat_template, system=system)
        for prompt in prompts
    ]
    sites = proved_sites(bundle, rendered)
    if plan is not None:
        check(plan, [site.info for site in sites])
    asker = Asker(
        bundle, rendered, sites, max_new_tokens=max_new_tokens, tokens_per_batch=tokens_per_batch,
        sampling=sampling, num_rounds=1 if plan is None else 2, progress=progress,
    )  # fmt: skip
    unsteered, _ = asker.ask(None)
    steered, report = asker.ask(plan) if plan is not None else ([None] * len(prompts), None)
    return Comparison(
        plan,
        tuple(
            ComparedAnswer(prompt, before, judged(prompt, before), after,
                           None if after is None else judged(prompt, after))
            for prompt, before, after in zip(prompts, unsteered, steered, strict=True)
        ),
        report,
    )  # fmt: skip


class Asker:
    """Lets a model answer the same prompts several times, each time under another plan."""

    def __init__(
        self,
        bundle: ModelBundle,
        rendered: Sequence[RenderedPrompt],
        sites: Sequence[RouterSite],
        *,
        max_new_tokens: int,
        tokens_per_batch: int,
        sampling: Sampling = GREEDY,
        num_rounds: int,
        progress: Progress | None,
    ) -> None:
        self.bundle = bundle
        self.rendered = rendered
        self.sites = sites
        self.max_new_tokens = max_new_tokens
        self.tokens_per_batch = tokens_per_batch
        self.sampling = sampling
        self._progress = progress
        self._total = num_rounds * len(rendered)
        self._done = 0

    def ask(self, plan: SteeringPlan | None) -> tuple[list[Answer], SteeringReport | None]:
        """All answers under a plan, in the order of the prompts, and the achieved routing."""
        if plan is None:
            return self._answers(), None
        with steer(self.bundle.model, plan, sites=self.sites) as report:
            return self._answers(), report

    def _answers(self) -> list[Answer]:
        before = self._done

        def update(done: int, _total: int) -> None:
            self._done = before + done
            if self._progress is not None:
                self._progress(self._done, self._total)

        return generate_answers(
            self.bundle,
            self.rendered,
            max_new_tokens=self.max_new_tokens,
            tokens_per_batch=self.tokens_per_batch,
            sampling=self.sampling,
            progress=update,
        )


def proved_sites(bundle: ModelBundle, rendered: Sequence[RenderedPrompt]) -> list[RouterSite]:
    """The model's routers, proved on the longest of the prompts.

    Raises:
        InputError: there is no prompt.
    """
    if not rendered:
        raise InputError("there is no prompt to answer; give at least one")
    longest = max(rendered, key=len)
    input_ids = torch.tensor([longest.token_ids], device=bundle.device)
    return verify_routers(bundle.model, input_ids)


def judged(prompt: Prompt, answer: Answer) -> Judgement:
    """The outcome of one answer."""
    return judge(
        answer.text, expected=prompt.expected, lang=prompt.lang, truncated=not answer.ended
    )


def achieved_in_words(report: SteeringReport) -> str:
    """Requested against achieved routing in a sentence."""
    in_scope = [row for row in report.rows if row.requested]
    if not in_scope:
        return "no token was in the plan's scope"
    rows = [row for row in in_scope if row.is_promise]
    others = [row for row in in_scope if not row.is_promise]
    said = []
    if rows:
        requested = sum(row.requested for row in rows)
        achieved = sum(row.achieved for row in rows)
        anyway = sum(row.held_anyway for row in rows)
        said.append(
            f"{achieved:,} of {requested:,} requests held ({achieved / requested:.1%}); "
            f"{anyway / requested:.1%} the router would have met by itself"
        )
    said += [f"{row.setting} on layer {row.layer}: {row.words}" for row in others[:3]]
    if len(others) > 3:
        said.append(f"and {len(others) - 3} more that promise nothing")
    if report.emptied:
        said.append(f"{report.emptied:,} tokens lost all experts of a layer")
    return "; ".join(said)


def _answer_record(one: ComparedAnswer) -> dict[str, Any]:
    return {
        "prompt_id": one.prompt.prompt_id,
        "key": one.prompt.key,
        "prompt": one.prompt.text,
        "expected": one.prompt.expected,
        "unsteered": one.unsteered.text,
        "unsteered_outcome": one.unsteered_outcome.outcome,
        "steered": None if one.steered is None else one.steered.text,
        "steered_outcome": None if one.steered_outcome is None else one.steered_outcome.outcome,
        "is_changed": one.is_changed,
    }
