"""From what was imported to the rows of the store, in shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.checks import checked_counts, checked_slots
from moescope.probe.interchange.imported import (
    MISSING,
    Array,
    Imported,
    ImportOptions,
    LayerSlots,
)
from moescope.probe.layer_rows import lists_of
from moescope.probe.storage.run_folder import RunDescription
from moescope.probe.storage.shards import shard_name

_SLOTS_A_SHARD: Final = 6_000_000
_UNMEASURED: Final = ("norm_sum", "weighted_norm_sum", "easyep_sum", "max_abs")


@dataclass(frozen=True)
class AssembledRun:
    """An import that is ready to be stored.

    Attributes:
        description: of the run.
        shards: the tables of each planned shard, made one at a time.
    """

    description: RunDescription
    shards: Iterator[tuple[str, Mapping[str, pa.Table], list[int]]]


def assemble(imported: Imported, options: ImportOptions, digest: str) -> AssembledRun:
    """Check what was imported and plan its shards.

    Args:
        imported: the source as read.
        options: what the user said about it.
        digest: of the source's bytes: the run's identity.

    Raises:
        ImportFileError: ids, weights or shapes that cannot be; nothing was written.
    """
    if not imported.sequences or not (imported.slots or imported.counts):
        raise ImportFileError("there is no routing in it")
    if imported.slots:
        imported = checked_slots(imported, options)
        parts = _parts(imported)
    else:
        imported = checked_counts(imported, options)
        parts = [list(range(len(imported.sequences)))]
    shards = {shard_name(index): part for index, part in enumerate(parts)}
    description = _describe(imported, options, digest, shards)
    return AssembledRun(description, _tables(imported, shards))


def _parts(imported: Imported) -> list[list[int]]:
    """Sequences of each shard."""
    width = sum(slots.experts.shape[1] for slots in imported.slots)
    parts: list[list[int]] = [[]]
    filled = 0
    for index, sequence in enumerate(imported.sequences):
        if filled and filled + sequence.num_tokens * width > _SLOTS_A_SHARD:
            parts.append([])
            filled = 0
        parts[-1].append(index)
        filled += sequence.num_tokens * width
    return parts


def _describe(
    imported: Imported, options: ImportOptions, digest: str, shards: Mapping[str, list[int]]
) -> RunDescription:
    report = imported.report
    if imported.slots:
        routers = [
            (slots.layer, slots.kind, int(slots.num_experts or 0), slots.experts.shape[1])
            for slots in imported.slots
        ]
    else:
        routers = [
            (layer.layer, layer.kind, layer.counts.shape[1], int(imported.top_k or 0))
            for layer in imported.counts
        ]
    if len({router[:2] for router in routers}) != len(routers):
        raise ImportFileError("a layer occurs twice")
    routers.sort(key=lambda router: (router[1], router[0]))
    kinds: dict[str, int] = {}
    rows = []
    for layer, kind, num_experts, top_k in routers:
        rows.append(
            {"layer": layer, "kind": kind, "moe_layer": kinds.setdefault(kind, 0),
             "module": f"{kind} router of layer {layer}", "num_experts": num_experts,
             "top_k": top_k, "num_shared_experts": 0, "rule": None}
        )  # fmt: skip
        kinds[kind] += 1
    return RunDescription(
        model=options.model or imported.model or "unknown",
        revision=None,
        family=None,
        record_level="topk" if imported.slots else "usage",
        layers=rows,
        manifest={**imported.manifest, "lacks": report.lacks, "import": report.to_json()},
        identity={"source": report.format, "sha256": digest},
        planned_shards=shards,
        source=f"import:{report.format}",
    )


def _tables(
    imported: Imported, shards: Mapping[str, list[int]]
) -> Iterator[tuple[str, Mapping[str, pa.Table], list[int]]]:
    lengths = [sequence.num_tokens for sequence in imported.sequences]
    starts = np.append(0, np.cumsum(lengths))
    for shard_id, part in shards.items():
        rows = slice(int(starts[part[0]]), int(starts[part[-1] + 1]))
        tables = {"prompts": _prompts(imported, part)}
        if imported.counts:
            tables["usage_arrays"] = _counted(imported, part)
        else:
            tokens = _Tokens.of(imported, part, rows)
            tables["tokens"] = tokens.table
            tables["usage_arrays"] = pa.concat_tables(
                _summed(slots, tokens, rows) for slots in imported.slots
            )
            tables["routing_arrays"] = _routing(imported, tokens, rows)
        yield shard_id, tables, part


def _prompts(imported: Imported, part: list[int]) -> pa.Table:
    sequences = [imported.sequences[index] for index in part]
    has_tokens = bool(imported.slots)
    named = {
        name: pa.array([sequence.fields.get(name) for sequence in sequences], pa.string())
        for name in ("label", "lang", "domain", "pair_id")
    }
    empty = pa.nulls(len(part), pa.string())
    return pa.table(
        {
            "prompt_id": pa.array(part, pa.int32()),
            "key": pa.array([sequence.key for sequence in sequences], pa.string()),
            "text": [sequence.text for sequence in sequences],
            "rendered_text": [sequence.text for sequence in sequences],
            "set_name": [imported.report.format] * len(part),
            **named,
            **dict.fromkeys(("target", "span", "expected", "outcome", "detector", "meta"), empty),
            "num_tokens": [
                sequence.num_tokens - sequence.num_generated if has_tokens else 0
                for sequence in sequences
            ],
            "num_generated": [
                sequence.num_generated if has_tokens else 0 for sequence in sequences
            ],
            "response": pa.array([sequence.response for sequence in sequences], pa.string()),
        }
    )


@dataclass(frozen=True)
class _Tokens:
    """The tokens of some sequences: which were captured, and the groups that usage sums.

    Attributes:
        table: rows of `tokens`.
        routed: bool[T].
        prompt_id, position, group: int[T]; a group is a sequence's prompt or its answer.
        groups: prompt and phase of each group.
    """

    table: pa.Table
    routed: Array
    prompt_id: Array
    position: Array
    group: Array
    groups: list[tuple[int, str]]

    @classmethod
    def of(cls, imported: Imported, part: list[int], rows: slice) -> _Tokens:
        """The tokens of the sequences of a shard, which are these rows."""
        sequences = [imported.sequences[index] for index in part]
        lengths = [sequence.num_tokens for sequence in sequences]
        prompt_id = np.repeat(part, lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        generated = np.concatenate([
            np.arange(sequence.num_tokens) >= sequence.num_tokens - sequence.num_generated
            for sequence in sequences
        ])  # fmt: skip
        routed = imported.slots[0].experts[rows, 0] != MISSING
        ids: list[Any] = []
        texts: list[str] = []
        for sequence in sequences:
            number = sequence.num_tokens
            ids.append(np.full(number, -1) if sequence.token_ids is None else sequence.token_ids)
            texts += [""] * number if sequence.token_texts is None else sequence.token_texts
        keys = 2 * prompt_id + generated
        found, group = np.unique(keys[routed], return_inverse=True)
        groups = [(int(key) // 2, "generated" if key % 2 else "prompt") for key in found]
        whole = np.full(len(prompt_id), -1)
        whole[routed] = group
        phase = pa.array(np.where(generated, "generated", "prompt"))
        table = pa.table(
            {
                "prompt_id": prompt_id, "position": position, "token_id": np.concatenate(ids),
                "token": texts, "phase": phase,
                "segment": pa.array(np.where(generated, "answer", "user")),
                "is_special": np.zeros(len(routed), bool), "in_span": np.zeros(len(routed), bool),
                "is_routed": routed,
            }
        )  # fmt: skip
        return cls(table, routed, prompt_id, position, whole, groups)

    def usage(self, layer: int, kind: str, routed: Array, arrays: dict[str, Any]) -> pa.Table:
        """Rows of `usage_arrays` of one layer."""
        number = len(self.groups)
        segments = {"prompt": "user", "generated": "answer"}
        unmeasured = pa.nulls(number, pa.list_(pa.float32()))
        return pa.table(
            {
                "prompt_id": [prompt for prompt, _ in self.groups],
                "phase": [phase for _, phase in self.groups],
                "segment": [segments[phase] for _, phase in self.groups],
                "is_special": np.zeros(number, bool), "layer": np.full(number, layer),
                "kind": [kind] * number, "routed_tokens": routed, **arrays,
                **dict.fromkeys(_UNMEASURED, unmeasured),
            }
        )  # fmt: skip


def _summed(slots: LayerSlots, tokens: _Tokens, rows: slice) -> pa.Table:
    """What a layer's slots sum to, by group."""
    width = int(slots.num_experts or 0)
    group = tokens.group[tokens.routed]
    experts = slots.experts[rows][tokens.routed]
    cell = (group[:, None] * width + experts).reshape(-1)
    size = len(tokens.groups) * width
    arrays: dict[str, Any] = {
        "num_tokens": lists_of(np.bincount(cell, minlength=size).astype(np.int32), width)
    }
    empty = pa.nulls(len(tokens.groups), pa.list_(pa.float32()))
    arrays["weight_sum"] = arrays["prob_sum"] = empty
    if slots.weights is not None:
        weights = slots.weights[rows][tokens.routed].reshape(-1)
        sums = np.bincount(cell, weights=weights, minlength=size)
        arrays["weight_sum"] = lists_of(sums.astype(np.float32), width)
    if slots.scores is not None:
        # Tokens of a group follow each other.
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        scores = np.add.reduceat(slots.scores[rows][tokens.routed], starts, axis=0, dtype=float)
        arrays["prob_sum"] = lists_of(scores.astype(np.float32).reshape(-1), width)
    routed = np.bincount(group, minlength=len(tokens.groups))
    return tokens.usage(slots.layer, slots.kind, routed, arrays)


