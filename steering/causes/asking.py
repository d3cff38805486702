"""A question about prompts as a target: which prompts take part, and what is measured on them.

- `opening`: how much likelier the model's own refusal is than the known answer, over the first
  tokens of both; prompts that the model refuses.
- `answer`: the log-probability of the known answer; prompts that have one.
- `loss`: the mean loss on the prompt itself.
- `own`: the mean log-probability of what the model answers by itself; prompts that it answers. On
  neutral prompts it is what steering must not lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from moescope.probe.errors import InputError
from moescope.probe.generation import generate_answers
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import Outcome
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, RenderedPrompt, render_prompt
from moescope.steering.causes.targets import (
    AnswerLogProb,
    OpeningDifference,
    PromptLoss,
    Target,
    TargetRow,
    target_rows,
)
from moescope.steering.generate import judged
from moescope.steering.rates import unit_of

TargetName = Literal["opening", "answer", "loss", "own"]
TARGETS: Final[tuple[TargetName, ...]] = get_args(TargetName)

#: Where each target goes when what it is about is taken away: the refusal, the answer, the text.
DIRECTIONS: Final[dict[TargetName, Literal["lower", "raise"]]] = {
    "opening": "lower", "answer": "raise", "loss": "lower", "own": "raise",
}  # fmt: skip

#: Targets that are about the model's own answer, with the outcomes that let a prompt take part.
_OWN_ANSWER: Final[Mapping[str, tuple[Outcome, ...]]] = {
    "opening": ("refused",), "own": ("correct", "other"),
}  # fmt: skip
_WHO: Final[Mapping[str, str]] = {
    "opening": "those refused, with a known answer", "answer": "those with a known answer",
    "loss": "all", "own": "those answered",
}  # fmt: skip
#: As many prompts are answered at once, at least.
_FEWEST_ASKED: Final = 32


@dataclass(frozen=True)
class OwnAnswer:
    """What the model answers by itself, and what came of it."""

    text: str
    outcome: Outcome


@dataclass(frozen=True)
class Question:
    """A target on the prompts that can be asked it.

    Attributes:
        name: of the target.
        unit: of its values.
        prompts: those that take part.
        rendered: the same, as the model sees them.
        rows: of the target.
        units: of each prompt, what was sampled independently: its `pair_id`, else itself.
        note: how many prompts take part and why the others do not.
    """

    name: TargetName
    unit: str
    prompts: tuple[Prompt, ...]
    rendered: tuple[RenderedPrompt, ...]
    rows: tuple[TargetRow, ...]
    units: tuple[str, ...]
    note: str


def ask(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    target: TargetName,
    *,
    num_tokens: int | None = 4,
    max_new_tokens: int = 32,
    most: int | None = None,
    seed: int = 0,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    known: Mapping[int, OwnAnswer] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Question:
    """The prompts that can be asked, with the target's rows.

    Args:
        bundle: model and tokenizer, unsteered: what it answers decides who takes part.
        prompts: who could.
        target: what is measured.
        num_tokens: of `opening`: tokens of each text that count; all of them where None.
        max_new_tokens: the model's own answers are cut here.
        most: only so many prompts that take part, drawn with `seed`; no more are answered than
            that needs.
        seed: of that draw.
        chat_template: whether prompts are rendered through the tokenizer's template.
        system: a system message.
        known: what the model answered by itself, by prompt id, where that was recorded.
        progress: called with (answers done, answers in all).

    Raises:
        InputError: no prompt can be asked.
    """
    rendered = [
        render_prompt(bundle.tokenizer, prompt, chat_template=chat_template, system=system)
        for prompt in prompts
    ]
    order = list(range(len(prompts)))
    if most is not None:
        order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    step = len(order) if most is None else max(_FEWEST_ASKED, 2 * most)
    kept: list[int] = []
    own = dict(known or {})
    num_asked = 0
    while num_asked < len(order) and (most is None or len(kept) < most):
        some = order[num_asked : num_asked + step]
        num_asked += len(some)
        if target in _OWN_ANSWER:
            missing = [at for at in some if prompts[at].prompt_id not in own]
            own |= _answered(bundle, [rendered[at] for at in missing], max_new_tokens, progress)
        kept += [at for at in some if _takes_part(target, prompts[at], own)]
    kept = sorted(kept[:most])
    if not kept:
        raise InputError(
            f"target {target!r} takes {_WHO[target]}, and of {len(prompts)} prompts there is none"
        )
    texts = {number: one.text for number, one in own.items()}
    chosen = _target(target, texts, num_tokens)
    members = [rendered[at] for at in kept]
    return Question(
        name=target,
        unit=chosen.unit,
        prompts=tuple(prompts[at] for at in kept),
        rendered=tuple(members),
        rows=tuple(target_rows(bundle, chosen, members)),
        units=tuple(unit_of(prompts[at]) for at in kept),
        note=f"target {target}, {chosen.unit}: {len(kept)} prompts ({_WHO[target]}; "
        f"{num_asked} of {len(prompts)} looked at)",
    )


def _answered(
    bundle: ModelBundle,
    rendered: Sequence[RenderedPrompt],
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> dict[int, OwnAnswer]:
    """What the model answers by itself, by prompt id."""
    if not rendered:
        return {}
    answers = generate_answers(bundle, rendered, max_new_tokens=max_new_tokens, progress=progress)
    return {
        one.prompt.prompt_id: OwnAnswer(answer.text, judged(one.prompt, answer).outcome)
        for one, answer in zip(rendered, answers, strict=True)
    }


def _takes_part(target: TargetName, prompt: Prompt, own: Mapping[int, OwnAnswer]) -> bool:
    if target in ("opening", "answer") and not prompt.expected:
        return False
    if target not in _OWN_ANSWER:
        return True
    answer = own[prompt.prompt_id]
    return bool(answer.text) and answer.outcome in _OWN_ANSWER[target]


def _target(name: TargetName, answers: Mapping[int, str], num_tokens: int | None) -> Target:
    if name == "opening":
        return OpeningDifference(first=answers, num_tokens=num_tokens)
    if name == "own":
        return AnswerLogProb(texts=answers, mean=True)
    return AnswerLogProb() if name == "answer" else PromptLoss()
