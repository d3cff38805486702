"""Answers by another way of decoding beside the model's own, for the same prompts.

    compare_decoding(bundle, prompts, lambda _: contrasting(bundle.model), name="self-contrast")

Outcomes are judged on the answers; each rate has a Wilson interval over prompts, each change is
paired, with a bootstrap interval over units (`pair_id`, else the prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Final

import pandas as pd

from moescope.probe.errors import InputError
from moescope.probe.generation import GREEDY, Answer, Sampling, generate_answers
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import OUTCOMES, Judgement
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, render_prompt
from moescope.probe.routers import RouterSite
from moescope.steering.generate import Asker, Progress, judged, proved_sites
from moescope.steering.rates import Measured, mean_over_units, measured_frame, rate

OWN: Final = "own"


@dataclass(frozen=True, kw_only=True)
class DecodingComparison:
    """Answers side by side.

    Attributes:
        name: of the method.
        settings: what it was run with, sampling and seed included.
        prompts: what was asked.
        own: what the model wrote by itself.
        other: what it wrote by the method.
        frame: condition (`own`, or the name), group, metric (an outcome, or `OUTCOME_change`),
            value, low, high, n.
    """

    name: str
    settings: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    own: tuple[tuple[Answer, Judgement], ...]
    other: tuple[tuple[Answer, Judgement], ...]
    frame: pd.DataFrame = field(repr=False)

    def lines(self) -> list[str]:
        """Both conditions' outcomes, and how many answers differ."""
        width = max(len(self.name), 10)
        head = f"{len(self.prompts)} prompts"
        lines = [f"{head:<{width}}" + "".join(f"{outcome:>22}" for outcome in OUTCOMES)]
        for condition in (OWN, self.name):
            cells = [self._cell(condition, outcome) for outcome in OUTCOMES]
            lines.append(f"{condition:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
        cells = [self._cell(self.name, f"{outcome}_change") for outcome in OUTCOMES]
        lines.append(f"{'change':<{width}}" + "".join(f"{cell:>22}" for cell in cells))
        pairs = zip(self.own, self.other, strict=True)
        changed = sum(one[0].token_ids != two[0].token_ids for one, two in pairs)
        return [*lines, f"{changed} of {len(self.prompts)} answers differ"]

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {
            "method": self.name,
            "settings": dict(self.settings),
            "rows": [
                {key: None if pd.isna(value) else value for key, value in row.items()}
                for row in self.frame.to_dict("records")
            ],
            "answers": [
                {
                    "prompt_id": prompt.prompt_id, "key": prompt.key, "prompt": prompt.text,
                    "expected": prompt.expected,
                    "own": own.text, "own_outcome": before.outcome,
                    "other": other.text, "other_outcome": after.outcome,
                }
                for prompt, (own, before), (other, after) in zip(
                    self.prompts, self.own, self.other, strict=True
                )
            ],
        }  # fmt: skip

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
    decoding: Callable[[Sequence[RouterSite]], AbstractContextManager[Any]],
    *,
    name: str,
    settings: Mapping[str, Any] | None = None,
    max_new_tokens: int = 32,
    tokens_per_batch: int = 4096,
    sampling: Sampling = GREEDY,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> DecodingComparison:
    """Answer prompts by the model's own decoding and by another, in the same batches.

    Args:
        bundle: model and tokenizer.
        prompts: what to ask.
        decoding: given the model's proved routers, the block in which `generate` decodes otherwise.
        name: of the method.
        settings: of the method, kept with the result.
        max_new_tokens: answers are cut here.
        tokens_per_batch: padded tokens a batch may hold, answers included.
        sampling: the same seeds for both.
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
        sampling=sampling, num_rounds=2, progress=progress,
    )  # fmt: skip
    with decoding(sites):  # first, so that what does not fit stops before the long work
        other, _ = asker.ask(None)
    own, _ = asker.ask(None)
    answered = [
        tuple((answer, judged(prompt, answer)) for prompt, answer in zip(prompts, one, strict=True))
        for one in (own, other)
    ]
    return DecodingComparison(
        name=name,
        settings={
            **(settings or {}), "max_new_tokens": max_new_tokens, "sampling": asdict(sampling),
            "seed": seed,
        },
        prompts=tuple(prompts), own=answered[0], other=answered[1],
        frame=measured_frame(_rows(name, prompts, answered, seed)),
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
    name: str,
    prompts: Sequence[Prompt],
    answered: Sequence[Sequence[tuple[Answer, Judgement]]],
    seed: int,
) -> list[Measured]:
    """Rates of each outcome in both conditions, and their paired changes."""
    units = [
        f"pair {prompt.pair_id}" if prompt.pair_id is not None else f"prompt {prompt.prompt_id}"
        for prompt in prompts
    ]
    rows: list[Measured] = []
    for outcome in OUTCOMES:
        hits = [[judgement.outcome == outcome for _, judgement in one] for one in answered]
        for condition, found in zip((OWN, name), hits, strict=True):
            value, low, high = rate(found)
            rows.append(Measured(
                condition=condition, group="all", metric=outcome, value=value, low=low, high=high,
                n=len(prompts),
            ))  # fmt: skip
        change = [float(after) - float(before) for before, after in zip(*hits, strict=True)]
        mean, change_low, change_high = mean_over_units(change, units, seed)
        rows.append(Measured(
            condition=name, group="all", metric=f"{outcome}_change", value=mean,
            low=change_low, high=change_high, n=len(prompts),
        ))  # fmt: skip
    return rows
