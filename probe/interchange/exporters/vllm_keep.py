"""vllm-ascend keep-lists: which experts of each layer stay, best first.

One line of JSON, decoder layer -> ids by decreasing number of tokens, ties to the lowest id.
Source: vllm-ascend, pull request 12525.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np

from moescope.probe.errors import InputError
from moescope.probe.interchange.exporting import ExportOptions
from moescope.probe.interchange.loads import read_loads
from moescope.probe.interchange.registry import Exporter
from moescope.probe.storage.store import Store


def write(store: Store, run_id: str, out: Path, options: ExportOptions) -> None:
    """Write the `keep` most selected experts of each layer; all of them without it.

    Raises:
        InputError: `keep` is more than a layer has, or fewer than a token selects.
    """
    with store.connection() as con:
        loads = read_loads(con, run_id)
    ranked = {}
    for layer, top_k, counts in zip(loads.layers, loads.top_k, loads.counts, strict=True):
        keep = len(counts) if options.keep is None else options.keep
        if not top_k <= keep <= len(counts):
            raise InputError(
                f"layer {layer} has {len(counts)} experts and a token selects {top_k}; "
                f"--keep must be {top_k} to {len(counts)}, not {keep}"
            )
        ranked[str(layer)] = np.argsort(-counts, kind="stable")[:keep].tolist()
    out.write_text(json.dumps(ranked, separators=(",", ":")) + "\n", encoding="utf-8")


EXPORTER: Final = Exporter(
    name="vllm-keep",
    description="experts of each layer by their load, one line of JSON",
    versions=("vllm-ascend, pull request 12525",),
    needs="usage",
    write=write,
    suffixes=(".jsonl", ".json"),
    takes=("keep",),
)
