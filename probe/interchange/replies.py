"""What replies of different servers have in common: ids [tokens, layers, k], and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.imported import (
    Array,
    ImportOptions,
    LayerSlots,
    decoder_layers,
)
from moescope.probe.interchange.report import ImportReport


@dataclass(frozen=True)
class SequenceIds:
    """Ids of a sequence, int[tokens, layers, k], and where they stand."""

    ids: Array
    place: str


def stack_layers(
    sequences: Sequence[SequenceIds], options: ImportOptions, report: ImportReport
) -> list[LayerSlots]:
    """One layer after the other, over all sequences.

    Raises:
        ImportFileError: sequences have other layers or another k.
    """
    shape = sequences[0].ids.shape[1:]
    for sequence in sequences:
        if sequence.ids.shape[1:] != shape:
            raise ImportFileError(
                f"{sequence.place} has {sequence.ids.shape[1]} layers and top-"
                f"{sequence.ids.shape[2]}, {sequences[0].place} {shape[0]} and top-{shape[1]}"
            )
    if not shape[0] or not shape[1]:
        raise ImportFileError(f"{sequences[0].place} has {shape[0]} layers and top-{shape[1]}")
    ids = np.concatenate([sequence.ids for sequence in sequences])
    return [
        LayerSlots(layer=layer, experts=ids[:, index], num_experts=options.num_experts)
        for index, layer in enumerate(decoder_layers(shape[0], options, report))
    ]


def texts_of(reply: dict[str, Any], choice: dict[str, Any]) -> tuple[str, str | None]:
    """Prompt and answer, where a reply in OpenAI's form holds them."""
    prompt = reply.get("prompt")
    message = choice.get("message")
    answer = message.get("content") if isinstance(message, dict) else choice.get("text")
    return (
        prompt if isinstance(prompt, str) else "",
        answer if isinstance(answer, str) else None,
    )
