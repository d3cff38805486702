"""Letting a model answer prompts in batches, with transformers' own `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescope.probe.batching import plan_batches, running_prompts
from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the default is greedy."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the run's manifest."""
        return asdict(self)


GREEDY = Sampling()


def read_sampling(value: str) -> Sampling:
    """`greedy`, or the path of a JSON file with `temperature`, `top_p` and `seed`."""
    if value == "greedy":
        return GREEDY
    path = Path(value)
    try:
        fields = json.loads(path.read_text())
        unknown = set(fields) - {"temperature", "top_p", "seed"}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"sampling must be `greedy` or a JSON file, and {value} is neither ({error})"
        ) from error
    if unknown or not all(isinstance(number, (int, float)) for number in fields.values()):
        raise InputError(f"{path}: only the numbers temperature, top_p and seed are understood")
    return Sampling(do_sample=True, **fields)


@dataclass(frozen=True)
class Answer:
    """What the model wrote: ids with the end token, if it came, and the text without it."""

    token_ids: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts side by side, padded on the left.

    Attributes:
        input_ids: int64[B, S].
        attention_mask: int64[B, S], 0 on padding.
        lengths: prompt tokens of each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: tuple[int, ...]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: Any = "cpu") -> PaddedBatch:
    """Put token rows of unequal length side by side."""
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = torch.tensor(row)
        attention_mask[index, width - len(row) :] = 1
    return PaddedBatch(
        input_ids.to(device), attention_mask.to(device), tuple(len(row) for row in rows)
    )


def end_token_ids(bundle: ModelBundle) -> frozenset[int]:
    """The ids that end an answer."""
    ends = bundle.model.generation_config.eos_token_id
    if ends is None:
        ends = bundle.tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def generate_batch(
    bundle: ModelBundle, batch: PaddedBatch, *, max_new_tokens: int, sampling: Sampling = GREEDY
) -> list[Answer]:
    """Answer one padded batch; each answer is cut after its end token."""
    from transformers import GenerationConfig

    ends = end_token_ids(bundle)
    chance = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    config = GenerationConfig(
        do_sample=sampling.do_sample,
        # Said outright, because what is left open is taken from the checkpoint: one row a prompt.
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=bundle.tokenizer.pad_token_id,
        **(chance if sampling.do_sample else {}),
    )
    with torch.random.fork_rng(devices=[], enabled=sampling.do_sample):
        if sampling.do_sample:
            torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            output = bundle.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=config,
            )
    written = output[:, batch.input_ids.shape[1] :].tolist()
    return [_answer(bundle, row, ends) for row in written]


def batch_sampling(sampling: Sampling, batch_index: int) -> Sampling:
    """A seed for one batch of a plan: other batches' draws do not change this one's."""
    return replace(sampling, seed=sampling.seed + batch_index)


def _answer(bundle: ModelBundle, row: Sequence[int], ends: frozenset[int]) -> Answer:
    token_ids: list[int] = []
    for token_id in row:
        token_ids.append(int(token_id))
        if token_id in ends:
            break
    ended = bool(token_ids) and token_ids[-1] in ends
    text = bundle.tokenizer.decode(token_ids, skip_special_tokens=True)
    return Answer(tuple(token_ids), text.strip(), ended)


def generate_answers(
    bundle: ModelBundle,
    rendered: Sequence[RenderedPrompt],
    *,
    max_new_tokens: int = 32,
    tokens_per_batch: int = 4096,
    sampling: Sampling = GREEDY,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answer prompts, in the order given.

    Args:
        bundle: model and tokenizer.
        rendered: the prompts.
        max_new_tokens: answers are cut here.
        tokens_per_batch: padded tokens a batch may hold, answers included.
        sampling: greedy unless told otherwise.
        progress: called with (prompts done, prompts in all) after each batch.
    """
    answers: list[Answer | None] = [None] * len(rendered)
    batches = plan_batches(
        [len(prompt) for prompt in rendered],
        tokens_per_batch=tokens_per_batch,
        extra_tokens=max_new_tokens,
    )
    done = 0
    for planned in batches:
        rows = [rendered[index].token_ids for index in planned.members]
        padded = pad_left(rows, bundle.tokenizer.pad_token_id, bundle.device)
        with running_prompts([rendered[index].prompt.prompt_id for index in planned.members]):
            found = generate_batch(
                bundle,
                padded,
                max_new_tokens=max_new_tokens,
                sampling=batch_sampling(sampling, planned.index),
            )
        for index, answer in zip(planned.members, found, strict=True):
            answers[index] = answer
        done += len(planned.members)
        if progress is not None:
            progress(done, len(rendered))
    return [answer for answer in answers if answer is not None]
