"""What a recorded slot costs, in bytes and time, beside the ways of other tools; one run, one disk.

    python benchmarks/bench_store.py [--slots 100e6] [--data FOLDER] [--work FOLDER]

Ours: shards as a collector writes them (checksummed, synced), then the real ingester, a process of
its own, from shard files to committed rows, usage and checksums included. Beside it, of the same
routing: packed NumPy (a byte an id, float32 weights), `torch.save` of int32 ids (SGLang's recorder,
which keeps no weights), JSON lines (Megatron-Core's and others' way) and one float16 `.npy` of all
router logits a layer (SteerMoE's way). Every file is synced, and every way but ours knows neither
prompts nor tokens nor usage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pairs import machine
from real_routing import EXPERTS, LAYERS, RealRouting, Tile

from moescope.probe.analysis import expert_contrast, load_balance
from moescope.probe.storage import Store, begin_run, write_shard

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "deepseek_v2_lite_routing"
SLOW_TILES = 2
"""Ways that take minutes for a hundred million slots are measured on so many tiles."""


@dataclass(frozen=True)
class Cost:
    """What a way of keeping slots costs.

    Attributes:
        way: its name.
        slots: how many it kept.
        size_bytes: of its files.
        write_s: seconds to write them, or to ingest them.
        note: what else there is to say.
    """

    way: str
    slots: int
    size_bytes: int
    write_s: float
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.way:<42} {self.size_bytes / self.slots:6.3f} B/slot "
            f"{self.slots / self.write_s / 1e6:7.2f} M slots/s  {self.note}"
        )


def main() -> None:
    """Measure and print a line a way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=float, default=100e6)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"the recorded routing is not at {options.data}; name it with --data")
    real = RealRouting.read(options.data)
    tiles = max(1, round(options.slots / real.num_slots))
    print(f"{tiles} tiles of {real.num_slots:,} slots; {machine()}")
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for kind in ("float32", "bf16", "shipped"):
            for cost in ours(real, tiles if kind != "shipped" else SLOW_TILES, kind, Path(work)):
                print(cost, flush=True)
        for way in (packed_numpy, torch_save, json_lines, layer_npy):
            print(others(real, tiles, way, Path(work)), flush=True)


def ours(real: RealRouting, tiles: int, kind: str, work: Path) -> Iterator[Cost]:
    """Shards, store, verification and the same run at level usage."""
    store, slots = work / f"{kind}.duckdb", tiles * real.num_slots
    spent = 0.0
    with begin_run(store, "run", real.describe(tiles)) as point:
        folder = point.folder
        for tile, shard_id in zip(real.tiles(tiles, kind), point.missing, strict=True):
            tables = tile.tables
            began = time.perf_counter()
            write_shard(folder.path, shard_id, tables, prompt_ids=tile.prompt_ids.tolist())
            spent += time.perf_counter() - began
    routing = sum(file.stat().st_size for file in folder.path.rglob("routing_arrays.parquet"))
    whole = sum(file.stat().st_size for file in folder.path.rglob("*.parquet"))
    yield Cost(f"ours, {kind}: Parquet shards", slots, routing, spent,
               f"all tables {whole / slots:.3f} B/slot")  # fmt: skip
    seconds, peak = ingest(store, folder.path, "--keep-shards")
    yield Cost(f"ours, {kind}: shards to committed rows", slots, store.stat().st_size, seconds,
               f"all tables, peak memory {peak / 1e9:.2f} GB")  # fmt: skip
    folder.finish()
    seconds, peak = ingest(store, folder.path)
    yield Cost(f"ours, {kind}: verified and complete", slots, store.stat().st_size, seconds,
               f"peak memory {peak / 1e9:.2f} GB")  # fmt: skip
    if kind == "float32":
        yield usage_level(real, tiles, store, work)
    store.unlink()


