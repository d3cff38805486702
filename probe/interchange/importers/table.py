"""Any table of slots: `sequence, position, layer, expert` and optionally `rank, weight, token`.

Parquet, CSV or JSON lines, one row a slot. This is how a source without an importer of its own gets
in, and the long form that `moescope export parquet` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import existing_file, json_records
from moescope.probe.interchange.imported import (
    MISSING,
    MOST_LAYERS,
    Array,
    Imported,
    ImportedSequence,
    ImportOptions,
    LayerSlots,
)
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.report import ImportReport

_INTEGERS: Final = ("position", "layer", "expert", "rank")
_REQUIRED: Final = ("sequence", "position", "layer", "expert")
_KNOWN: Final = (*_REQUIRED, "rank", "weight")
_LONGEST: Final = 10_000_000


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read tables, one after the other; a sequence lies in one file."""
    report = ImportReport("table", "one row a slot")
    table = pa.concat_tables([_read_table(path, report) for path in paths])
    if not table.num_rows:
        raise ImportFileError("there is no row in it")
    columns = {name: _integers(table, name) for name in _INTEGERS if name in table.column_names}
    names, sequence = _sequences(table)
    weights = _weights(table)
    report.lacks += ["scores", "token ids", "text", "phases"]
    report.lacks += [] if weights is not None else ["weights"]
    report.lacks += [] if "rank" in columns else ["order"]
    lengths = np.zeros(len(names), np.int64)
    np.maximum.at(lengths, sequence, columns["position"] + 1)
    starts = np.append(0, np.cumsum(lengths))
    if starts[-1] > 4 * table.num_rows + 1_000:
        raise ImportFileError(
            f"positions reach {int(columns['position'].max())}, but there are {table.num_rows} "
            "rows: positions count the tokens of a sequence from 0"
        )
    token = starts[sequence] + columns["position"]
    slots = []
    layers = np.unique(columns["layer"]).tolist()
    if starts[-1] * len(layers) > 20 * table.num_rows + 10_000_000:
        raise ImportFileError(
            f"{len(layers)} layers and {int(starts[-1])} tokens do not fit {table.num_rows} rows"
        )
    for layer in layers:
        rows = np.flatnonzero(columns["layer"] == layer)
        slots.append(_layer(layer, rows, token, columns, weights, int(starts[-1]), options))
    sequences = [
        ImportedSequence(num_tokens=int(length), key=name)
        for name, length in zip(names, lengths, strict=True)
    ]
    return Imported(report=report, sequences=sequences, slots=slots, is_ranked="rank" in columns)


def _layer(
    layer: int,
    rows: Array,
    token: Array,
    columns: dict[str, Array],
    weights: Array | None,
    num_tokens: int,
    options: ImportOptions,
) -> LayerSlots:
    """One layer's slots as [T, K], in order of rank where that is known."""
    if not _in_order(rows, token, columns):
        rank = columns.get("rank", np.zeros(len(token), np.int64))[rows]
        best_first = np.zeros(len(rows)) if weights is None else -weights[rows]
        rows = rows[np.lexsort((columns["expert"][rows], best_first, rank, token[rows]))]
    place, counts = _places(token[rows])
    top_k = int(counts.max())
    if (counts != top_k).any():
        raise ImportFileError(
            f"layer {layer}: tokens have {int(counts.min())} to {top_k} experts, not all as many"
        )
    if "rank" in columns and (columns["rank"][rows] != place).any():
        bad = rows[np.flatnonzero(columns["rank"][rows] != place)[0]]
        raise ImportFileError(
            f"layer {layer}, position {columns['position'][bad]}: the ranks are not 0 to "
            f"{top_k - 1} once each"
        )
    experts = np.full((num_tokens, top_k), MISSING, np.int64)
    experts[token[rows], place] = columns["expert"][rows]
    values = None
    if weights is not None:
        values = np.zeros((num_tokens, top_k), np.float32)
        values[token[rows], place] = weights[rows]
    return LayerSlots(layer=layer, experts=experts, weights=values, num_experts=options.num_experts)


