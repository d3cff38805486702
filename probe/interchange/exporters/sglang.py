"""SGLang: the counts from which its `--init-expert-location` places experts.

`{"logical_count": [layers, experts]}` in `.json`, or in `.pt` as `torch.save` writes it; the layers
are all hidden layers of the model, those without a router in rows of zeros. Source: SGLang 0.5.23,
`srt/eplb/expert_location.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from moescope.probe.errors import InputError
from moescope.probe.interchange.exporting import ExportOptions
from moescope.probe.interchange.loads import Array, json_matrix, read_loads
from moescope.probe.interchange.registry import Exporter
from moescope.probe.storage.store import Store


def write(store: Store, run_id: str, out: Path, options: ExportOptions) -> None:
    """Write the counts; without `num_layers`, the last routed layer is the model's last.

    Raises:
        InputError: layers differ in their experts, or `num_layers` is too small.
    """
    with store.connection() as con:
        loads = read_loads(con, run_id)
    counts = _all_layers(loads.layers, loads.matrix(), options.num_layers)
    if out.suffix.lower() == ".pt":
        import torch

        torch.save({"logical_count": torch.from_numpy(counts)}, out)
        return
    out.write_text(f'{{"logical_count": {json_matrix(counts)}}}\n', encoding="utf-8")


def _all_layers(layers: list[int], matrix: Array, num_layers: int | None) -> Array:
    fewest = layers[-1] + 1
    if num_layers is not None and num_layers < fewest:
        raise InputError(
            f"decoder layer {layers[-1]} is routed, so the model has at least {fewest} layers, "
            f"not {num_layers}"
        )
    counts = np.zeros((num_layers or fewest, matrix.shape[1]), np.int64)
    counts[layers] = matrix
    return counts


EXPORTER: Final = Exporter(
    name="sglang",
    description="counts by layer and expert, for --init-expert-location",
    versions=("SGLang 0.5.23",),
    needs="usage, and the same number of experts in each layer",
    write=write,
    suffixes=(".json", ".pt"),
    takes=("num_layers",),
)
