"""How often each expert was selected in a run, as the matrices that balancers and pruners read.

Letters: L routed decoder layers, E experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from moescope.probe.errors import InputError
from moescope.probe.interchange.run_tables import run_layers

Array = NDArray[Any]


@dataclass(frozen=True)
class Loads:
    """Tokens that selected each expert, over all prompts and phases.

    Attributes:
        layers: the L decoder layers, ascending.
        top_k: experts a token, for each of them.
        counts: int64[E] for each of them.
    """

    layers: list[int]
    top_k: list[int]
    counts: list[Array]

    def matrix(self) -> Array:
        """The counts as int64[L, E].

        Raises:
            InputError: the layers have different numbers of experts.
        """
        sizes = {len(row): layer for layer, row in zip(self.layers, self.counts, strict=True)}
        if len(sizes) > 1:
            (one, here), (other, there), *_ = sizes.items()
            raise InputError(
                f"layer {here} has {one} experts and layer {there} has {other}; this format is a "
                "matrix, with the same number in each layer"
            )
        return np.stack(self.counts)


def read_loads(con: duckdb.DuckDBPyConnection, run_id: str) -> Loads:
    """The counts of a run's routers of kind mlp; layers of other kinds have no place in a matrix.

    Raises:
        InputError: the run has no such router.
    """
    layers = run_layers(con, run_id)
    counts = {layer: np.zeros(size, np.int64) for layer, (size, _) in layers.items()}
    rows = con.execute(
        "SELECT layer, expert, sum(num_tokens)::BIGINT FROM usage "
        "WHERE run_id = ? AND kind = 'mlp' GROUP BY layer, expert",
        [run_id],
    ).fetchall()
    for layer, expert, number in rows:
        counts[layer][expert] = number
    return Loads(list(layers), [top_k for _, top_k in layers.values()], list(counts.values()))


def write_matrix(path: Path, matrix: Array) -> None:
    """Write whole numbers [L, E] as `.npy`, or as one JSON list of lists, a layer a line."""
    if path.suffix.lower() == ".npy":
        with path.open("wb") as file:
            np.save(file, matrix, allow_pickle=False)
        return
    path.write_text(f"{json_matrix(matrix)}\n", encoding="utf-8")


def json_matrix(matrix: Array) -> str:
    """The same as JSON text."""
    rows = ",\n".join(json.dumps(row) for row in matrix.tolist())
    return f"[{rows}]"
