"""From one recorded batch to the rows of the store: prompts, tokens, routing, usage, probabilities.

Padding is dropped here, and every recorded row is tied to the token it routed. Letters: N routed
tokens of the batch, K experts per token, E routed experts, G groups of tokens (prompt, phase,
segment, special or not). Nothing is written that does not add up: rows that are missing, ids that
repeat within a token or lie out of range, and weights that are not finite stop with the layer's
name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moescope.probe.errors import RecordingError
from moescope.probe.generation import Answer
from moescope.probe.layer_rows import (
    Array,
    Groups,
    RankedLayer,
    lists_of,
    rank_layer,
    usage_table,
)
from moescope.probe.outcomes import judge
from moescope.probe.recording import RecordLevel, Trace
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import LayerInfo


@dataclass(frozen=True)
class RecordedBatch:
    """One batch after it ran.

    Attributes:
        rendered: its prompts, one row of the batch each.
        answers: what the model wrote for each, or None where nothing was generated.
        trace: the routing of the prefill and of each decoding step.
    """

    rendered: Sequence[RenderedPrompt]
    answers: Sequence[Answer] | None
    trace: Trace


def batch_tables(
    batch: RecordedBatch,
    *,
    layers: Sequence[LayerInfo],
    level: RecordLevel,
    tokenizer: Any,
) -> dict[str, pa.Table]:
    """The store's rows for one batch, table by table.

    Args:
        batch: what was recorded.
        layers: the layers to keep.
        level: `usage` leaves the table `routing_arrays` out, `probs` adds `router_probs`.
        tokenizer: for the text of single tokens.

    Raises:
        RecordingError: what was recorded does not add up.
    """
    tokens = _token_columns(batch, tokenizer)
    routed = _routed_rows(batch, layers)
    groups = Groups.of(tokens, routed.prompt_id, routed.position)
    routing: list[pa.Table] = []
    probs: list[pa.Table] = []
    usage: list[pa.Table] = []
    for info in layers:
        layer = rank_layer(info, batch.trace[info.layer, info.kind], routed.recorded_row)
        usage.append(usage_table(info, layer, groups))
        if level != "usage":
            routing.append(_routing_table(info, layer, routed))
        if level == "probs":
            probs.append(_probs_table(info, layer, routed))
    tables = {
        "prompts": pa.table(_prompt_columns(batch)),
        "tokens": pa.table({name: pa.array(column) for name, column in tokens.items()}),
        "usage_arrays": pa.concat_tables(usage),
    }
    if routing:
        tables["routing_arrays"] = _by_token(routing)
    if probs:
        tables["router_probs"] = pa.concat_tables(probs)
    return tables


def _prompt_columns(batch: RecordedBatch) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for index, rendered in enumerate(batch.rendered):
        prompt = rendered.prompt
        answer = batch.answers[index] if batch.answers is not None else None
        verdict = None
        if answer is not None:
            verdict = judge(
                answer.text,
                expected=prompt.expected,
                lang=prompt.lang,
                truncated=not answer.ended,
            )
        row = {
            "prompt_id": prompt.prompt_id,
            "key": prompt.key,
            "text": prompt.text,
            "rendered_text": rendered.text,
            "set_name": prompt.set_name,
            "label": prompt.label,
            "lang": prompt.lang,
            "domain": prompt.domain,
            "pair_id": prompt.pair_id,
            "target": prompt.target,
            "span": prompt.span,
            "expected": prompt.expected,
            "num_tokens": len(rendered),
            "num_generated": 0 if answer is None else len(answer.token_ids),
            "response": None if answer is None else answer.text,
            "outcome": None if verdict is None else verdict.outcome,
            "detector": None if verdict is None else verdict.detector,
            "meta": json.dumps(prompt.meta, ensure_ascii=False, default=str),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _token_columns(batch: RecordedBatch, tokenizer: Any) -> dict[str, Array]:
    """Columns of the table `tokens`, prompts one after the other, in order of position."""
    special = frozenset(tokenizer.all_special_ids)
    end_of_thinking = tokenizer.get_vocab().get("</think>")  # the whole vocabulary: once a batch
    text_of: dict[int, str] = {}
    rows: list[tuple[Any, ...]] = []
    for rendered, generated in zip(batch.rendered, _generated_ids(batch), strict=True):
        written = _written_segments(generated, end_of_thinking)
        parts = [
            *zip(rendered.token_ids, rendered.segments, rendered.is_special, rendered.in_span,
                 strict=True),
            *((token, segment, token in special, False)
              for token, segment in zip(generated, written, strict=True)),
        ]  # fmt: skip
        for position, (token_id, segment, is_special, in_span) in enumerate(parts):
            if token_id not in text_of:
                text_of[token_id] = tokenizer.decode([token_id])
            is_prompt = position < len(rendered)
            is_last_written = not is_prompt and position == len(parts) - 1
            rows.append((
                rendered.prompt.prompt_id, position, token_id, text_of[token_id],
                "prompt" if is_prompt else "generated", segment, is_special, in_span,
                not is_last_written,
            ))  # fmt: skip
    names = ("prompt_id", "position", "token_id", "token", "phase", "segment", "is_special",
             "in_span", "is_routed")  # fmt: skip
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return {name: np.array(column) for name, column in columns}


def _generated_ids(batch: RecordedBatch) -> list[tuple[int, ...]]:
    if batch.answers is None:
        return [()] * len(batch.rendered)
    return [answer.token_ids for answer in batch.answers]


def _written_segments(generated: Sequence[int], end: int | None) -> list[str]:
    """`thinking` up to the end-of-thinking token where the tokenizer has one, else `answer`."""
    if end is None or end not in generated:
        return ["answer"] * len(generated)
    thought = generated.index(end) + 1
    return ["thinking"] * thought + ["answer"] * (len(generated) - thought)


@dataclass(frozen=True)
class _RoutedRows:
    """Which recorded row is which token, prompts one after the other, by position.

    Attributes:
        recorded_row: row in the concatenated forwards, int[N].
        prompt_id: int[N].
        position: int[N].
    """

    recorded_row: Array
    prompt_id: Array
    position: Array


def _routed_rows(batch: RecordedBatch, layers: Sequence[LayerInfo]) -> _RoutedRows:
    lengths = [len(rendered) for rendered in batch.rendered]
    num_written = [len(ids) for ids in _generated_ids(batch)]
    num_rows, width = len(lengths), max(lengths)
    _check_forwards(batch.trace, layers, num_rows, width, num_forwards=max(1, *num_written))
    recorded: list[Array] = []
    positions: list[Array] = []
    for row, (length, written) in enumerate(zip(lengths, num_written, strict=True)):
        prefill = row * width + (width - length) + np.arange(length)
        steps = np.arange(max(written - 1, 0))
        recorded += [prefill, num_rows * width + steps * num_rows + row]
        positions.append(np.arange(length + len(steps)))
    ids = [rendered.prompt.prompt_id for rendered in batch.rendered]
    return _RoutedRows(
        np.concatenate(recorded),
        np.repeat(ids, [len(column) for column in positions]),
        np.concatenate(positions),
    )


def _check_forwards(
    trace: Trace, layers: Sequence[LayerInfo], num_rows: int, width: int, num_forwards: int
) -> None:
    """One prefill over the padded prompts, then one row per prompt and decoding step."""
    if len(trace.forwards) != num_forwards:
        raise RecordingError(
            f"the model ran {len(trace.forwards)} forwards where {num_forwards} were expected for "
            f"{num_rows} prompts; its rows cannot be tied to tokens"
        )
    for index, forward in enumerate(trace.forwards):
        expected = num_rows * (width if index == 0 else 1)
        for info in layers:
            rows = forward.rows.get(info.module)
            found = 0 if rows is None else rows.expert_ids.shape[0]
            if found != expected:
                raise RecordingError(
                    f"layer {info.layer} ({info.module}) routed {found} tokens in forward "
                    f"{index} where {expected} passed the model"
                )


def _routing_table(info: LayerInfo, layer: RankedLayer, routed: _RoutedRows) -> pa.Table:
    num_tokens, top_k = layer.expert_ids.shape
    return pa.table(
        {
            "prompt_id": routed.prompt_id,
            "position": routed.position,
            "layer": np.full(num_tokens, info.layer),
            "kind": pa.repeat(pa.scalar(info.kind), num_tokens),
            "is_ranked": pa.repeat(pa.scalar(value=True), num_tokens),
            "experts": lists_of(layer.expert_ids.astype(np.uint16).reshape(-1), top_k),
            "weights": lists_of(layer.weights.reshape(-1), top_k),
        }
    )


def _by_token(tables: Sequence[pa.Table]) -> pa.Table:
    """The layers' rows, each with one per token, as token after token: smaller, and read so."""
    order = np.arange(sum(len(table) for table in tables)).reshape(len(tables), -1).T.reshape(-1)
    return pa.concat_tables(tables).take(pa.array(order))


def _probs_table(info: LayerInfo, layer: RankedLayer, routed: _RoutedRows) -> pa.Table:
    num_tokens, num_experts = layer.probs.shape
    return pa.table(
        {
            "prompt_id": routed.prompt_id,
            "position": routed.position,
            "layer": np.full(num_tokens, info.layer),
            "kind": pa.repeat(pa.scalar(info.kind), num_tokens),
            "probs": lists_of(np.ascontiguousarray(layer.probs).reshape(-1), num_experts),
        }
    )
