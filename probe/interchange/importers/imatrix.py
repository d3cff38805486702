"""llama.cpp importance matrices as GGUF: how often each expert was used on the calibration text.

Every quantized MoE model on a hub has one; `.counts` [1, experts] of an expert tensor counts the
tokens that reached each expert. Gate, up and down projections of a layer must agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import one_file, read_bytes
from moescope.probe.interchange.gguf_header import check_head
from moescope.probe.interchange.imported import (
    MOST_LAYERS,
    Array,
    Imported,
    ImportedSequence,
    ImportOptions,
    LayerCounts,
)
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.report import ImportReport

_COUNTS: Final = re.compile(r"blk\.(\d{1,4})\.ffn_(gate|up|down|gate_up)_exps\.weight\.counts")


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read one imatrix file."""
    path = one_file(paths, "imatrix")
    reader = _open(path)
    kind = _value(reader, "general.type")
    if kind != "imatrix":
        raise ImportFileError(f"{path} is a GGUF file of type {kind!r}, not an imatrix")
    report = ImportReport("imatrix", "GGUF")
    report.lacks += [
        "weights", "order", "scores", "token ids", "text", "phases", "positions", "prompts",
    ]  # fmt: skip
    counts = _counts(path, reader)
    if options.layers is not None:
        raise ImportFileError("the names of the tensors say the layers; leave --layers out")
    top_k = options.top_k or _top_k(reader, counts, report)
    datasets = _value(reader, "imatrix.datasets")
    return Imported(
        report=report,
        sequences=[ImportedSequence(num_tokens=0, key=path.stem)],
        counts=[LayerCounts(layer=layer, counts=counts[layer][None]) for layer in sorted(counts)],
        top_k=top_k,
        manifest={"datasets": datasets} if datasets else {},
    )


def _open(path: Path) -> Any:
    """GGUF's own reader; its faults become sentences."""
    content = read_bytes(path)
    if content[:4] != b"GGUF":
        raise ImportFileError(f"{path} is no GGUF file; legacy .dat files have no expert counts")
    check_head(content, str(path))
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # it reads offsets from the file and trusts them
        raise ImportFileError(f"{path} is a damaged GGUF file: {error}") from error


def _value(reader: Any, name: str) -> Any:
    found = reader.fields.get(name)
    try:
        return None if found is None else found.contents()
    except Exception as error:
        raise ImportFileError(f"field {name!r} cannot be read: {error}") from error


def _counts(path: Path, reader: Any) -> dict[int, Array]:
    """Counts of each layer, the projections compared."""
    layers: dict[int, tuple[str, Array]] = {}
    for tensor in reader.tensors:
        match = _COUNTS.fullmatch(str(tensor.name))
        if match is None:
            continue
        values = np.asarray(tensor.data, dtype=np.float64).reshape(-1)
        if not np.isfinite(values).all() or (values != np.round(values)).any():
            raise ImportFileError(f"{path}: {tensor.name} holds what is no count")
        layer = int(match[1])
        if layer >= MOST_LAYERS:
            raise ImportFileError(f"{path}: {tensor.name} names layer {layer}")
        if layer in layers and not np.array_equal(layers[layer][1], values):
            raise ImportFileError(
                f"{path}: {tensor.name} and {layers[layer][0]} count different tokens"
            )
        layers.setdefault(layer, (str(tensor.name), values))
    if not layers:
        raise ImportFileError(
            f"{path} has no counts of experts (blk.N.ffn_gate_exps.weight.counts): the model has "
            "none, or the file was made before llama.cpp wrote them"
        )
    if any((values < 0).any() or values.max() > 2**53 for _, values in layers.values()):
        raise ImportFileError(f"{path}: a count is negative or too large")
    return {layer: values.astype(np.int64) for layer, (_, values) in layers.items()}


def _top_k(reader: Any, counts: dict[int, Array], report: ImportReport) -> int | None:
    """From the number of calibration tokens, each of which used k experts."""
    chunks, size = _value(reader, "imatrix.chunk_count"), _value(reader, "imatrix.chunk_size")
    if not isinstance(chunks, int) or not isinstance(size, int) or chunks * size <= 0:
        return None
    totals = {int(values.sum()) for values in counts.values()}
    total = max(totals)
    if total % (chunks * size) or not 0 < total // (chunks * size) <= 1_000:
        return None
    report.assumed.append(f"k is the number of hits by that of tokens ({chunks * size:,})")
    return total // (chunks * size)


IMPORTER: Final = Importer(
    name="imatrix",
    description="llama.cpp importance matrix of a MoE model, GGUF",
    versions=("GGUF imatrix, split or fused gate_up",),
    holds="how often each expert was used on the calibration text; nothing else",
    read=read,
)
