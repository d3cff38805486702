"""How fast what others recorded goes into a store: from files to committed, verified rows.

    python benchmarks/bench_import.py [--data FOLDER]

The routing is that of DeepSeek-V2-Lite (26 layers, 64 experts, top-6), written in each format; a
small share of it in formats of text.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_store import DATA
from pairs import machine
from real_routing import EXPERTS, LAYERS, TOP_K, RealRouting, Tile

from moescope.probe.interchange.assemble import assemble
from moescope.probe.interchange.files import digest
from moescope.probe.interchange.imported import ImportOptions
from moescope.probe.interchange.into_store import store_import
from moescope.probe.interchange.registry import importer

Write = Callable[[Tile, Path], list[Path]]
TEXT_TOKENS = 2_000
TILES = 5


def main() -> None:
    """Measure and print a line a format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", default="", help="formats whose name begins so")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"the recorded routing is not at {options.data}; name it with --data")
    tile = tiled(RealRouting.read(options.data))
    print(machine())
    for name, (write, chosen) in FORMATS.items():
        if not name.startswith(options.only):
            continue
        with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder:
            files = write(tile, Path(made))
            size = sum(file.stat().st_size for file in Path(made).rglob("*.*"))
            began = time.perf_counter()
            imported = importer(name.split(",")[0]).read(files, chosen)
            assembled = assemble(imported, chosen, digest(files))
            read = time.perf_counter() - began
            store_import(assembled, Path(folder) / "s.duckdb", "run")
            seconds = time.perf_counter() - began
            slots = imported.report.found.get("slots") or assembled_slots(imported)
            speeds = [f"{slots / taken / 1e6:6.2f} M slots/s" for taken in (read, seconds)]
            print(
                f"{name:<24} {slots:>10,} slots {size / 1e6:7.1f} MB  read and checked "
                f"{speeds[0]}, stored and verified {speeds[1]}",
                flush=True,
            )


def tiled(real: RealRouting) -> Tile:
    """Some copies one after the other, so that starting a process does not decide."""
    tiles = list(real.tiles(TILES, "float32"))
    return Tile(
        0,
        np.concatenate([tile.lengths for tile in tiles]),
        np.concatenate([tile.experts for tile in tiles]),
        np.concatenate([tile.weights for tile in tiles]),
    )


def assembled_slots(imported: Any) -> int:
    """Slots of an import that has not counted them."""
    return sum(int((slots.experts >= 0).sum()) for slots in imported.slots)


def vllm(tile: Tile, folder: Path) -> list[Path]:
    """VLLM 0.33: a reply a sequence."""
    lines = []
    for part in np.split(tile.experts, np.cumsum(tile.lengths)[:-1]):
        buffer = io.BytesIO()
        np.save(buffer, part.astype(np.uint8))
        text = base64.b64encode(buffer.getvalue()).decode()
        lines.append(json.dumps({"choices": [{"routed_experts": text}]}))
    (folder / "replies.jsonl").write_text("\n".join(lines))
    return [folder / "replies.jsonl"]


def sglang_reply(tile: Tile, folder: Path) -> list[Path]:
    """SGLang: a reply a sequence."""
    lines = []
    for part in np.split(tile.experts, np.cumsum(tile.lengths)[:-1]):
        text = base64.b64encode(part.astype("<i4").tobytes()).decode()
        lines.append(json.dumps({"meta_info": {"routed_experts": text}}))
    (folder / "replies.jsonl").write_text("\n".join(lines))
    return [folder / "replies.jsonl"]


def sglang(tile: Tile, folder: Path) -> list[Path]:
    """SGLang's recorder, per token: an extend pass a sequence."""
    records = []
    start = 0
    for number, length in enumerate(tile.lengths.tolist()):
        part = tile.experts[start : start + length].astype(np.int32)
        ids = np.full((len(LAYERS), length, 8), -1, np.int32)
        ids[:, :, :TOP_K] = part.transpose(1, 0, 2)
        records.append({
            "forward_pass_id": number, "rank": 0, "input_ids": list(range(length)),
            "positions": list(range(length)), "extend_seq_lens": [length], "forward_mode": 1,
            "topk_ids_of_layer": torch.from_numpy(ids),
        })  # fmt: skip
        start += length
    to_logical = torch.arange(EXPERTS, dtype=torch.int32).repeat(len(LAYERS), 1)
    torch.save({"records": records, "last_physical_to_logical_map": to_logical}, folder / "t_0.pt")
    return [folder / "t_0.pt"]


def rows(tile: Tile) -> dict[str, Any]:
    """One row a slot, in columns."""
    tokens, layers, top_k = tile.experts.shape
    sequence = np.repeat(np.arange(len(tile.lengths)), tile.lengths)
    position = np.concatenate([np.arange(length) for length in tile.lengths])
    return {
        "sequence": np.repeat(sequence, layers * top_k),
        "position": np.repeat(position, layers * top_k),
        "layer": np.tile(np.repeat(np.array(LAYERS), top_k), tokens),
        "rank": np.tile(np.arange(top_k), tokens * layers),
        "expert": tile.experts.reshape(-1),
        "weight": tile.weights.reshape(-1),
    }


