"""SteerMoE's files: the table of risk differences, and the raw logits behind it.

- `activations_*.pkl`: layers x experts rows with a1, a2, d1, d2: tokens of the two sets that did
  and did not use the expert. Counts of two sets.
- `output_*.pkl`: a row a conversation with `router_logits` float16 [layers, tokens, experts], token
  ids and texts. The experts are those that the rule selects from the logits.

Both are pickles; they are opened by an unpickler that constructs data alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import one_file
from moescope.probe.interchange.imported import (
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
from moescope.probe.interchange.pickles import Columns, numbers, read_frame, real_value
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.report import ImportReport
from moescope.probe.interchange.rules import select_slots

_TABLE: Final = ("layer", "expert", "a1", "a2", "d1", "d2")


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read one pickled table."""
    path = one_file(paths, "steermoe")
    frame = read_frame(path)
    columns = list(frame.columns)
    if set(_TABLE) <= set(columns):
        return _table(frame, path, options)
    if "router_logits" in columns:
        return _logits(frame, path, options)
    raise ImportFileError(
        f"{path} has neither the columns {', '.join(_TABLE)} nor router_logits; it has "
        f"{', '.join(columns[:12]) or 'none'}"
    )


def _table(frame: Columns, path: Path, options: ImportOptions) -> Imported:
    report = ImportReport("steermoe", "table of risk differences")
    report.lacks += ["weights", "order", "scores", "token ids", "text", "phases", "positions"]
    column = {name: numbers(frame, name, path) for name in _TABLE}
    if any((values < 0).any() or (values != np.round(values)).any() for values in column.values()):
        raise ImportFileError(f"{path}: counts and numbers of layers are whole and not negative")
    layer, expert = column["layer"].astype(np.int64), column["expert"].astype(np.int64)
    if layer.max(initial=0) >= MOST_LAYERS or expert.max(initial=0) >= MOST_EXPERTS:
        raise ImportFileError(f"{path}: layer {layer.max()} or expert {expert.max()} is too large")
    if not frame.num_rows:
        raise ImportFileError(f"{path} has no row")
    numbered = np.unique(layer)
    width = int(expert.max()) + 1
    places = {*zip(layer.tolist(), expert.tolist(), strict=True)}
    if not frame.num_rows == len(places) == len(numbered) * width:
        raise ImportFileError(
            f"{path} has {frame.num_rows} rows, not one for each of {len(numbered)} layers x "
            f"{width} experts"
        )
    names = list(numbered) if options.layers is None else list(options.layers)
    if len(names) != len(numbered):
        raise ImportFileError(f"--layers names {len(names)} layers, the table has {len(numbered)}")
    counts = []
    for name, number in zip(names, numbered, strict=True):
        rows = np.flatnonzero(layer == number)
        values = np.zeros((2, width), np.int64)
        for index, active in enumerate(("a1", "a2")):
            values[index, expert[rows]] = column[active][rows].astype(np.int64)
        counts.append(LayerCounts(layer=int(name), counts=values))
    return Imported(
        report=report,
        sequences=[
            ImportedSequence(num_tokens=0, key=f"set {n}", fields={"label": f"set {n}"})
            for n in (1, 2)
        ],
        counts=counts,
        top_k=options.top_k or _top_k(column, layer, path, report),
    )


def _top_k(column: dict[str, Array], layer: Array, path: Path, report: ImportReport) -> int:
    """Hits by tokens, which must be a whole number and the same in both sets."""
    rows = layer == layer[0]
    found = set()
    for active, inactive in (("a1", "d1"), ("a2", "d2")):
        tokens = column[active][rows] + column[inactive][rows]
        if len(set(tokens.tolist())) != 1 or not tokens[0]:
            raise ImportFileError(f"{path}: {active} + {inactive} is not the same for all experts")
        found.add(float(column[active][rows].sum() / tokens[0]))
    if len(found) > 1 or not next(iter(found)).is_integer() or not next(iter(found)):
        raise ImportFileError(f"{path}: k would be {sorted(found)}; give --top-k")
    report.assumed.append("k is the number of hits by that of tokens")
    return int(next(iter(found)))


