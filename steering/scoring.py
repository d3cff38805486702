"""How likely given answers are, which of several choices a model prefers, and exact match.

Answers are fed after their prompts (teacher forcing), in nats under the model as it is at the
moment: called inside `moescope.steering.steer` the steered model is scored, outside it the
unsteered one. The answer's tokens count as generated for a plan's token scopes.

Letters: B sequences, S columns, A answer tokens kept, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.probe.batching import plan_batches, running_prompts
from moescope.probe.errors import InputError
from moescope.probe.generation import pad_left
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import contains_answer
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import ChatTemplate, RenderedPrompt, render_prompt
from moescope.steering.positions import answers_begin_at
from moescope.steering.rates import Measured, mean_over_units, rate


@dataclass(frozen=True)
class AnswerScore:
    """The log-likelihood of one given answer.

    Attributes:
        log_probs: float64[A] in nats, one per token of the answer, without an end token.
    """

    log_probs: NDArray[np.float64]

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.log_probs)

    @property
    def total(self) -> float:
        """Log-probability of the whole answer, in nats; 0 for an empty one."""
        return float(self.log_probs.sum())

    @property
    def mean(self) -> float:
        """Nats per token; NaN for an empty answer."""
        return self.mean_from(1)

    def mean_from(self, token: int) -> float:
        """Nats per token from the answer's token of this number (1 is the first) on, or NaN."""
        rest = self.log_probs[token - 1 :]
        return float(rest.mean()) if len(rest) else float("nan")


@dataclass(frozen=True)
class ChoiceScore:
    """One prompt's choices.

    Attributes:
        totals: log-probability of each choice, in nats.
        means: the same per token, so that long choices are not at a disadvantage.
    """

    totals: tuple[float, ...]
    means: tuple[float, ...]

    @property
    def best_by_total(self) -> int:
        """Index of the likeliest choice; of equal ones the first."""
        return int(np.argmax(self.totals))

    @property
    def best_by_mean(self) -> int:
        """Index of the choice that is likeliest per token; of equal ones the first."""
        return int(np.argmax(self.means))


def score_answers(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    tokens_per_batch: int = 1024,
) -> list[AnswerScore]:
    """The log-likelihood of one answer per prompt.

    Args:
        bundle: model and tokenizer.
        prompts: what was asked.
        answers: text that follows the rendered prompt as it stands: after a prompt without a chat
            template it begins with a space where the language wants one.
        chat_template: whether prompts are rendered through the tokenizer's template.
        system: a system message.
        tokens_per_batch: padded tokens a forward may hold.

    Returns:
        One score per prompt, in order.
    """
    rendered = [
        render_prompt(bundle.tokenizer, prompt, chat_template=chat_template, system=system)
        for prompt in prompts
    ]
    token_ids = [
        answer_token_ids(bundle, prompt, answer)
        for prompt, answer in zip(rendered, answers, strict=True)
    ]
    found = token_log_probs(bundle, rendered, token_ids, tokens_per_batch=tokens_per_batch)
    return [AnswerScore(log_probs) for log_probs in found]


def score_choices(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    choices: Sequence[Sequence[str]],
    *,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    tokens_per_batch: int = 1024,
) -> list[ChoiceScore]:
    """Multiple choice by log-likelihood: every continuation of every prompt is scored.

    Args:
        bundle: model and tokenizer.
        prompts: what was asked.
        choices: of each prompt the texts to choose from; how they join, see `score_answers`.
        chat_template: whether prompts are rendered through the tokenizer's template.
        system: a system message.
        tokens_per_batch: padded tokens a forward may hold.

    Returns:
        One result per prompt, in order.

    Raises:
        InputError: a prompt has no choices, or an empty one.
    """
    for number, (prompt, texts) in enumerate(zip(prompts, choices, strict=True), start=1):
        if not texts or not all(texts):
            raise InputError(
                f"prompt {number} ({prompt.text[:40]!r}) needs choices, none of them empty"
            )
    repeated = [prompt for prompt, texts in zip(prompts, choices, strict=True) for _ in texts]
    scores = iter(score_answers(
        bundle, repeated, [text for texts in choices for text in texts],
        chat_template=chat_template, system=system, tokens_per_batch=tokens_per_batch,
    ))  # fmt: skip
    found: list[ChoiceScore] = []
    for texts in choices:
        own = [next(scores) for _ in texts]
        found.append(ChoiceScore(tuple(one.total for one in own), tuple(one.mean for one in own)))
    return found


