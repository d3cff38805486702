"""A question about prompts as a target: which prompts take part, and what is measured on them.

- `opening`: how much likelier the model's own refusal is than the known answer, over the first
  tokens of both; prompts that the model refuses.
- `answer`: the log-probability of the known answer; prompts that have one.
- `loss`: the mean loss on the prompt itself.
- `own`: the mean log-probability of what the model answers by itself; prompts that it answers. On
  neutral prompts it is what steering must not lower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from moescope.probe.errors import InputError
from moescope.probe.generation import generate_answers
from moescope.probe.models import ModelBundle
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

TargetName = Literal["opening", "answer", "loss", "own"]
TARGETS: Final[tuple[TargetName, ...]] = get_args(TargetName)

#: Where each target goes when what it is about is taken away: the refusal, the answer, the text.
DIRECTIONS: Final[dict[TargetName, Literal["lower", "raise"]]] = {
    "opening": "lower", "answer": "raise", "loss": "lower", "own": "raise",
}  # fmt: skip


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
    progress: Callable[[int, int], None] | None = None,
) -> Question:
    """The prompts that can be asked, with the target's rows.

    Args:
        bundle: model and tokenizer, unsteered: what it answers decides who takes part.
        prompts: who could.
        target: what is measured.
        num_tokens: of `opening`: tokens of each text that count; all of them where None.
        max_new_tokens: the model's own answers are cut here.
        most: only so many prompts, drawn with `seed`.
        seed: of that draw.
        chat_template: whether prompts are rendered through the tokenizer's template.
        system: a system message.
        progress: called with (answers done, answers in all).

    Raises:
        InputError: no prompt can be asked.
    """
    rendered = [
        render_prompt(bundle.tokenizer, prompt, chat_template=chat_template, system=system)
        for prompt in prompts
    ]
    answers: dict[int, str] = {}
    takes_part = [True] * len(prompts)
    why = "all"
    if target in ("opening", "own"):
        wanted = ("refused",) if target == "opening" else ("correct", "other")
        why = "those refused" if target == "opening" else "those answered"
        found = generate_answers(bundle, rendered, max_new_tokens=max_new_tokens, progress=progress)
        for at, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
            takes_part[at] = judged(prompt, answer).outcome in wanted and bool(answer.text)
            answers[prompt.prompt_id] = answer.text
    if target in ("opening", "answer"):
        why += ", with a known answer"
        takes_part = [
            is_in and bool(prompt.expected)
            for is_in, prompt in zip(takes_part, prompts, strict=True)
        ]
    kept = [at for at, is_in in enumerate(takes_part) if is_in]
    if not kept:
        raise InputError(
            f"target {target!r} takes {why} of the prompts, and of {len(prompts)} there is none"
        )
    num_able = len(kept)
    if most is not None and most < num_able:
        draw = np.random.default_rng(seed).permutation(num_able)[:most]
        kept = [kept[at] for at in sorted(draw)]
    chosen = _target(target, answers, num_tokens)
    members = [rendered[at] for at in kept]
    drawn = f", {len(kept)} of them drawn" if len(kept) < num_able else ""
    return Question(
        name=target,
        unit=chosen.unit,
        prompts=tuple(prompts[at] for at in kept),
        rendered=tuple(members),
        rows=tuple(target_rows(bundle, chosen, members)),
        units=tuple(unit_of(prompts[at]) for at in kept),
        note=f"target {target}, {chosen.unit}: {num_able} of {len(prompts)} prompts ({why}){drawn}",
    )


def unit_of(prompt: Prompt) -> str:
    """What was sampled independently: the pair, or the prompt itself."""
    return f"pair {prompt.pair_id}" if prompt.pair_id is not None else f"prompt {prompt.prompt_id}"


def _target(name: TargetName, answers: dict[int, str], num_tokens: int | None) -> Target:
    if name == "opening":
        return OpeningDifference(first=answers, num_tokens=num_tokens)
    if name == "own":
        return AnswerLogProb(texts=answers, mean=True)
    return AnswerLogProb() if name == "answer" else PromptLoss()
