"""What tests of exporters and archives share: three small runs, how to write and compare them."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from moescope.probe.interchange.exporting import ExportOptions, export_run
from moescope.probe.interchange.registry import exporter
from moescope.probe.storage import write_shard
from moescope.probe.storage.copying import RUN_TABLES
from moescope.probe.storage.ingest import Ingester
from moescope.probe.storage.run_folder import RunFolder
from moescope.probe.storage.runs import begin_run
from moescope.probe.storage.store import Store

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"exporters_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


lab = load(HERE.parent / "analysis" / "conftest.py")
synthetic = load(HERE.parent / "storage" / "synthetic.py")

ITEMS = [
    lab.Item(
        tokens=[
            lab.Token(slots={1: [(0, 0.75), (2, 0.25)], 3: [(3, 0.5), (1, 0.5)]}),
            lab.Token(
                slots={1: [(2, 0.5), (1, 0.5)], 3: [(3, 0.75), (0, 0.25)]},
                phase="generated", segment="answer",
            ),
        ],
        fields={"text": "=1+1", "key": "@key", "label": "-1", "lang": "de",
                "response": '+ok, "yes"', "outcome": "correct", "meta": {"n": -2}},
    ),
    lab.Item(
        tokens=[lab.Token(slots={1: [(2, 0.75), (0, 0.25)], 3: [(1, 0.5), (3, 0.5)]})],
        fields={"text": "plain", "label": "a=b", "lang": "en", "response": None},
    ),
]  # fmt: skip
SHAPES = [lab.Shape(layer=layer, num_experts=4, top_k=2) for layer in (1, 3)]


def record(store: Path, **changes: Any) -> Store:
    """The synthetic run `base`, ingested as a recorded one is."""
    description = synthetic.describe(3, **changes)
    with begin_run(store, "base", description) as point:
        for shard_id in point.missing:
            ids = description.planned_shards[shard_id]
            rows = synthetic.tables(ids)
            write_shard(point.folder.path, shard_id, rows, prompt_ids=ids)
        point.folder.finish()
        keep = description.routing_in == "shards"
        Ingester(store, RunFolder(point.folder.path), keep_shards=keep).run(lambda: True)
    return Store(store)


def write(store: Store, name: str, out: Path, run: str = "run", **options: Any) -> Path:
    export_run(exporter(name), store, run, out, ExportOptions(**options))
    return out


def tables(store: Store, run: str) -> dict[str, pa.Table]:
    """All rows of a run in the store, without its name, in a fixed order."""
    return {
        name: store.arrow(
            f"SELECT * EXCLUDE (run_id) FROM {name} WHERE run_id = ? ORDER BY ALL", [run]
        )
        for name in (*RUN_TABLES, "routing", "usage")
    }


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def random_run_in(path: Path) -> Store:
    """A store with the run `run`: 12 prompts with random routing that is not exact in bfloat16."""
    rng = np.random.default_rng(3)
    lengths = {("prompt", "user", False): 5, ("prompt", "template", True): 1,
               ("generated", "answer", False): 4}  # fmt: skip
    items = [lab.random_item(rng, lab.RANDOM_SHAPES, lengths, response="r") for _ in range(12)]
    return lab.write_run(path, lab.RANDOM_SHAPES, items)


def hand_run_in(path: Path) -> Store:
    """A store with the run `run` of two prompts, whose numbers the golden files hold."""
    return lab.write_run(path, SHAPES, ITEMS)
