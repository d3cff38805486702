"""What analyses of a hundred million slots take: time, peak memory, and the ratio to plain NumPy.

    python benchmarks/bench_analyses.py [--store FILE] [--data FOLDER] [--only NAME]

The store has the shape of DeepSeek-V2-Lite (26 layers, 64 experts, top-6), made once of its real
routing. Every analysis runs in a process of its own, from opening the store to the finished table,
intervals and chance levels included. Beside it, where there is one, the bare number in NumPy on the
same routing as arrays that lie in memory already: no store, no filters, no intervals.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_store import DATA, ingest
from numpy.typing import NDArray
from pairs import machine
from real_routing import EXPERTS, LAYERS, TOP_K, RealRouting

from moescope.probe.analysis import Filters, find_analysis
from moescope.probe.storage import Store, begin_run, write_shard

SLOTS = 100e6
GIGABYTE = 1e9
MOST_MEMORY_GB = 4.0


@dataclass(frozen=True)
class Case:
    """One analysis, asked as the command line asks.

    Attributes:
        analysis: its name.
        typed: its parameters.
        goal_s: seconds it should take at most, or None.
        numpy: what computes the bare number from arrays, or None.
    """

    analysis: str
    typed: dict[str, Any]
    goal_s: float | None
    numpy: Callable[[Arrays], object] | None = None


@dataclass(frozen=True)
class Arrays:
    """The same routing in memory.

    Attributes:
        experts: uint16[T, L, K], by rank.
        prompts: int32[T].
        tokens: int64[T], ids.
        domain: int8[P], the half that a prompt is in.
    """

    experts: NDArray[np.uint16]
    prompts: NDArray[np.int32]
    tokens: NDArray[np.int64]
    domain: NDArray[np.int8]


def load(arrays: Arrays) -> object:
    """Slots of every expert."""
    return [
        np.bincount(arrays.experts[:, layer].ravel(), minlength=EXPERTS)
        for layer in range(len(LAYERS))
    ]


def by_domain(arrays: Arrays) -> object:
    """Slots of every expert in each domain."""
    domain_T = arrays.domain[arrays.prompts].astype(np.int64)
    return [
        np.bincount(
            (domain_T[:, None] * EXPERTS + arrays.experts[:, layer]).ravel(), minlength=2 * EXPERTS
        )
        for layer in range(len(LAYERS))
    ]


def coactivation(arrays: Arrays) -> object:
    """Tokens that selected each pair."""
    found = []
    for layer in range(len(LAYERS)):
        experts = arrays.experts[:, layer].astype(np.int64)
        pairs = np.zeros(EXPERTS * EXPERTS, dtype=np.int64)
        for i in range(TOP_K):
            for j in range(i + 1, TOP_K):
                pairs += np.bincount(
                    experts[:, i] * EXPERTS + experts[:, j], minlength=EXPERTS * EXPERTS
                )
        square = pairs.reshape(EXPERTS, EXPERTS)
        found.append(square + square.T)
    return found


def transitions(slots: int) -> Callable[[Arrays], object]:
    """Pairs of experts in consecutive layers, of the first so many ranks."""

    def count(arrays: Arrays) -> object:
        found = []
        for layer in range(len(LAYERS) - 1):
            first = arrays.experts[:, layer, :slots].astype(np.int64)
            second = arrays.experts[:, layer + 1, :slots]
            codes = (first[:, :, None] * EXPERTS + second[:, None, :]).ravel()
            found.append(np.bincount(codes, minlength=EXPERTS * EXPERTS))
        return found

    return count


def vocabulary(arrays: Arrays) -> object:
    """Largest share of each token id that goes to one expert, mean over ids."""
    ids, code_T = np.unique(arrays.tokens, return_inverse=True)
    totals = np.bincount(code_T)
    found = []
    for layer in range(len(LAYERS)):
        codes = (code_T[:, None] * EXPERTS + arrays.experts[:, layer]).ravel()
        counts = np.bincount(codes, minlength=len(ids) * EXPERTS).reshape(-1, EXPERTS)
        found.append((counts.max(axis=1) / totals).mean())
    return found


CONTRAST = {"a": ["domain=a"], "b": ["domain=b"], "bootstrap": "1000"}
CASES = (
    Case("load", {}, 0.5, load),
    Case("balance", {"by": "domain"}, 0.5, by_domain),
    Case("specialization", {"by": "domain", "bootstrap": "0"}, 0.5, by_domain),
    Case("coactivation", {}, 10, coactivation),
    Case("partners", {}, 10, coactivation),
    Case("transitions", {"slots": "top1"}, 10, transitions(1)),
    Case("transitions", {"slots": "topk"}, 10, transitions(TOP_K)),
    Case("transition-strength", {}, 10, transitions(1)),
    Case("vocabulary", {}, 10, vocabulary),
    Case("expert-tokens", {}, 10, vocabulary),
    Case("information", {"factor": "domain"}, None, by_domain),
    Case("information", {"factor": "token"}, None, vocabulary),
    Case("contrast", CONTRAST, 20, by_domain),
    Case("contrast", {**CONTRAST, "split": "no"}, 20, by_domain),
    Case("contrast", {**CONTRAST, "method": "safex"}, 20, by_domain),
)


def main() -> None:
    """Measure and print a line a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, default=Path("out/slots-100m.duckdb"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", default="", help="analyses whose name begins so")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=("ours", "numpy"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        measure(CASES[options.case], options.way, options.store)
        return
    build(options.store, options.data)
    print(f"{SLOTS / 1e6:.0f} M slots in {options.store}; {machine()}")
    print(f"{'analysis':<44} {'seconds':>8} {'goal':>6} {'peak GB':>8} {'NumPy s':>8} {'ratio':>7}")
    for number, case in enumerate(CASES):
        if case.analysis.startswith(options.only):
            print(line(number, case, options.store), flush=True)


def line(number: int, case: Case, store: Path) -> str:
    """What one case took."""
    ours = in_process(number, "ours", store)
    values = " ".join(f"{name}={value}" for name, value in case.typed.items() if name not in "ab")
    text = f"{case.analysis} {values}"[:44]
    goal = "" if case.goal_s is None else f"{case.goal_s:.1f}"
    row = f"{text:<44} {ours['seconds']:8.2f} {goal:>6} {ours['peak_gb']:8.2f}"
    if case.numpy is not None:
        plain = in_process(number, "numpy", store)["seconds"]
        row += f" {plain:8.2f} {ours['seconds'] / plain:7.2f}"
    too_slow = case.goal_s is not None and ours["seconds"] > case.goal_s
    missed = too_slow or ours["peak_gb"] > MOST_MEMORY_GB
    return row + ("  above the goal" if missed else "")


def in_process(number: int, way: str, store: Path) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--store", str(store), "--case", str(number), "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} of case {number} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(case: Case, way: str, store: Path) -> None:
    """Run one way of a case; print seconds and peak memory."""
    if way == "numpy":
        assert case.numpy is not None
        arrays = read_arrays(store)
        began = time.perf_counter()
        case.numpy(arrays)
    else:
        analysis = find_analysis(case.analysis)
        arguments = analysis.parse(case.typed)
        began = time.perf_counter()
        analysis.function(Store(store), "run", filters=Filters(), **arguments)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGABYTE
    print(json.dumps({"seconds": seconds, "peak_gb": peak}))


