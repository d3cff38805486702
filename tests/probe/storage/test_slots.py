"""Slots and rows of arrays hold the same; sixteen bits lose nothing; the smaller encoding wins."""

from __future__ import annotations

import io

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.errors import RecordingError
from moescope.probe.storage.encoding import DICTIONARY, SPLIT, encode
from moescope.probe.storage.rows import insert_rows
from moescope.probe.storage.schema import SHARD_TABLES, conform, create_schema
from moescope.probe.storage.slots import arrays_of_slots, as_stored, check_slots, num_slots


def slots(weights: list[list[float | None]], ranked: bool = True) -> pa.Table:
    rows = [
        {"prompt_id": 0, "position": token, "layer": 3, "kind": "mlp",
         "rank": rank if ranked else None, "expert": 7 * rank + token, "weight": weight}
        for token, row in enumerate(weights) for rank, weight in enumerate(row)
    ]  # fmt: skip
    types = {"prompt_id": pa.int32(), "position": pa.int32(), "layer": pa.int16(),
             "kind": pa.string(), "rank": pa.uint8(), "expert": pa.uint16(),
             "weight": pa.float32()}  # fmt: skip
    return pa.Table.from_pylist(rows, schema=pa.schema(list(types.items())))


def through_a_store(rows: pa.Table) -> tuple[pa.Table, tuple[int, int]]:
    """The view's rows, and how many rows keep weights as float32 and as bf16."""
    con = duckdb.connect()
    create_schema(con)
    arrays = conform(arrays_of_slots(rows), "routing_arrays", "here")
    insert_rows(con, "routing_arrays", as_stored(arrays), run_id="r")
    kept = con.execute("SELECT count(weights), count(bf16_weights) FROM routing_arrays").fetchall()
    back = con.sql("SELECT * EXCLUDE (run_id) FROM routing ORDER BY position, rank, weight DESC")
    table = back.to_arrow_table().cast(rows.schema)
    con.close()
    return table, (kept[0][0], kept[0][1])


def bf16(value: float) -> float:
    bits = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    return float(bits.view(np.float32))


any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(any_float32, min_size=2, max_size=2), min_size=1, max_size=6))
def test_float32_weights_come_back_to_the_bit(weights: list[list[float]]) -> None:
    rows = slots([*weights, [1 / 3, 0.1]])
    back, kept = through_a_store(rows)
    assert back.equals(rows)
    assert kept == (len(weights) + 1, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(any_float32.map(bf16), min_size=2, max_size=2), min_size=1, max_size=6))
def test_bf16_weights_come_back_to_the_bit_from_half_the_bits(weights: list[list[float]]) -> None:
    rows = slots(weights)
    back, kept = through_a_store(rows)
    assert np.array_equal(back["weight"].to_numpy(), rows["weight"].to_numpy())
    assert kept == (0, len(weights))


def test_every_bf16_number_is_decoded() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    every = bits.view(np.float32)
    finite = every[np.isfinite(every)].reshape(-1, 2)
    back, kept = through_a_store(slots(finite.tolist()))
    assert kept == (0, len(finite))
    assert np.array_equal(back["weight"].to_numpy(), finite.reshape(-1))


def test_slots_without_rank_go_by_weight_and_without_weight_by_expert() -> None:
    arrays = arrays_of_slots(slots([[0.2, 0.5], [None, None]], ranked=False))
    assert arrays["is_ranked"].to_pylist() == [False, False]
    assert arrays["experts"].to_pylist() == [[7, 0], [1, 8]]
    assert arrays["weights"].to_pylist() == [[0.5, pytest.approx(0.2)], None]
    back, _ = through_a_store(slots([[0.5, 0.25], [None, None]], ranked=False))
    assert back["rank"].to_pylist() == [None] * 4
    assert sorted(back["weight"].to_pylist(), key=str) == [0.25, 0.5, None, None]


def test_number_of_slots_and_gaps_within_a_token() -> None:
    good = conform(arrays_of_slots(slots([[0.5, 0.25]] * 3)), "routing_arrays", "here")
    assert num_slots(good) == 6
    check_slots(good, "here")
    for column, values, words in (
        ("weights", [[0.5], [0.5, 0.25], None], "another number of weights than experts"),
        ("weights", [[0.5, None], [0.5, 0.25], None], "missing within a token"),
        ("experts", [[1, None], [1, 2], [1, 2]], "missing within a token"),
    ):
        place = good.schema.get_field_index(column)
        bad = good.set_column(place, good.schema.field(place), pa.array(values, good[column].type))
        with pytest.raises(RecordingError, match=f"here: .*{words}"):
            check_slots(bad, "here")


@pytest.mark.parametrize(
    ("few_values", "way"), [(False, SPLIT), (True, DICTIONARY)], ids=["full", "few"]
)
def test_the_smaller_encoding_is_taken_and_any_reader_reads_it(few_values: bool, way: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.random((4_000, 2), dtype=np.float32)
    if few_values:
        weights = np.round(weights, 2)
    rows = arrays_of_slots(slots(weights.tolist()))
    table = conform(rows, "routing_arrays", "here")
    blob, taken = encode("routing_arrays", table)
    assert taken == way
    assert pq.read_table(io.BytesIO(blob)).equals(table)
    plain = pa.BufferOutputStream()
    pq.write_table(table, plain, compression="zstd")
    assert len(blob) <= plain.getvalue().size
    assert encode("tokens", SHARD_TABLES["tokens"].empty_table())[1] is None
