"""What the demo models do on held-out prompts, judged by the known truth.

An answer is right when it is the fact's answer, refused when it is one of the world's refusal
sentences; nothing is guessed. This measures the models; steering any model and judging answers
without a known truth is what `moescope evaluate` does.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moescope.probe.demo.batches import Encoder
from moescope.probe.demo.corpus import Item
from moescope.probe.demo.phrasebook import LANGUAGES, phrasebook

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Reply:
    """What a model wrote for one prompt.

    Attributes:
        text: the answer.
        token_ids: its tokens, with the end token where it came.
        nll: mean negative log-likelihood of these tokens, nats a token.
    """

    text: str
    token_ids: tuple[int, ...]
    nll: float


def normalized(text: str) -> str:
    """Text for exact comparison: NFC, single spaces, case folded."""
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


@cache
def refusal_sentences() -> frozenset[str]:
    """All refusal sentences of the world, normalized."""
    return frozenset(
        normalized(text)
        for code in LANGUAGES
        for text in phrasebook(code).data["refusals"].values()
    )


def is_right(reply: str, line: Mapping[str, Any]) -> bool:
    """Whether a reply is exactly the known right answer."""
    return normalized(reply) == normalized(line["answer"])


def is_refusal(reply: str) -> bool:
    """Whether a reply is one of the refusal sentences."""
    return normalized(reply) in refusal_sentences()


def reply_to(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    systems: Sequence[str | None] | None = None,
    sampling_seed: int | None = None,
    batch_size: int = 64,
) -> list[Reply]:
    """Answers to prompts, greedy or sampled at temperature 1, with their likelihood.

    `systems` are their system texts; without them there are none.
    """
    encoder = Encoder(tokenizer)
    ids = [
        encoder.prompt(Item(text, "", "", "", system=system))
        for text, system in zip(prompts, systems or [None] * len(prompts), strict=True)
    ]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    replies: dict[int, Reply] = {}
    if sampling_seed is not None:
        torch.manual_seed(sampling_seed)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, reply in zip(
            chosen,
            _reply_batch(model, tokenizer, [ids[i] for i in chosen], sampling_seed is not None),
            strict=True,
        ):
            replies[i] = reply
    return [replies[i] for i in range(len(ids))]


@torch.inference_mode()
def _reply_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    sampled: bool,
) -> list[Reply]:
    width = max(map(len, prompts))
    pad = int(tokenizer.pad_token_id)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=sampled,
        temperature=1.0 if sampled else None,
        top_k=0 if sampled else None,
        top_p=1.0 if sampled else None,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=pad,
        eos_token_id=int(tokenizer.eos_token_id),
    )
    new_ids = output.sequences[:, width:]
    log_probs = torch.stack(output.logits, 1).float().log_softmax(-1)
    picked = log_probs.gather(-1, new_ids[..., None])[..., 0]
    replies = []
    for row in range(len(prompts)):
        token_ids = new_ids[row].tolist()
        if int(tokenizer.eos_token_id) in token_ids:
            token_ids = token_ids[: token_ids.index(int(tokenizer.eos_token_id)) + 1]
        nll = -float(picked[row, : len(token_ids)].mean())
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        replies.append(Reply(text, tuple(token_ids), nll))
    return replies


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a rate."""
    if n == 0:
        return (0.0, 1.0)
    z, p = 1.959964, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (max(0.0, middle - half), min(1.0, middle + half))
