"""SGLang's expert distribution recorder (0.5.23, and the CSV of 2025-03 to 2025-05).

- `stat`, one `.pt` of rank 0: `logical_count` [buffered steps, layers, experts]; unused steps of
  the buffer are zero rows. Counts alone.
- `per_pass`, a `.pt` of every rank: a record a forward pass with counts [layers, physical experts].
- `per_token`, likewise, with `topk_ids_of_layer` [layers, tokens, 8] of physical ids, -1 where
  empty, and positions: requests are put together again from positions that go on.
- CSV `layer_id,expert_id,count`, one of each rank.

Physical ids become logical ones through the file's `last_physical_to_logical_map`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import parse_json, read_text
from moescope.probe.interchange.imported import (
    MISSING,
    MOST_EXPERTS,
    MOST_LAYERS,
    Array,
    Imported,
    ImportedSequence,
    ImportOptions,
    LayerCounts,
    LayerSlots,
    decoder_layers,
)
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.report import ImportReport
from moescope.probe.interchange.requests import Requests
from moescope.probe.interchange.tensors import integers, load_torch

_COUNTS_LACK: Final = ("weights", "order", "scores", "token ids", "text", "phases", "positions")


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read the files of one recording, those of all ranks together."""
    report = ImportReport("sglang")
    if all(path.suffix.lower() == ".csv" for path in paths):
        return _csv(paths, options, report)
    loaded = [(str(path), _load(path)) for path in paths]
    for place, data in loaded:
        if not isinstance(data, dict):
            raise ImportFileError(f"{place} holds no recording, but a {type(data).__name__}")
    if all("logical_count" in data for _, data in loaded):
        return _stat(loaded, options, report)
    if not all("records" in data for _, data in loaded):
        raise ImportFileError(
            f"{loaded[0][0]} has neither `logical_count` nor `records`: no recording of SGLang"
        )
    records = [
        (f"{place}, record {number}", record, data)
        for place, data in loaded
        for number, record in enumerate(_list(data["records"], f"{place}, records"))
    ]
    if not records:
        raise ImportFileError(f"{loaded[0][0]} holds no record")
    for place, record, _ in records:
        if not isinstance(record, dict):
            raise ImportFileError(f"{place}: expected a dict")
    if all("topk_ids_of_layer" in record for _, record, _ in records):
        return _per_token(records, options, report)
    return _per_pass(records, options, report)


def _load(path: Path) -> Any:
    """A recording; placement input, which has the same counts, may also be JSON."""
    if path.suffix.lower() == ".json":
        return parse_json(read_text(path), str(path))
    return load_torch(path)


def _steps(value: Any, place: str) -> Array:
    """Counts [steps, layers, experts]; placement input may be without steps."""
    try:
        return integers(value, place, 3)
    except ImportFileError:
        return integers(value, place, 2)[None]


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise ImportFileError(f"{place}: expected a list, got {type(value).__name__}")
    return value


def _stat(
    loaded: list[tuple[str, dict[str, Any]]], options: ImportOptions, report: ImportReport
) -> Imported:
    report.version = "stat"
    counts = []
    for place, data in loaded:
        steps = _steps(data["logical_count"], f"{place}, logical_count")
        used = int(steps.any(axis=(1, 2)).sum())
        report.found["steps"] = report.found.get("steps", 0) + used
        report.drop("steps", len(steps) - used, "unused places of the recorder's buffer")
        counts.append(steps.sum(axis=0))
    return _counted(counts, [Path(place).stem for place, _ in loaded], options, report)


def _per_pass(
    records: list[tuple[str, dict[str, Any], dict[str, Any]]],
    options: ImportOptions,
    report: ImportReport,
) -> Imported:
    report.version = "per_pass"
    passes: dict[int, Array] = {}
    for place, record, data in records:
        physical = integers(record.get("global_physical_count"), f"{place}, count", 2)
        to_logical = _map(data, place, physical.shape)
        logical = np.zeros((len(physical), int(to_logical.max()) + 1), np.int64)
        np.add.at(logical, (np.arange(len(physical))[:, None], to_logical), physical)
        number = record.get("forward_pass_id")
        if not isinstance(number, int):
            raise ImportFileError(f"{place}, forward_pass_id: expected a whole number")
        # The counts are global: those of every rank are the same pass once more.
        if number in passes and not np.array_equal(passes[number], logical):
            raise ImportFileError(f"{place}: ranks disagree on the counts of pass {number}")
        passes[number] = logical
    names = [f"pass {number}" for number in sorted(passes)]
    return _counted([passes[number] for number in sorted(passes)], names, options, report)


def _counted(
    counts: list[Array], names: list[str], options: ImportOptions, report: ImportReport
) -> Imported:
    """Counts [layers, experts], one per sequence of this name."""
    shapes = {array.shape for array in counts}
    if len(shapes) > 1:
        raise ImportFileError(f"counts have different shapes: {sorted(shapes)}")
    report.lacks += list(_COUNTS_LACK)
    stacked = np.stack(counts)
    return Imported(
        report=report,
        sequences=[ImportedSequence(num_tokens=0, key=name) for name in names],
        counts=[
            LayerCounts(layer=layer, counts=stacked[:, index])
            for index, layer in enumerate(decoder_layers(stacked.shape[1], options, report))
        ],
    )


