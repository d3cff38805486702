"""MoE Atlas traces: JSON lines, one text a line, with weights of every slot.

A line has `model_id, num_layers, num_experts, top_k, text, token_strs, activations[{layer,
token_idx, expert_idx, gate_weight}], timestamp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import field_of, json_records
from moescope.probe.interchange.imported import (
    MISSING,
    MOST_EXPERTS,
    MOST_LAYERS,
    Array,
    Imported,
    ImportedSequence,
    ImportOptions,
    LayerSlots,
)
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.report import ImportReport

_HEAD: Final = ("model_id", "num_layers", "num_experts", "top_k")


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read traces of one model."""
    report = ImportReport("atlas", "one trace a line")
    report.lacks += ["order", "scores", "token ids", "phases"]
    if options.layers is not None:
        raise ImportFileError("the lines say the layers; leave --layers out")
    head: tuple[Any, ...] | None = None
    sequences: list[ImportedSequence] = []
    ids, weights = [], []
    for path in paths:
        for place, record in json_records(path):
            own = tuple(
                field_of(record, name, str if name == "model_id" else int, place) for name in _HEAD
            )
            if head is not None and own != head:
                raise ImportFileError(f"{place} is of {own}, the lines before it of {head}")
            head = own
            _check_head(own, place)
            texts = field_of(record, "token_strs", list, place)
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ImportFileError(f"{place}, field 'token_strs': expected texts")
            found = _activations(record, own, len(texts), place)
            ids.append(found[0])
            weights.append(found[1])
            sequences.append(
                ImportedSequence(
                    num_tokens=len(texts), key=f"{len(sequences)}",
                    text=field_of(record, "text", str, place), token_texts=texts,
                )
            )  # fmt: skip
    if head is None:
        raise ImportFileError("there is no trace in it")
    experts, values = np.concatenate(ids), np.concatenate(weights)
    slots = [
        LayerSlots(
            layer=layer, experts=experts[:, layer], weights=values[:, layer], num_experts=head[2]
        )
        for layer in range(head[1])
    ]
    return Imported(report=report, sequences=sequences, slots=slots, model=head[0])


def _check_head(head: tuple[Any, ...], place: str) -> None:
    _, layers, experts, top_k = head
    if not (0 < layers <= MOST_LAYERS and 0 < experts <= MOST_EXPERTS and 0 < top_k <= experts):
        raise ImportFileError(f"{place}: {layers} layers, {experts} experts, top-{top_k}")


def _activations(
    record: dict[str, Any], head: tuple[Any, ...], num_tokens: int, place: str
) -> tuple[Array, Array]:
    """Ids and weights [tokens, layers, k]; tokens that a layer lacks are missing."""
    _, layers, _, top_k = head
    rows = field_of(record, "activations", list, place)
    if num_tokens * layers * top_k > 4 * len(rows) + 100_000:
        raise ImportFileError(
            f"{place}: {len(rows)} activations do not fit {num_tokens} tokens and {layers} layers"
        )
    ids = np.full((num_tokens, layers, top_k), MISSING, np.int64)
    weights = np.zeros((num_tokens, layers, top_k), np.float32)
    filled = np.zeros((num_tokens, layers), np.int64)
    for number, row in enumerate(rows):
        where = f"{place}, activation {number}"
        if not isinstance(row, dict):
            raise ImportFileError(f"{where}: not a JSON object")
        layer, token, expert = (
            field_of(row, name, int, where) for name in ("layer", "token_idx", "expert_idx")
        )
        weight = field_of(row, "gate_weight", (float, int), where)
        if not (0 <= layer < layers and 0 <= token < num_tokens):
            raise ImportFileError(f"{where}: there is no layer {layer} or no token {token}")
        slot = filled[token, layer]
        if slot == top_k:
            raise ImportFileError(f"{where}: token {token} has over {top_k} experts in a layer")
        ids[token, layer, slot], weights[token, layer, slot] = expert, weight
        filled[token, layer] += 1
    partly = (filled > 0) & (filled < top_k)
    if partly.any():
        token, layer = np.argwhere(partly)[0]
        raise ImportFileError(
            f"{place}: token {token} has {filled[token, layer]} experts in layer {layer}, "
            f"top_k is {top_k}"
        )
    return ids, weights


IMPORTER: Final = Importer(
    name="atlas",
    description="traces of MoE Atlas, JSON lines",
    versions=("one trace a line",),
    holds="experts, weights and text of every token; not its ids",
    read=read,
)