def _in_order(rows: Array, token: Array, columns: dict[str, Array]) -> bool:
    """Whether a layer's rows come by token and rank already, as most programs write them."""
    if "rank" not in columns:
        return False
    step = np.diff(token[rows])
    return bool(((step > 0) | ((step == 0) & (np.diff(columns["rank"][rows]) > 0))).all())


def _places(ordered: Array) -> tuple[Array, Array]:
    """Place of each row within its run of equal values, and the lengths of the runs."""
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    counts = np.diff(np.append(starts, len(ordered)))
    return np.arange(len(ordered)) - np.repeat(starts, counts), counts


def _read_table(path: Path, report: ImportReport) -> pa.Table:
    existing_file(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = pq.read_table(path, partitioning=None)
        elif suffix == ".csv":
            table = pa_csv.read_csv(path)
        elif suffix in (".jsonl", ".ndjson"):
            table = _json_lines(path)
        else:
            raise ImportFileError(f"{path} ends in {suffix!r}; a table is .parquet, .csv or .jsonl")
        table.validate(full=True)  # also that texts are UTF-8
        columns = ["sequence" if name == "prompt_id" else name for name in table.column_names]
    except (pa.ArrowException, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImportFileError(f"{path} cannot be read as {suffix[1:]}: {first}") from error
    table = table.rename_columns(columns)
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise ImportFileError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}"
        )
    unknown = [name for name in table.column_names if name not in _KNOWN]
    report.drop("columns", len(unknown), ", ".join(unknown))
    return table.select([name for name in _KNOWN if name in table.column_names])


def _json_lines(path: Path) -> pa.Table:
    """By Python's own reader: Arrow's can end the process on a damaged file."""
    records = [record for _, record in json_records(path)]
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: [record.get(name) for record in records] for name in names})


def _integers(table: pa.Table, name: str) -> Array:
    column = table[name]
    if column.null_count:
        raise ImportFileError(f"column {name!r} is empty in {column.null_count} rows")
    try:
        values: Array = column.cast(pa.int64()).to_numpy()
    except pa.ArrowException as error:
        raise ImportFileError(f"column {name!r} does not hold whole numbers alone") from error
    limit = {"layer": MOST_LAYERS, "position": _LONGEST}.get(name, 1 << 31)
    if values.min() < 0 or values.max() >= limit:
        raise ImportFileError(
            f"column {name!r} goes from {values.min()} to {values.max()}; 0 to {limit - 1} is right"
        )
    return values


def _sequences(table: pa.Table) -> tuple[list[str], Array]:
    """Names in the order in which they come, and each row's index."""
    if table["sequence"].null_count:
        raise ImportFileError(f"column 'sequence' is empty in {table['sequence'].null_count} rows")
    encoded = table["sequence"].combine_chunks().dictionary_encode()
    return [str(name) for name in encoded.dictionary.to_pylist()], encoded.indices.to_numpy()


def _weights(table: pa.Table) -> Array | None:
    if "weight" not in table.column_names or table["weight"].null_count == table.num_rows:
        return None
    if table["weight"].null_count:
        raise ImportFileError(
            f"column 'weight' is empty in {table['weight'].null_count} of {table.num_rows} rows"
        )
    try:
        values: Any = table["weight"].cast(pa.float32()).to_numpy()
    except pa.ArrowException as error:
        raise ImportFileError("column 'weight' does not hold numbers alone") from error
    return np.asarray(values)


IMPORTER: Final = Importer(
    name="table",
    description="Parquet, CSV or JSON lines of sequence, position, layer, expert[, rank, weight]",
    versions=("one row a slot",),
    holds="experts of every token, and weights and order where the columns are there; no text",
    read=read,
)
