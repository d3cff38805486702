"""Runs made of numbers instead of a model: the rows of any planned prompt are known beforehand.

Loaded by tests through the fixture `synthetic`; as a script it is a collector that writes a whole
run beside a real ingester, for tests that kill it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from moescope.probe.storage import (
    SHARD_TABLES,
    RunDescription,
    begin_run,
    shard_name,
    start_ingester,
    write_shard,
)
from moescope.probe.storage.slots import arrays_of_slots

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 6, 2
PROMPT_TOKENS, GENERATED_TOKENS = 4, 3
AWKWARD_TEXT = "naïve \u0000 '; DROP TABLE runs; -- 𝔐 \u202eعربي\n"


def describe(num_shards: int, prompts_per_shard: int = 2, **changes: Any) -> RunDescription:
    """A run of so many shards; later shards hold lower prompt ids, as batches by length do."""
    total = num_shards * prompts_per_shard
    ids = list(reversed(range(total)))
    planned = {
        shard_name(i): ids[i * prompts_per_shard : (i + 1) * prompts_per_shard]
        for i in range(num_shards)
    }
    return RunDescription(
        **{
            "model": "synthetic",
            "revision": None,
            "family": "none",
            "record_level": "topk",
            "layers": [layer_row(layer) for layer in range(NUM_LAYERS)],
            "manifest": {"versions": {"python": sys.version.split()[0]}, "seed": 0},
            "identity": {"model": "synthetic", "arguments": {"limit": total}, "seed": 0},
            "planned_shards": planned,
            **changes,
        }
    )


def layer_row(layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "kind": "mlp",
        "moe_layer": layer,
        "module": f"model.layers.{layer}.mlp.gate",
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "num_shared_experts": 0,
        "rule": {"score": "softmax", "top_k": TOP_K},
    }


def tables(prompt_ids: Sequence[int]) -> dict[str, pa.Table]:
    """All rows of these prompts, consistent with each other."""
    slots_of_all: list[dict[str, Any]] = []
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SHARD_TABLES}
    for prompt_id in prompt_ids:
        rows["prompts"].append(prompt_row(prompt_id))
        rows["tokens"] += [token_row(prompt_id, position) for position in range(_LENGTH)]
        for layer in range(NUM_LAYERS):
            slots = [
                slot_row(prompt_id, position, layer, rank)
                for position in range(_LENGTH - 1)  # the last generated token is not routed
                for rank in range(TOP_K)
            ]
            slots_of_all += slots
            rows["usage_arrays"] += usage_rows(prompt_id, layer, slots)
    made = {
        name: pa.Table.from_pylist(rows[name], schema=SHARD_TABLES[name]) for name in SHARD_TABLES
    }
    return {**made, "routing_arrays": arrays_of_slots(pa.Table.from_pylist(slots_of_all))}


_LENGTH = PROMPT_TOKENS + GENERATED_TOKENS


def prompt_row(prompt_id: int) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "key": f"q{prompt_id}" if prompt_id % 3 else None,
        "text": f"{AWKWARD_TEXT} {prompt_id}",
        "rendered_text": f"<user>{AWKWARD_TEXT} {prompt_id}</user>",
        "set_name": "synthetic",
        "label": ("a", "b")[prompt_id % 2],
        "lang": None,
        "domain": None,
        "pair_id": None,
        "target": None,
        "span": None,
        "expected": "42",
        "num_tokens": PROMPT_TOKENS,
        "num_generated": GENERATED_TOKENS,
        "response": "42",
        "outcome": "correct",
        "detector": "exact",
        "meta": '{"n": [1, null]}',
    }


def token_row(prompt_id: int, position: int) -> dict[str, Any]:
    is_prompt = position < PROMPT_TOKENS
    return {
        "prompt_id": prompt_id,
        "position": position,
        "token_id": 100 * prompt_id + position,
        "token": AWKWARD_TEXT[position],
        "phase": "prompt" if is_prompt else "generated",
        "segment": "user" if is_prompt else "answer",
        "is_special": position == 0,
        "in_span": position == 1,
        "is_routed": position < _LENGTH - 1,
    }


def slot_row(prompt_id: int, position: int, layer: int, rank: int) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "position": position,
        "layer": layer,
        "kind": "mlp",
        "rank": rank,
        "expert": (prompt_id + 2 * position + layer + rank) % NUM_EXPERTS,
        "weight": (0.625, 0.375)[rank],
    }


def usage_rows(prompt_id: int, layer: int, slots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for slot in slots:
        token = token_row(prompt_id, slot["position"])
        key = (token["phase"], token["segment"], token["is_special"])
        groups.setdefault(key, []).append(slot)
    rows = []
    for (phase, segment, is_special), members in groups.items():
        counts = [0] * NUM_EXPERTS
        weights = [0.0] * NUM_EXPERTS
        for slot in members:
            counts[slot["expert"]] += 1
            weights[slot["expert"]] += slot["weight"]
        rows.append(
            {
                "prompt_id": prompt_id,
                "phase": phase,
                "segment": segment,
                "is_special": is_special,
                "layer": layer,
                "kind": "mlp",
                "routed_tokens": len(members) // TOP_K,
                "num_tokens": counts,
                "weight_sum": weights,
                "prob_sum": [len(members) / TOP_K / NUM_EXPERTS] * NUM_EXPERTS,
            }
        )
    return rows


def write_all(folder: Path, description: RunDescription, shard_ids: Sequence[str]) -> None:
    """Write these planned shards."""
    for shard_id in shard_ids:
        ids = description.planned_shards[shard_id]
        write_shard(folder, shard_id, tables(ids), prompt_ids=ids)


def collect(
    store: Path, run: str, description: RunDescription, *, pause_s: float = 0.0, **options: Any
) -> list[str]:
    """Record the run, or go on with it; returns the shards that were still to be written."""
    with begin_run(store, run, description) as point:
        if point.is_complete:
            return []
        with start_ingester(store, point.folder, **options) as ingester:
            sys.stdout.write(f"ingester {ingester.process.pid}\n")
            sys.stdout.flush()
            for shard_id in point.missing:
                ingester.check()
                write_all(point.folder.path, description, [shard_id])
                time.sleep(pause_s)
            point.folder.finish()
        return list(point.missing)


def by_hand(store: Path, folder: Path, *options: str) -> list[str]:
    """The command that ingests what lies in a folder."""
    module = "moescope.probe.storage.ingest"
    return [sys.executable, "-m", module, str(store), str(folder), *options]


def written(store: Path, num_shards: int) -> Path:
    """A run folder in which all is written and nothing ingested."""
    description = describe(num_shards)
    with begin_run(store, "base", description) as point:
        write_all(point.folder.path, description, point.missing)
        point.folder.finish()
        return Path(point.folder.path)


def wait_until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("run")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--prompts-per-shard", type=int, default=2)
    parser.add_argument("--pause-s", type=float, default=0.0)
    options = parser.parse_args()
    description = describe(options.shards, options.prompts_per_shard)
    collect(options.store, options.run, description, pause_s=options.pause_s)


if __name__ == "__main__":
    main()
