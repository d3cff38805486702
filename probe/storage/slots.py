"""Single slots and rows of arrays: the two forms of routing, and its weights in sixteen bits.

A shard and the store hold one row per routed token and router, with the experts and weights of its
slots as lists in order of rank; `routing` shows them as one row a slot. Weights that are all exact
in bfloat16, as those of most models that run in it, are stored as its sixteen bits.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.probe.errors import RecordingError

_TOKEN_KEYS: Final = ("prompt_id", "position", "layer", "kind")
_LOWER_HALF: Final = np.uint32(0xFFFF)


def arrays_of_slots(slots: pa.Table) -> pa.Table:
    """Rows of `routing` as rows of `routing_arrays`, by prompt, position, layer and kind.

    Args:
        slots: columns of `routing` without `run_id`; `rank` is known or null for all slots of a
            token, `weight` likewise.

    Returns:
        Columns of `routing_arrays` as in a shard. Tokens without ranks have their slots by
        decreasing weight, then by expert.
    """
    columns = {name: slots[name].to_numpy(zero_copy_only=False) for name in slots.column_names}
    kind = np.asarray(columns["kind"], dtype=str)
    rank = np.asarray(slots["rank"].fill_null(0).to_numpy())
    is_ranked = slots["rank"].is_valid().to_numpy()
    has_weight = slots["weight"].is_valid().to_numpy()
    weight = np.where(has_weight, columns["weight"], 0.0).astype(np.float32)
    keys = (columns["prompt_id"], columns["position"], columns["layer"], kind)
    order = np.lexsort((columns["expert"], -weight, rank, *reversed(keys)))
    starts = np.zeros(len(order), dtype=bool)
    starts[:1] = True
    for key in keys:
        starts[1:] |= key[order][1:] != key[order][:-1]
    first = np.flatnonzero(starts)
    heads = order[first]
    offsets = pa.array(np.append(first, len(order)).astype(np.int32))
    experts = pa.array(columns["expert"][order].astype(np.uint16))
    known = has_weight[heads]
    return pa.table(
        {
            **{name: pa.array(key[heads]) for name, key in zip(_TOKEN_KEYS, keys, strict=True)},
            "is_ranked": pa.array(is_ranked[heads]),
            "experts": pa.ListArray.from_arrays(offsets, experts),
            "weights": pa.ListArray.from_arrays(
                offsets, pa.array(weight[order]), mask=pa.array(~known)
            ),
        }
    )


def check_slots(rows: pa.Table, where: str) -> None:
    """Refuse rows of `routing_arrays` with another number of weights than experts, or gaps.

    Raises:
        RecordingError: names the shard.
    """
    if not rows.num_rows:
        return
    experts = rows["experts"].combine_chunks()
    weights = rows["weights"].combine_chunks()
    if experts.flatten().null_count or weights.flatten().null_count:
        raise RecordingError(f"{where}: an expert or weight is missing within a token")
    known = weights.is_valid().to_numpy(zero_copy_only=False)
    num_experts = experts.value_lengths().to_numpy()
    num_weights = weights.value_lengths().fill_null(0).to_numpy()
    if (num_experts != num_weights)[known].any():
        raise RecordingError(f"{where}: a token has another number of weights than experts")


def num_slots(rows: pa.Table) -> int:
    """How many rows of `routing` these rows of `routing_arrays` are."""
    return sum(len(chunk.flatten()) for chunk in rows["experts"].chunks)


def are_bf16_exact(rows: pa.Table) -> bool:
    """Whether every weight of these rows of `routing_arrays` is a bfloat16 number."""
    bits = _bits(rows["weights"].combine_chunks().flatten())
    return not bool((bits & _LOWER_HALF).any())


def as_stored(rows: pa.Table) -> pa.Table:
    """A shard's rows of `routing_arrays` with the columns of the store.

    Weights move to `bf16_weights`, as bits, when all of them are exact in bfloat16.
    """
    if not are_bf16_exact(rows):
        return rows.append_column("bf16_weights", pa.nulls(len(rows), pa.list_(pa.uint16())))
    weights = rows["weights"].combine_chunks()
    halves = pa.array((_bits(weights.flatten()) >> 16).astype(np.uint16))
    lengths = weights.value_lengths().fill_null(0).to_numpy()
    offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
    moved = pa.ListArray.from_arrays(offsets, halves, mask=weights.is_null())
    empty = pa.nulls(len(rows), pa.list_(pa.float32()))
    return rows.set_column(rows.schema.get_field_index("weights"), "weights", empty).append_column(
        "bf16_weights", moved
    )


def weights_of(rows: pa.Table) -> NDArray[np.float32] | None:
    """The weights of rows as the store holds them, slot after slot; None where any is unknown."""
    wide, halves = rows["weights"].combine_chunks(), rows["bf16_weights"].combine_chunks()
    if halves.null_count == 0:
        return _from_bf16(halves.flatten())
    if wide.null_count == 0:
        return np.asarray(wide.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    is_wide = wide.is_valid().to_numpy(zero_copy_only=False)
    is_half = halves.is_valid().to_numpy(zero_copy_only=False)
    if not (is_wide | is_half).all():
        return None
    length_R = rows["experts"].combine_chunks().value_lengths().to_numpy()
    wide_S = np.repeat(is_wide, length_R)
    values = np.empty(len(wide_S), dtype=np.float32)
    values[wide_S] = wide.flatten().to_numpy(zero_copy_only=False)
    values[~wide_S] = _from_bf16(halves.flatten())
    return values


def _from_bf16(bits: pa.Array) -> NDArray[np.float32]:
    """Sixteen-bit patterns as numbers."""
    wide = np.asarray(bits.to_numpy(zero_copy_only=False)).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def _bits(weights: pa.Array) -> NDArray[Any]:
    return np.asarray(weights.to_numpy(zero_copy_only=False), dtype=np.float32).view(np.uint32)