def _routing(imported: Imported, tokens: _Tokens, rows: slice) -> pa.Table:
    """Rows of arrays, token after token; layers with the same k in one piece."""
    by_width: dict[int, list[LayerSlots]] = {}
    for slots in imported.slots:
        by_width.setdefault(slots.experts.shape[1], []).append(slots)
    tables = [
        _routing_of(layers, tokens, rows, is_ranked=imported.is_ranked)
        for layers in by_width.values()
    ]
    if len(tables) == 1:
        return tables[0]
    return pa.concat_tables(tables).sort_by(
        [("prompt_id", "ascending"), ("position", "ascending"), ("layer", "ascending")]
    )


def _routing_of(
    layers: list[LayerSlots], tokens: _Tokens, rows: slice, *, is_ranked: bool
) -> pa.Table:
    """Rows of layers with the same k; without ranks, the largest weight first, or the lowest id."""
    has_weights = layers[0].weights is not None
    experts = np.stack([slots.experts[rows][tokens.routed] for slots in layers], axis=1)
    weights = None
    if has_weights:
        weights = np.stack(
            [np.asarray(slots.weights)[rows][tokens.routed] for slots in layers], axis=1
        )
    if not is_ranked and weights is None:
        experts = np.sort(experts, axis=-1)
    elif not is_ranked and weights is not None:
        order = np.lexsort((experts, -weights), axis=-1)
        experts = np.take_along_axis(experts, order, axis=-1)
        weights = np.take_along_axis(weights, order, axis=-1)
    number, width, top_k = experts.shape
    kinds = pa.array([slots.kind for slots in layers], pa.string())
    repeated = np.tile(np.arange(width), number)
    return pa.table(
        {
            "prompt_id": np.repeat(tokens.prompt_id[tokens.routed], width),
            "position": np.repeat(tokens.position[tokens.routed], width),
            "layer": np.array([slots.layer for slots in layers])[repeated],
            "kind": kinds.take(pa.array(repeated)),
            "is_ranked": np.full(number * width, is_ranked or has_weights),
            "experts": lists_of(experts.astype(np.uint16).reshape(-1), top_k),
            "weights": pa.nulls(number * width, pa.list_(pa.float32()))
            if weights is None
            else lists_of(weights.astype(np.float32).reshape(-1), top_k),
        }
    )


def _counted(imported: Imported, part: list[int]) -> pa.Table:
    """Usage of sequences of which only counts are known."""
    number = len(part)
    empty = pa.nulls(number, pa.list_(pa.float32()))
    unknown = ("weight_sum", "prob_sum", *_UNMEASURED)
    tables = []
    for layer in imported.counts:
        counts = layer.counts[part].astype(np.int32)
        routed = counts.sum(axis=1) // int(imported.top_k or 1)
        tables.append(pa.table(
            {
                "prompt_id": part, "phase": ["prompt"] * number, "segment": ["user"] * number,
                "is_special": np.zeros(number, bool), "layer": np.full(number, layer.layer),
                "kind": [layer.kind] * number, "routed_tokens": routed,
                "num_tokens": lists_of(counts.reshape(-1), counts.shape[1]),
                **dict.fromkeys(unknown, empty),
            }
        ))  # fmt: skip
    return pa.concat_tables(tables)
