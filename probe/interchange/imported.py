"""The neutral form between the files of other systems and the tables of a store.

Letters: S sequences, T tokens of all sequences one after the other, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.report import ImportReport

Array = NDArray[Any]

MISSING: Final = -1
"""In `LayerSlots.experts`: this token was not captured here."""

MOST_EXPERTS: Final = 65_536
MOST_LAYERS: Final = 2_000


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a user says about a source that does not say it itself.

    Attributes:
        model: the model's name, as it shall stand in the run.
        num_experts: routed experts of a layer.
        top_k: experts a token.
        layers: decoder layers of the source's layers, in their order.
        rule: what turns logits into routing: a name of `rules.PLAIN`, or a JSON file.
    """

    model: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    layers: tuple[int, ...] | None = None
    rule: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImportedSequence:
    """One prompt with what was generated after it.

    Attributes:
        num_tokens: of prompt and answer.
        num_generated: of them; 0 where that is not known.
        key: its id in the source.
        text: what the user wrote, if the source says it.
        response: what the model wrote, if the source says it.
        token_ids: int[num_tokens], or None.
        token_texts: as many, or None.
        fields: `label`, `lang`, `domain`, …
    """

    num_tokens: int
    num_generated: int = 0
    key: str | None = None
    text: str = ""
    response: str | None = None
    token_ids: Sequence[int] | None = None
    token_texts: Sequence[str] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerSlots:
    """One layer's slots.

    Attributes:
        layer: decoder layer.
        experts: int[T, K]; a row of `MISSING` is a token that was not captured here.
        weights: float32[T, K], or None.
        num_experts: E, or None where the source does not say it.
        kind: mlp, mtp, ….
        scores: float32[T, E] of the router after its softmax or sigmoid, or None.
    """

    layer: int
    experts: Array
    weights: Array | None = None
    num_experts: int | None = None
    kind: str = "mlp"
    scores: Array | None = None


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """One layer's counts, where nothing else was recorded.

    Attributes:
        layer: decoder layer.
        counts: int[S, E]: tokens of each sequence (or pass, or file) that selected each expert.
        kind: mlp, mtp, ….
    """

    layer: int
    counts: Array
    kind: str = "mlp"


@dataclass(kw_only=True)
class Imported:
    """A source as read; `slots` or `counts` is filled, not both.

    Attributes:
        report: what was found.
        sequences: S of them.
        slots: by layer.
        counts: by layer.
        top_k: where the source says it.
        is_ranked: whether the order of `slots` is that of rank.
        model: its name, if the source says it.
        manifest: what else is worth keeping.
    """

    report: ImportReport
    sequences: list[ImportedSequence]
    slots: list[LayerSlots] = field(default_factory=list)
    counts: list[LayerCounts] = field(default_factory=list)
    top_k: int | None = None
    is_ranked: bool = False
    model: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)


def decoder_layers(number: int, options: ImportOptions, report: ImportReport) -> list[int]:
    """Decoder indices of the source's layers, in their order.

    Raises:
        ImportFileError: --layers names another number of layers than there are.
    """
    if options.layers is None:
        report.assumed.append("the first layer of the source is decoder layer 0 (see --layers)")
        return list(range(number))
    if len(options.layers) != number:
        raise ImportFileError(
            f"--layers names {len(options.layers)} layers, the source has {number}"
        )
    return list(options.layers)


def check_ids(experts: Array, num_experts: int, where: str) -> Array:
    """Which rows were captured, bool[T]; refuse ids that no router could have returned.

    A row of one and the same id (k > 1) says "not captured" or "a dense layer" in the formats of
    others, and so does -1.

    Raises:
        ImportFileError: an id is out of range, or repeated within a row, or a row has gaps.
    """
    if experts.ndim != 2 or experts.shape[1] < 1:
        raise ImportFileError(f"{where}: expected ids as [tokens, k], got {list(experts.shape)}")
    if experts.shape[1] > 1:
        captured: Array = (experts != experts[:, :1]).any(axis=1)
    else:
        captured = experts[:, 0] != MISSING
    rows = experts[captured]
    bad = (rows < 0) | (rows >= num_experts)
    if bad.any():
        token = int(np.flatnonzero(captured)[bad.any(axis=1)][0])
        expert = rows[bad][0]
        raise ImportFileError(
            f"{where}, token {token}: expert {expert} is not one of 0 to {num_experts - 1}"
        )
    ordered = np.sort(rows, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if repeated.any():
        token = int(np.flatnonzero(captured)[repeated][0])
        raise ImportFileError(
            f"{where}, token {token}: an expert is repeated in {experts[token].tolist()}; "
            "a top-k row has different ids"
        )
    return captured
