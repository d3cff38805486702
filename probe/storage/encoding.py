"""The Parquet form of a shard's tables: compact, lossless, readable by any Parquet reader.

Measured on real routing (see `benchmarks/bench_store.py`): ids take the bits they need as a
dictionary; weights that fill their 24 bits are smallest with their bytes split into streams,
weights of few different values as a dictionary. The first weights decide which of the two is taken.
Sums and probabilities fill their bits always.
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

SPLIT: Final = "BYTE_STREAM_SPLIT"
DICTIONARY: Final = "DICTIONARY"

_COMPRESSION: Final = "zstd"
_TRIED_ROWS: Final = 20_000


def encode(name: str, table: pa.Table) -> tuple[memoryview, str | None]:
    """A table of a shard as a Parquet file in memory, and how its routing weights are encoded.

    The file is made in memory so that its checksum is of what was meant.
    """
    if name != "routing_arrays" or not table.num_rows:
        return _written(table, SPLIT), None
    tried = table.slice(0, _TRIED_ROWS)
    sizes = {way: len(_written(tried, way)) for way in (SPLIT, DICTIONARY)}
    way = min(sizes, key=lambda way: sizes[way])
    return _written(table, way), way


def _written(table: pa.Table, way: str) -> memoryview:
    """The file; `way` is how lists of floating-point numbers are encoded."""
    numbers = {
        f"{field.name}.list.element"
        for field in table.schema
        if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
    }
    lists = {f"{field.name}.list.element" for field in table.schema if _is_list(field)} - numbers
    plain = {field.name for field in table.schema if not _is_list(field)}
    options: dict[str, Any] = {"use_dictionary": sorted(plain | lists | numbers)}
    if way == SPLIT and numbers:
        options = {
            "use_dictionary": sorted(plain | lists),
            "column_encoding": dict.fromkeys(sorted(numbers), SPLIT),
        }
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=_COMPRESSION, **options)
    return memoryview(sink.getvalue())


def _is_list(field: pa.Field) -> bool:
    return bool(pa.types.is_list(field.type))
