"""Megatron-Core's router trace: `router_trace_rank{r}.jsonl`, a line a step, layer and rank.

Lines have `step, stage, block, layer, rank, num_tokens, topk, top_indices [tokens][topk]`. Tokens
of a step are a flat batch: a step of a rank becomes a sequence. Layers of the block `mtp` get the
kind mtp.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import field_of, json_records
from moescope.probe.interchange.imported import (
    MOST_LAYERS,
    Array,
    Imported,
    ImportedSequence,
    ImportOptions,
    LayerSlots,
)
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.report import ImportReport

_KINDS: Final = {"decoder": "mlp", "mtp": "mtp"}


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read the files of all ranks."""
    report = ImportReport("megatron", "pre_dispatch")
    report.lacks += ["weights", "order", "scores", "token ids", "text", "phases", "prompts"]
    if options.layers is not None:
        raise ImportFileError("the lines say the layers; leave --layers out")
    passes: dict[tuple[int, int], dict[tuple[int, str], Array]] = {}
    for path in paths:
        for place, record in json_records(path):
            _add(passes, record, place, report)
    if not passes:
        raise ImportFileError("no line in it is a trace of the stage pre_dispatch")
    routers = sorted(next(iter(passes.values())))
    names = sorted(passes)
    for name in names:
        if sorted(passes[name]) != routers:
            raise ImportFileError(
                f"step {name[0]} of rank {name[1]} has other layers than the first"
            )
        lengths = {len(ids) for ids in passes[name].values()}
        if len(lengths) > 1:
            raise ImportFileError(f"layers of step {name[0]}, rank {name[1]} have other tokens")
    slots = [
        LayerSlots(
            layer=layer,
            kind=kind,
            experts=_stacked([passes[name][layer, kind] for name in names], layer),
            num_experts=options.num_experts,
        )
        for layer, kind in routers
    ]
    sequences = [
        ImportedSequence(
            num_tokens=len(passes[name][routers[0]]), key=f"step {name[0]}, rank {name[1]}"
        )
        for name in names
    ]
    return Imported(report=report, sequences=sequences, slots=slots)


def _add(
    passes: dict[tuple[int, int], dict[tuple[int, str], Array]],
    record: dict[str, Any],
    place: str,
    report: ImportReport,
) -> None:
    stage = field_of(record, "stage", str, place)
    if stage != "pre_dispatch":
        report.drop("lines", 1, f"of the stage {stage!r}")
        return
    block = field_of(record, "block", str, place)
    if block not in _KINDS:
        raise ImportFileError(f"{place}, field 'block': expected decoder or mtp, got {block!r}")
    numbers = {
        name: field_of(record, name, int, place)
        for name in ("step", "layer", "rank", "num_tokens", "topk")
    }
    if not 0 <= numbers["layer"] < MOST_LAYERS:
        raise ImportFileError(f"{place}, field 'layer': {numbers['layer']}")
    rows = field_of(record, "top_indices", list, place)
    try:
        ids = np.array(rows, dtype=np.int64).reshape(len(rows), -1)
    except (ValueError, TypeError, OverflowError) as error:
        raise ImportFileError(f"{place}, field 'top_indices': expected rows of ids") from error
    if ids.shape != (numbers["num_tokens"], numbers["topk"]):
        raise ImportFileError(
            f"{place}: top_indices is {list(ids.shape)}, the line says "
            f"[{numbers['num_tokens']}, {numbers['topk']}]"
        )
    layers = passes.setdefault((numbers["step"], numbers["rank"]), {})
    router = (numbers["layer"], _KINDS[block])
    if router in layers:
        raise ImportFileError(f"{place}: layer {router[0]} occurs twice in a step of a rank")
    layers[router] = ids


def _stacked(parts: list[Array], layer: int) -> Array:
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise ImportFileError(f"layer {layer} has top-{min(widths)} and top-{max(widths)}")
    return np.concatenate(parts)


IMPORTER: Final = Importer(
    name="megatron",
    description="router traces of Megatron-Core, router_trace_rank*.jsonl",
    versions=("stage pre_dispatch, blocks decoder and mtp",),
    holds="experts of every token of a step; no weights, no order, no text",
    read=read,
)
