"""DeepSeek EPLB: the matrix `weight` that its `rebalance_experts` takes, [layers, experts].

Only routed layers, in the order of the model. Source: deepseek-ai/EPLB, `eplb.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from moescope.probe.interchange.exporting import ExportOptions
from moescope.probe.interchange.loads import read_loads, write_matrix
from moescope.probe.interchange.registry import Exporter
from moescope.probe.storage.store import Store


def write(store: Store, run_id: str, out: Path, options: ExportOptions) -> None:
    """Write the matrix as `.npy` (int64) or as a JSON list of lists.

    Raises:
        InputError: layers differ in their experts.
    """
    with store.connection() as con:
        matrix = read_loads(con, run_id).matrix()
    write_matrix(out, matrix)


EXPORTER: Final = Exporter(
    name="eplb",
    description="counts by routed layer and expert, as rebalance_experts takes them",
    versions=("deepseek-ai/EPLB, 2025",),
    needs="usage, and the same number of experts in each layer",
    write=write,
    suffixes=(".json", ".npy"),
)