def ingest(store: Path, folder: Path, *options: str) -> tuple[float, int]:
    """Run the ingester; seconds and the most memory that it had, in bytes."""
    began = time.perf_counter()
    module = "moescope.probe.storage.ingest"
    process = subprocess.Popen([sys.executable, "-m", module, str(store), str(folder), *options])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the ingester failed")
    return time.perf_counter() - began, used.ru_maxrss * 1024


def usage_level(real: RealRouting, tiles: int, topk: Path, work: Path) -> Cost:
    """The same run without slots; load and contrast must come out the same."""
    store = work / "usage.duckdb"
    began = time.perf_counter()
    with begin_run(store, "run", real.describe(tiles, level="usage")) as point:
        for tile, shard_id in zip(real.tiles(tiles, "float32"), point.missing, strict=True):
            tables = {name: rows for name, rows in tile.tables.items() if name != "routing_arrays"}
            write_shard(point.folder.path, shard_id, tables, prompt_ids=tile.prompt_ids.tolist())
        point.folder.finish()
    ingest(store, point.folder.path)
    seconds = time.perf_counter() - began
    for analyse in (load_table, contrast_table):
        if not analyse(Store(store)).equals(analyse(Store(topk))):
            raise SystemExit(f"{analyse.__name__} differs between level usage and level topk")
    share = store.stat().st_size / topk.stat().st_size
    size = store.stat().st_size
    store.unlink()
    return Cost("ours, the same run at level usage", tiles * real.num_slots, size, seconds,
                f"{share:.1%} of the bytes at level topk; same load and contrast")  # fmt: skip


def load_table(store: Store) -> object:
    """The load of every expert."""
    return load_balance(store, "run", by="domain").frame


def contrast_table(store: Store) -> object:
    """The contrast of two halves of the sequences."""
    return expert_contrast(
        store, "run", a={"domain": ["a"]}, b={"domain": ["b"]}, bootstrap=20
    ).frame


def others(real: RealRouting, tiles: int, way: Callable[[Tile, Path], str], work: Path) -> Cost:
    """What another way costs: one folder a tile."""
    folder = work / way.__name__
    tiles = min(tiles, SLOW_TILES if way in (json_lines, layer_npy) else tiles)
    spent = 0.0
    for tile in real.tiles(tiles, "float32"):
        place = folder / str(tile.number)
        place.mkdir(parents=True)
        began = time.perf_counter()
        name = way(tile, place)
        for file in place.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        spent += time.perf_counter() - began
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return Cost(name, tiles * real.num_slots, size, spent)


def packed_numpy(tile: Tile, folder: Path) -> str:
    """A byte an id, four a weight."""
    np.save(folder / "ids.npy", tile.experts.astype(np.uint8))
    np.save(folder / "weights.npy", tile.weights)
    return "packed NumPy (uint8 ids, float32 weights)"


def torch_save(tile: Tile, folder: Path) -> str:
    """As SGLang's recorder: int32 ids of all layers."""
    ids = torch.from_numpy(tile.experts.astype(np.int32)).transpose(0, 1).contiguous()
    torch.save({"topk_ids_of_layer": ids}, folder / "records.pt")
    return "torch.save of int32 ids (no weights)"


def json_lines(tile: Tile, folder: Path) -> str:
    """A line a token and layer, ids and weights."""
    with (folder / "trace.jsonl").open("w") as file:
        for token, (ids, weights) in enumerate(zip(tile.experts, tile.weights, strict=True)):
            for layer, row, values in zip(LAYERS, ids.tolist(), weights.tolist(), strict=True):
                line = {"token": token, "layer": layer, "experts": row, "weights": values}
                file.write(json.dumps(line) + "\n")
    return f"JSON lines ({SLOW_TILES} tiles)"


def layer_npy(tile: Tile, folder: Path) -> str:
    """As SteerMoE: all logits of a layer as float16; their values do not matter here."""
    logits = np.zeros((len(tile.experts), EXPERTS), np.float16)
    for layer in LAYERS:
        np.save(folder / f"layer_{layer}.npy", logits)
    return f"float16 logits, one .npy a layer ({SLOW_TILES} tiles)"


if __name__ == "__main__":
    main()
