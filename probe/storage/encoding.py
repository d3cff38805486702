"""The Parquet form of a shard's tables: compact, lossless, readable by any Parquet reader.

Measured on real routing (see `benchmarks/bench_store.py`): ids take the bits they need as a
dictionary; weights that fill their 24 bits are smallest with their bytes split into streams,
weights of few different values as a dictionary. The first weights decide which of the two is taken.
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

SPLIT: Final = "BYTE_STREAM_SPLIT"
DICTIONARY: Final = "DICTIONARY"

_COMPRESSION: Final = "zstd"
_WEIGHTS: Final = "weights.list.element"
_EXPERTS: Final = "experts.list.element"
_TRIED_ROWS: Final = 20_000


def encode(name: str, table: pa.Table) -> tuple[memoryview, str | None]:
    """A table of a shard as a Parquet file in memory, and how its weights are encoded.

    The file is made in memory so that its checksum is of what was meant.
    """
    if name != "routing_arrays" or not table.num_rows:
        return _written(table, {}), None
    tried = table.slice(0, _TRIED_ROWS)
    sizes = {way: len(_written(tried, _options(way))) for way in (SPLIT, DICTIONARY)}
    way = min(sizes, key=lambda name: sizes[name])
    return _written(table, _options(way)), way


def _options(way: str) -> dict[str, Any]:
    dictionaries = ["prompt_id", "position", "layer", "kind", _EXPERTS]
    if way == DICTIONARY:
        return {"use_dictionary": [*dictionaries, _WEIGHTS]}
    return {"use_dictionary": dictionaries, "column_encoding": {_WEIGHTS: SPLIT}}


def _written(table: pa.Table, options: dict[str, Any]) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=_COMPRESSION, **options)
    return memoryview(sink.getvalue())