def parquet(tile: Tile, folder: Path) -> list[Path]:
    """Any table of slots."""
    pq.write_table(pa.table(rows(tile)), folder / "slots.parquet")
    return [folder / "slots.parquet"]


def logits(tile: Tile, folder: Path) -> list[Path]:
    """Router logits as .npz."""
    rng = np.random.default_rng(0)
    shape = (len(tile.experts), EXPERTS)
    arrays = {f"layer_{n}": rng.standard_normal(shape).astype(np.float16) for n in LAYERS}
    np.savez(folder / "logits.npz", **arrays)
    return [folder / "logits.npz"]


def steermoe(tile: Tile, folder: Path) -> list[Path]:
    """SteerMoE: pickled logits, a row a sequence."""
    rng = np.random.default_rng(0)
    shapes = [(len(LAYERS), int(length), EXPERTS) for length in tile.lengths]
    with pd.option_context("future.infer_string", False):  # as pandas 2 pickled
        frame = pd.DataFrame(
            {"router_logits": [rng.standard_normal(shape).astype(np.float16) for shape in shapes]}
        )
        frame.columns = pd.Index(["router_logits"], dtype=object)
    frame.to_pickle(folder / "output_m.pkl")
    return [folder / "output_m.pkl"]


def esft(tile: Tile, folder: Path) -> list[Path]:
    """ESFT: a file a layer."""
    part = part_of(tile)
    for index, layer in enumerate(LAYERS):
        halves = (part.experts[:, index], part.weights[:, index])
        line = "\t\t".join("\t".join(map(str, half.reshape(-1).tolist())) for half in halves)
        (folder / f"expert_weights_{layer}.txt").write_text(line + "\n")
    return [folder]


def part_of(tile: Tile) -> Tile:
    """One sequence of some tokens, for formats of text."""
    number = min(TEXT_TOKENS, len(tile.experts))
    return Tile(0, np.array([number]), tile.experts[:number], tile.weights[:number])


def csv(tile: Tile, folder: Path) -> list[Path]:
    """The table as CSV."""
    from pyarrow import csv as pa_csv

    pa_csv.write_csv(pa.table(rows(part_of(tile))), folder / "slots.csv")
    return [folder / "slots.csv"]


def megatron(tile: Tile, folder: Path) -> list[Path]:
    """Megatron-Core: a line a layer."""
    part = part_of(tile)
    lines = [
        {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0,
         "num_tokens": len(part.experts), "topk": TOP_K,
         "top_indices": part.experts[:, index].tolist()}
        for index, layer in enumerate(LAYERS)
    ]  # fmt: skip
    (folder / "router_trace_rank0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [folder / "router_trace_rank0.jsonl"]


def atlas(tile: Tile, folder: Path) -> list[Path]:
    """MoE Atlas: an object a slot."""
    part = part_of(tile)
    activations = [
        {
            "layer": layer,
            "token_idx": token,
            "expert_idx": int(expert),
            "gate_weight": float(value),
        }
        for token, (ids, weights) in enumerate(zip(part.experts, part.weights, strict=True))
        for layer in range(len(LAYERS))
        for expert, value in zip(ids[layer], weights[layer], strict=True)
    ]
    line = {
        "model_id": "m", "num_layers": len(LAYERS), "num_experts": EXPERTS, "top_k": TOP_K,
        "text": "", "token_strs": ["t"] * len(part.experts), "activations": activations,
    }  # fmt: skip
    (folder / "atlas.jsonl").write_text(json.dumps(line))
    return [folder / "atlas.jsonl"]


KNOWN = ImportOptions(num_experts=EXPERTS, top_k=TOP_K, layers=tuple(LAYERS))
OWN_LAYERS = ImportOptions(num_experts=EXPERTS, top_k=TOP_K)
FORMATS: dict[str, tuple[Write, ImportOptions]] = {
    "vllm, 0.33 npy": (vllm, KNOWN),
    "sglang-reply, int32": (sglang_reply, KNOWN),
    "sglang, per_token": (sglang, KNOWN),
    "table, Parquet": (parquet, OWN_LAYERS),
    "router-logits, npz": (logits, KNOWN),
    "steermoe, pickle": (steermoe, KNOWN),
    "esft, text": (esft, OWN_LAYERS),
    "table, CSV (text)": (csv, OWN_LAYERS),
    "megatron, JSON (text)": (megatron, OWN_LAYERS),
    "atlas, JSON (text)": (atlas, OWN_LAYERS),
}

if __name__ == "__main__":
    main()
