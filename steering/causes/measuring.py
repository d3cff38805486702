"""Targets measured: rows fed in batches under the model as it is at the moment.

Letters: B rows of a batch, S columns, A columns of logits kept, V vocabulary, R reads of a row, P
prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.probe.batching import plan_batches, running_prompts
from moescope.probe.generation import PaddedBatch, pad_left
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.steering.causes.targets import TargetRow
from moescope.steering.positions import answers_begin_at


@dataclass(frozen=True)
class TargetBatch:
    """Rows side by side, padded on the left, with what is read of their logits.

    Attributes:
        rows: the rows.
        members: their indices among all rows.
        inputs: tokens and mask.
        num_columns: A, the columns of logits that any of the rows needs.
        columns: int64[B, R], in the A columns kept; 0 where a row has fewer reads.
        tokens: int64[B, R].
        factors: float32[B, R]; 0 where a row has fewer reads.
    """

    rows: tuple[TargetRow, ...]
    members: tuple[int, ...]
    inputs: PaddedBatch
    num_columns: int
    columns: Tensor
    tokens: Tensor
    factors: Tensor

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.rows)

    def values(self, logits_BAV: Tensor) -> Tensor:
        """The rows' shares of their prompts' targets, float32[B]; keeps the graph.

        Args:
            logits_BAV: of the last A columns; B may be any multiple of the rows, block by block
                (the rows again under another change).
        """
        if logits_BAV.dtype != torch.float64:
            logits_BAV = logits_BAV.float()
        times = len(logits_BAV) // self.num_rows
        device = logits_BAV.device
        row_BR = torch.arange(len(logits_BAV), device=device)[:, None]
        columns_BR = self.columns.to(device).repeat(times, 1)
        chosen_BR = logits_BAV[row_BR, columns_BR, self.tokens.to(device).repeat(times, 1)]
        level_BA = logits_BAV.logsumexp(-1)
        factor_BR = self.factors.to(device).repeat(times, 1)
        values_B = ((chosen_BR - level_BA[row_BR, columns_BR]) * factor_BR).sum(1)
        if all(row.function is None for row in self.rows):
            return values_B
        added = [
            row.function(logits_A_V[-row.num_columns :]) if row.function else values_B.new_zeros(())
            for row, logits_A_V in zip(self.rows * times, logits_BAV, strict=True)
        ]
        return values_B + torch.stack(added)


def target_batches(
    bundle: ModelBundle, rows: Sequence[TargetRow], *, tokens_per_batch: int = 1024
) -> list[TargetBatch]:
    """Rows of similar length side by side; a pure function of the rows."""
    planned = plan_batches([len(row.token_ids) for row in rows], tokens_per_batch=tokens_per_batch)
    return [_batch(bundle, rows, one.members) for one in planned]


def _batch(bundle: ModelBundle, rows: Sequence[TargetRow], members: tuple[int, ...]) -> TargetBatch:
    own = tuple(rows[at] for at in members)
    kept = max(row.num_columns for row in own)
    width = max(1, *(len(row.reads) for row in own)) if own else 1
    columns_BR = torch.zeros((len(own), width), dtype=torch.long)
    token_BR = torch.zeros((len(own), width), dtype=torch.long)
    factor_BR = torch.zeros((len(own), width))
    for at, row in enumerate(own):
        for number, read in enumerate(row.reads):
            columns_BR[at, number] = kept - read.column
            token_BR[at, number] = read.token
            factor_BR[at, number] = read.factor
    inputs = pad_left([row.token_ids for row in own], bundle.tokenizer.pad_token_id, bundle.device)
    return TargetBatch(own, members, inputs, kept, columns_BR, token_BR, factor_BR)


@contextmanager
def batch_running(batch: TargetBatch, prompt_ids: Sequence[int], times: int = 1) -> Iterator[None]:
    """Say which prompts the forwards inside run, and where in each row its prompt ends.

    Args:
        batch: the rows.
        prompt_ids: of all prompts, by index.
        times: how often the rows are repeated, block by block.
    """
    num_columns = batch.inputs.input_ids.shape[1]
    ends = [num_columns - len(row.token_ids) + row.num_prompt_tokens for row in batch.rows] * times
    ids = [prompt_ids[row.prompt] for row in batch.rows] * times
    with running_prompts(ids), answers_begin_at(torch.tensor(ends)):
        yield


def batch_logits(bundle: ModelBundle, batch: TargetBatch, times: int = 1) -> Tensor:
    """One forward: logits of the last A columns, float[B * times, A, V].

    To be called inside `batch_running`; keeps the graph unless inside `inference_mode`.
    """
    options: dict[str, int] = {}
    if "logits_to_keep" in inspect.signature(bundle.model.forward).parameters:
        options["logits_to_keep"] = batch.num_columns
    mask = batch.inputs.attention_mask.repeat(times, 1)
    output = bundle.model(
        input_ids=batch.inputs.input_ids.repeat(times, 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        **options,
    )
    logits: Tensor = output.logits[:, -batch.num_columns :]
    return logits


def measure_target(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    *,
    tokens_per_batch: int = 1024,
) -> NDArray[np.float64]:
    """The target of every prompt under the model as it is now, float64[P].

    Called inside `moescope.steering.steer` it is the steered model's.

    Args:
        bundle: model and tokenizer.
        rows: from `target_rows`.
        rendered: the prompts.
        tokens_per_batch: padded tokens a forward may hold.
    """
    prompt_ids = [one.prompt.prompt_id for one in rendered]
    found = np.zeros(len(rendered))
    for batch in target_batches(bundle, rows, tokens_per_batch=tokens_per_batch):
        with torch.inference_mode(), batch_running(batch, prompt_ids):
            values = batch.values(batch_logits(bundle, batch)).double().cpu().numpy()
        np.add.at(found, [row.prompt for row in batch.rows], values)
    return found