def exact_match(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one and nothing else.

    Case, quotes, character forms, spaces and punctuation at the ends make no difference, as in
    `moescope.probe.outcomes.contains_answer`.
    """
    return contains_answer(answer, expected) and contains_answer(expected, answer)


def score_rows(
    condition: str,
    metric: str,
    values: Sequence[bool] | Sequence[float],
    *,
    units: Sequence[str],
    before: Sequence[bool] | Sequence[float] | None = None,
    group: str = "all",
    seed: int = 0,
) -> list[Measured]:
    """A score as rows of an evaluation: its mean and, paired, its change.

    Args:
        condition: under what the values were measured.
        metric: their name; the change is `METRIC_change`.
        values: one per prompt. Truth values give a rate with a Wilson interval, numbers a mean
            with a bootstrap interval over units.
        units: the unit (`pair_id`) of each prompt.
        before: the unsteered values of the same prompts.
        group: the prompts' label.
        seed: of the bootstrap.
    """
    hits = [value for value in values if isinstance(value, (bool, np.bool_))]
    numbers = [float(value) for value in values]
    of_all = len(hits) == len(numbers)
    mean, low, high = (
        rate([bool(hit) for hit in hits]) if of_all else mean_over_units(numbers, units, seed)
    )
    rows = [Measured(condition=condition, group=group, metric=metric,
                     value=mean, low=low, high=high, n=len(numbers))]  # fmt: skip
    if before is not None:
        change = [now - float(then) for now, then in zip(numbers, before, strict=True)]
        mean, low, high = mean_over_units(change, units, seed)
        rows.append(Measured(condition=condition, group=group, metric=f"{metric}_change",
                             value=mean, low=low, high=high, n=len(change)))  # fmt: skip
    return rows


def answer_token_ids(bundle: ModelBundle, prompt: RenderedPrompt, answer: str) -> tuple[int, ...]:
    """The tokens of an answer where it follows a prompt.

    Prompt and answer are tokenized together, because many tokenizers treat the beginning of a text
    differently; where that would change the prompt's own tokens, the answer is tokenized alone.
    """
    own = _token_ids(bundle, prompt.text)
    joint = _token_ids(bundle, prompt.text + answer)
    is_prompt_kept = prompt.token_ids[len(prompt.token_ids) - len(own) :] == own
    if is_prompt_kept and joint[: len(own)] == own:
        return joint[len(own) :]
    return _token_ids(bundle, answer)


def token_log_probs(
    bundle: ModelBundle,
    rendered: Sequence[RenderedPrompt],
    answers: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = 1024,
) -> list[NDArray[np.float64]]:
    """Log-probability of every answer token given what precedes it.

    Args:
        bundle: model and tokenizer.
        rendered: the prompts.
        answers: the token ids that follow each.
        tokens_per_batch: padded tokens a forward may hold.

    Returns:
        float64[A] in nats per prompt, in order; empty for an empty answer.
    """
    found = [np.zeros(0) for _ in rendered]
    asked = [at for at, answer in enumerate(answers) if len(answer)]
    # The last answer token is predicted but never fed.
    rows = [(*rendered[at].token_ids, *answers[at][:-1]) for at in asked]
    for planned in plan_batches([len(row) for row in rows], tokens_per_batch=tokens_per_batch):
        members = [asked[member] for member in planned.members]
        ids = [rendered[at].prompt.prompt_id for at in members]
        with torch.inference_mode(), running_prompts(ids):
            scored = _forced(
                bundle,
                [rows[member] for member in planned.members],
                [answers[at] for at in members],
            )
        for at, log_probs in zip(members, scored, strict=True):
            found[at] = log_probs
    return found


def _forced(
    bundle: ModelBundle, rows: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[NDArray[np.float64]]:
    """One forward over rows that end in the answers' last fed tokens."""
    batch = pad_left(rows, bundle.tokenizer.pad_token_id, bundle.device)
    num_columns = batch.input_ids.shape[1]
    kept = max(len(answer) for answer in answers)
    options: dict[str, int] = {}
    if "logits_to_keep" in inspect.signature(bundle.model.forward).parameters:
        options["logits_to_keep"] = kept
    # A row's answer begins one column after its last prompt token, which predicts the first.
    columns = torch.tensor([num_columns - len(answer) + 1 for answer in answers])
    with answers_begin_at(columns):
        output = bundle.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=(batch.attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            **options,
        )
    logits_BAV: Tensor = output.logits[:, -kept:].float()
    wanted = pad_left(answers, bundle.tokenizer.pad_token_id, logits_BAV.device)
    chosen_BA = logits_BAV.gather(-1, wanted.input_ids[..., None])[..., 0]
    log_probs_BA = (chosen_BA - logits_BAV.logsumexp(-1)).double().cpu().numpy()
    return [
        log_probs_A[kept - len(answer) :]
        for log_probs_A, answer in zip(log_probs_BA, answers, strict=True)
    ]


def _token_ids(bundle: ModelBundle, text: str) -> tuple[int, ...]:
    return tuple(bundle.tokenizer(text, add_special_tokens=False)["input_ids"])