def _map(data: dict[str, Any], place: str, shape: tuple[int, ...]) -> Array:
    """Logical id of each physical one, int[layers, physical]."""
    name = "last_physical_to_logical_map"
    to_logical = integers(data.get(name), f"{place}, {name}", 2)
    if len(to_logical) != shape[0]:
        raise ImportFileError(
            f"{place}: {name} has {len(to_logical)} layers, the record {shape[0]}"
        )
    if to_logical.size == 0 or to_logical.min() < 0 or to_logical.max() >= MOST_EXPERTS:
        raise ImportFileError(f"{place}: {name} holds ids that are no experts")
    return to_logical


def _per_token(
    records: list[tuple[str, dict[str, Any], dict[str, Any]]],
    options: ImportOptions,
    report: ImportReport,
) -> Imported:
    report.version = "per_token"
    report.lacks += ["weights", "order", "scores", "text"]
    requests = Requests()
    num_experts = 0
    for place, record, data in sorted(records, key=_pass_and_rank):
        physical = integers(record["topk_ids_of_layer"], f"{place}, topk_ids_of_layer", 3)
        to_logical = _map(data, place, physical.shape)
        if physical.max(initial=-1) >= to_logical.shape[1] or physical.min(initial=0) < MISSING:
            raise ImportFileError(f"{place}: a physical id is outside of the map")
        layer = np.arange(len(physical))[:, None, None]
        logical = np.where(physical < 0, MISSING, to_logical[layer, np.maximum(physical, 0)])
        num_experts = max(num_experts, int(to_logical.max()) + 1)
        positions = integers(record.get("positions"), f"{place}, positions", 1)
        tokens = integers(record.get("input_ids"), f"{place}, input_ids", 1)
        lengths = record.get("extend_seq_lens")
        parts = None if lengths is None else integers(lengths, f"{place}, extend_seq_lens", 1)
        if not len(positions) == len(tokens) == logical.shape[1]:
            raise ImportFileError(
                f"{place}: {len(tokens)} ids, {len(positions)} positions, {logical.shape[1]} rows"
            )
        rank = record.get("rank", 0)
        requests.add(rank, positions, tokens, np.moveaxis(logical, 0, 1), parts, place)
    found = requests.finish(report)
    ids = np.concatenate([request.ids for request in found])
    used = _used_width(ids)
    slots = [
        LayerSlots(
            layer=layer,
            experts=ids[:, index, :used],
            num_experts=options.num_experts or num_experts,
        )
        for index, layer in enumerate(decoder_layers(ids.shape[1], options, report))
    ]
    sequences = [
        ImportedSequence(
            num_tokens=len(request.tokens), num_generated=request.num_generated,
            key=f"request {number}", token_ids=request.tokens.tolist(),
        )
        for number, request in enumerate(found)
    ]  # fmt: skip
    return Imported(report=report, sequences=sequences, slots=slots)


def _pass_and_rank(entry: tuple[str, dict[str, Any], dict[str, Any]]) -> tuple[int, int]:
    place, record, _ = entry
    numbers = record.get("forward_pass_id"), record.get("rank", 0)
    if not all(isinstance(number, int) for number in numbers):
        raise ImportFileError(f"{place}: forward_pass_id and rank must be whole numbers")
    return numbers  # type: ignore[return-value]


def _used_width(ids: Array) -> int:
    """How many of the recorder's eight places are ever filled: that is k."""
    filled = (ids != MISSING).any(axis=(0, 1))
    return int(np.flatnonzero(filled).max(initial=0)) + 1


def _csv(paths: Sequence[Path], options: ImportOptions, report: ImportReport) -> Imported:
    report.version = "CSV of 2025-03 to 2025-05"
    counts: dict[tuple[int, int], int] = {}
    for path in paths:
        rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
        if rows.fieldnames is None or not {"layer_id", "expert_id", "count"} <= set(
            rows.fieldnames
        ):
            raise ImportFileError(f"{path}: the columns are layer_id, expert_id and count")
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            try:
                layer, expert, count = (int(row[n]) for n in ("layer_id", "expert_id", "count"))
            except (TypeError, ValueError) as error:
                raise ImportFileError(f"{place}: expected three whole numbers") from error
            if not (
                0 <= layer < MOST_LAYERS and 0 <= expert < MOST_EXPERTS and 0 <= count < 1 << 40
            ):
                raise ImportFileError(f"{place}: {layer}, {expert}, {count} is out of range")
            counts[layer, expert] = counts.get((layer, expert), 0) + count
    if not counts:
        raise ImportFileError(f"{paths[0]} has no row")
    layers = sorted({layer for layer, _ in counts})
    width = options.num_experts or max(expert for _, expert in counts) + 1
    table = np.zeros((len(layers), width), np.int64)
    for (layer, expert), count in counts.items():
        if expert >= width:
            raise ImportFileError(f"expert {expert} is counted, --num-experts says {width}")
        table[layers.index(layer), expert] = count
    imported = _counted([table], ["all"], options, report)
    if options.layers is None:
        report.assumed.clear()
        imported.counts = [
            LayerCounts(layer=layer, counts=one.counts)
            for layer, one in zip(layers, imported.counts, strict=True)
        ]
    return imported


IMPORTER: Final = Importer(
    name="sglang",
    description="recordings of SGLang's expert distribution recorder, the files of all ranks",
    versions=("0.5.23 stat", "0.5.23 per_pass", "0.5.23 per_token", "CSV of 2025-03 to 2025-05"),
    holds="per_token: experts and ids of every token; else counts. No weights, no order, no text",
    read=read,
)