def _logits(frame: Columns, path: Path, options: ImportOptions) -> Imported:
    report = ImportReport("steermoe", "raw logits")
    report.lacks += ["phases"]
    attributes = frame.attrs
    told = attributes.get("num_experts_per_tok")
    if options.top_k is None and isinstance(told, int):
        options = replace(options, top_k=told)
    arrays, sequences = [], []
    for number in range(frame.num_rows):
        row = {name: real_value(values[number]) for name, values in frame.columns.items()}
        place = f"{path}, row {number}"
        logits = _array(row["router_logits"], place)
        arrays.append(logits)
        sequences.append(_sequence(row, logits.shape[1], number, place))
    if not arrays:
        raise ImportFileError(f"{path} has no row")
    shapes = {(array.shape[0], array.shape[2]) for array in arrays}
    if len(shapes) > 1:
        raise ImportFileError(f"{path}: rows have other layers or experts: {sorted(shapes)}")
    slots: list[LayerSlots] = []
    for index, layer in enumerate(decoder_layers(arrays[0].shape[0], options, report)):
        logits = np.concatenate([array[index] for array in arrays])
        slots.append(select_slots(logits, layer, options, f"{path}, layer {layer}"))
    report.assumed.append(f"experts were selected by {options.rule or 'softmax'}, not recorded")
    if any(sequence.token_ids is None for sequence in sequences):
        report.lacks.append("token ids")
    if not any(sequence.text for sequence in sequences):
        report.lacks.append("text")
    model = attributes.get("model_name")
    return Imported(
        report=report, sequences=sequences, slots=slots, is_ranked=True,
        model=model if isinstance(model, str) else None,
        manifest={"rule": options.rule or "softmax"},
    )  # fmt: skip


def _array(value: Any, place: str) -> Array:
    try:
        array = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise ImportFileError(f"{place}, router_logits: expected numbers") from error
    if array.ndim != 3 or 0 in array.shape or array.shape[2] > MOST_EXPERTS:
        raise ImportFileError(
            f"{place}, router_logits: expected [layers, tokens, experts], got {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise ImportFileError(f"{place}, router_logits: a logit is not a finite number")
    return array


def _sequence(row: dict[Any, Any], length: int, number: int, place: str) -> ImportedSequence:
    ids, texts = _listed(row.get("prompt_token_ids")), _listed(row.get("prompt_tokens"))
    for name, values in (("prompt_token_ids", ids), ("prompt_tokens", texts)):
        if values is not None and len(values) != length:
            raise ImportFileError(f"{place}: {len(values)} {name}, logits of {length} tokens")
    if ids is not None and not all(
        isinstance(value, (int, np.integer)) and 0 <= value < 1 << 31 for value in ids
    ):
        raise ImportFileError(f"{place}, prompt_token_ids: expected token ids")
    messages = _listed(row.get("messages")) or []
    asked = [
        turn["content"] for turn in messages
        if isinstance(turn, dict) and isinstance(turn.get("content"), str)
        and isinstance(turn.get("role"), str) and turn["role"] == "user"
    ]  # fmt: skip
    return ImportedSequence(
        num_tokens=length,
        key=str(number),
        text=asked[-1] if asked else "",
        token_ids=None if ids is None else [int(value) for value in ids],
        token_texts=None if texts is None else [str(value) for value in texts],
    )


def _listed(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, (list, tuple, np.ndarray)) else None


IMPORTER: Final = Importer(
    name="steermoe",
    description="SteerMoE's pickled tables (activations_*.pkl) and logits (output_*.pkl)",
    versions=("activations_*.pkl", "output_*.pkl"),
    holds="counts of two sets; or experts, weights and text of every token, by the rule",
    read=read,
)
