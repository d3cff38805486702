"""ESFT (expert-specialized fine-tuning): the routing behind its published expert configurations.

A folder holds `expert_weights_N.txt` for every routed layer N: one line per sequence, the expert
ids of all its tokens, an empty column, then their weights. Source: deepseek-ai/ESFT. The slots of a
token are not in order; the largest weight is first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import read_text
from moescope.probe.interchange.imported import (
    Array,
    Imported,
    ImportedSequence,
    ImportOptions,
    LayerSlots,
)
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.report import ImportReport

_FILE: Final = re.compile(r"expert_weights_(\d{1,4})\.txt")
TOP_K: Final = 6
"""Of DeepSeek-V2-Lite, which the published files are of; `--top-k` says otherwise."""


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read folders, each a task: its name becomes the `domain` of its sequences."""
    report = ImportReport("esft", "text files, one a layer")
    report.lacks += ["order", "scores", "token ids", "text", "phases"]
    top_k = options.top_k or TOP_K
    if options.top_k is None:
        report.assumed.append(f"{TOP_K} experts a token, as in DeepSeek-V2-Lite (see --top-k)")
    tasks = [_read_task(path, top_k) for path in paths]
    numbers = sorted(tasks[0][1])
    for path, (_, files) in zip(paths, tasks, strict=True):
        if sorted(files) != numbers:
            raise ImportFileError(f"{path} has files of other layers than {paths[0]}")
    if options.layers is not None and list(options.layers) != numbers:
        raise ImportFileError("the names of the files say the layers; leave --layers out")
    sequences = [
        ImportedSequence(
            num_tokens=length, key=f"{path.name}-{index}", fields={"domain": path.name}
        )
        for path, (lengths, _) in zip(paths, tasks, strict=True)
        for index, length in enumerate(lengths)
    ]
    slots = []
    for number in numbers:
        parts = [files[number] for _, files in tasks]
        slots.append(
            LayerSlots(
                layer=number,
                experts=np.concatenate([ids for ids, _ in parts]),
                weights=np.concatenate([weights for _, weights in parts]),
                num_experts=options.num_experts,
            )
        )
    report.found["tasks"] = ", ".join(path.name for path in paths)
    return Imported(report=report, sequences=sequences, slots=slots)


def _read_task(folder: Path, top_k: int) -> tuple[list[int], dict[int, tuple[Array, Array]]]:
    """Lengths of the sequences, and ids and weights [T, K] by layer."""
    if not folder.is_dir():
        raise ImportFileError(f"{folder} is no folder; name one with expert_weights_N.txt in it")
    names = {
        match: file for file in sorted(folder.iterdir()) if (match := _FILE.fullmatch(file.name))
    }
    if not names:
        raise ImportFileError(f"{folder} has no expert_weights_N.txt")
    lengths: list[int] | None = None
    layers = {}
    for match, file in names.items():
        found, ids, weights = _read_layer(file, top_k)
        if lengths is not None and found != lengths:
            raise ImportFileError(
                f"{file} has {len(found)} sequences of {sum(found)} tokens in all, the files "
                f"before it {len(lengths)} of {sum(lengths)}"
            )
        lengths = found
        layers[int(match[1])] = (ids, weights)
    assert lengths is not None
    return lengths, layers


def _read_layer(file: Path, top_k: int) -> tuple[list[int], Array, Array]:
    lengths, ids, weights = [], [], []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        place = f"{file}, line {number}"
        halves = line.rstrip("\t").split("\t\t")
        if len(halves) != 2:
            raise ImportFileError(f"{place}: expected ids, an empty column, and weights")
        try:
            some_ids = np.array(halves[0].split("\t"), dtype=np.int64)
            with np.errstate(over="ignore"):  # infinities are refused later
                some_weights = np.array(halves[1].split("\t"), dtype=np.float32)
        except (ValueError, OverflowError) as error:
            raise ImportFileError(f"{place}: {error}") from error
        if len(some_ids) != len(some_weights) or len(some_ids) % top_k:
            raise ImportFileError(
                f"{place}: {len(some_ids)} ids and {len(some_weights)} weights are not {top_k} of "
                "each a token (see --top-k)"
            )
        lengths.append(len(some_ids) // top_k)
        ids.append(some_ids.reshape(-1, top_k))
        weights.append(some_weights.reshape(-1, top_k))
    if not lengths:
        raise ImportFileError(f"{file} has no line")
    return lengths, np.concatenate(ids), np.concatenate(weights)


IMPORTER: Final = Importer(
    name="esft",
    description="ESFT expert weights: a folder a task, with expert_weights_N.txt a layer",
    versions=("deepseek-ai/ESFT, 2024",),
    holds="experts and weights of every token; no text",
    read=read,
)
