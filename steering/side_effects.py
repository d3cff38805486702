"""Side effects of a plan: how far next-token distributions move where nothing should change.

KL(unsteered || steered), in nats, on the same token sequences: the prompt and the unsteered answer,
fed to both models (teacher forcing). `first` is the distribution that decides the first answer
token; `answer` is the mean over all answer tokens. An unchanged model gives exactly 0.

Letters: B sequences, S columns, A answer columns kept, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moescope.probe.batching import plan_batches, running_prompts
from moescope.probe.generation import Answer, PaddedBatch, pad_left
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import RouterSite
from moescope.steering.apply import steer
from moescope.steering.plan import SteeringPlan
from moescope.steering.positions import answers_begin_at


@dataclass(frozen=True)
class Divergence:
    """One prompt's KL(unsteered || steered) in nats.

    Attributes:
        first: at the last prompt token.
        answer: mean over the tokens of the unsteered answer.
        num_tokens: of that answer.
    """

    first: float
    answer: float
    num_tokens: int


def divergences(
    bundle: ModelBundle,
    plan: SteeringPlan,
    rendered: Sequence[RenderedPrompt],
    answers: Sequence[Answer],
    *,
    sites: Sequence[RouterSite],
    tokens_per_batch: int = 1024,
) -> list[Divergence]:
    """How far a plan moves next-token distributions along unsteered answers.

    Args:
        bundle: model and tokenizer.
        plan: what to change.
        rendered: the prompts.
        answers: what the unsteered model wrote, one for each; each has at least one token.
        sites: the model's routers as proved.
        tokens_per_batch: padded tokens a forward may hold.

    Returns:
        One divergence per prompt, in order.
    """
    # The last answer token is predicted but never fed.
    rows = [
        (*prompt.token_ids, *answer.token_ids[:-1])
        for prompt, answer in zip(rendered, answers, strict=True)
    ]
    found: dict[int, Divergence] = {}
    for planned in plan_batches([len(row) for row in rows], tokens_per_batch=tokens_per_batch):
        members = planned.members
        batch = pad_left(
            [rows[member] for member in members], bundle.tokenizer.pad_token_id, bundle.device
        )
        lengths = [len(answers[member].token_ids) for member in members]
        ids = [rendered[member].prompt.prompt_id for member in members]
        with torch.inference_mode(), running_prompts(ids):
            before = _answer_log_probs(bundle, batch, lengths)
            with steer(bundle.model, plan, sites=sites):
                after = _answer_log_probs(bundle, batch, lengths)
        for row, member in enumerate(members):
            found[member] = _divergence(before[row, -lengths[row] :], after[row, -lengths[row] :])
    return [found[member] for member in range(len(rows))]


def _answer_log_probs(bundle: ModelBundle, batch: PaddedBatch, lengths: Sequence[int]) -> Tensor:
    """Log-probabilities at the columns that predict answer tokens, float32[B, A, V]."""
    num_columns = batch.input_ids.shape[1]
    kept = max(lengths)
    options: dict[str, int] = {}
    if "logits_to_keep" in inspect.signature(bundle.model.forward).parameters:
        options["logits_to_keep"] = kept
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    # A row's answer begins one column after its last prompt token, which predicts the first.
    columns = torch.tensor([num_columns - length + 1 for length in lengths])
    with answers_begin_at(columns):
        output = bundle.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=positions,
            use_cache=False,
            **options,
        )
    logits: Tensor = output.logits[:, -kept:]
    return logits.float().log_softmax(-1)


def _divergence(before_AV: Tensor, after_AV: Tensor) -> Divergence:
    """KL of one row; a token that is impossible before adds nothing, whatever it is after."""
    terms_AV = before_AV.exp() * (before_AV - after_AV)
    kl_A = terms_AV.where(before_AV > -torch.inf, torch.zeros_like(terms_AV)).sum(-1)
    return Divergence(float(kl_A[0]), float(kl_A.mean()), len(kl_A))