def build(store: Path, data: Path) -> None:
    """Make the store and its arrays, unless they are there."""
    if store.is_file() and arrays_of(store).is_dir():
        return
    if not data.is_dir():
        raise SystemExit(f"the recorded routing is not at {data}; name it with --data")
    real = RealRouting.read(data)
    tiles = round(SLOTS / real.num_slots)
    store.parent.mkdir(parents=True, exist_ok=True)
    if not store.is_file():
        with begin_run(store, "run", real.describe(tiles)) as point:
            for tile, shard in zip(real.tiles(tiles, "float32"), point.missing, strict=True):
                ids = tile.prompt_ids.tolist()
                write_shard(point.folder.path, shard, tile.tables, prompt_ids=ids)
            point.folder.finish()
        ingest(store, point.folder.path)
    folder = arrays_of(store)
    folder.mkdir()
    made = list(real.tiles(tiles, "float32"))
    lengths = np.concatenate([tile.lengths for tile in made])
    np.save(folder / "experts.npy", np.concatenate([tile.experts for tile in made]))
    np.save(folder / "prompts.npy", np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
    rows = Store(store).arrow("SELECT token_id FROM tokens ORDER BY prompt_id, position")
    np.save(folder / "tokens.npy", rows["token_id"].to_numpy().astype(np.int64))
    domain = Store(store).arrow("SELECT domain = 'b' AS half FROM prompts ORDER BY prompt_id")
    np.save(folder / "domain.npy", domain["half"].to_numpy().astype(np.int8))


def arrays_of(store: Path) -> Path:
    """Where the arrays of a store lie."""
    return store.with_suffix(".arrays")


def read_arrays(store: Path) -> Arrays:
    """The arrays, read into memory."""
    folder = arrays_of(store)
    names = ("experts", "prompts", "tokens", "domain")
    return Arrays(**{name: np.load(folder / f"{name}.npy") for name in names})


if __name__ == "__main__":
    main()
