"""Router logits saved as tensors, with the selection rule that turns them into routing.

`router_logits` of transformers is a tuple over the sparse layers, [batch * tokens, experts] each,
padding included. Such a tuple (or a dict by layer, or one stacked tensor [layers, tokens, experts])
saved by `torch.save`, as `.npz` or as safetensors is read here. Logits alone do not say which
experts were used; the model's rule does, see `moescope.probe.interchange.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import existing_file, one_file
from moescope.probe.interchange.imported import (
    MOST_EXPERTS,
    Array,
    Imported,
    ImportedSequence,
    ImportOptions,
    decoder_layers,
)
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.report import ImportReport
from moescope.probe.interchange.rules import select_slots
from moescope.probe.interchange.tensors import check_growth, load_torch


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read one file; its tokens are one sequence."""
    path = one_file(paths, "router-logits")
    report = ImportReport("router-logits", path.suffix[1:])
    report.lacks += ["token ids", "text", "phases", "prompts"]
    logits = [_floats(value, f"{path}, layer {n}") for n, value in enumerate(_layers(path))]
    if not logits:
        raise ImportFileError(f"{path} holds no layer")
    tokens = {len(array) for array in logits}
    if len(tokens) > 1 or 0 in tokens:
        raise ImportFileError(f"{path}: layers have {sorted(tokens)} tokens")
    slots = [
        select_slots(array, layer, options, f"{path}, layer {layer}")
        for layer, array in zip(decoder_layers(len(logits), options, report), logits, strict=True)
    ]
    report.assumed.append(f"experts were selected by {options.rule or 'softmax'}, not recorded")
    return Imported(
        report=report,
        sequences=[ImportedSequence(num_tokens=tokens.pop(), key=path.stem)],
        slots=slots,
        is_ranked=True,
        manifest={"rule": options.rule or "softmax"},
    )


def _layers(path: Path) -> list[Any]:
    """The layers' logits in their order."""
    suffix = existing_file(path).suffix.lower()
    if suffix == ".npz":
        return _named(_npz(path))
    if suffix == ".safetensors":
        return _named(_safetensors(path))
    data = load_torch(path)
    if isinstance(data, dict) and "router_logits" in data:
        data = data["router_logits"]
    if isinstance(data, dict):
        return _named({str(name): value for name, value in data.items()})
    if isinstance(data, (list, tuple)):
        return list(data)
    if getattr(data, "ndim", 0) == 3:
        return list(data)
    raise ImportFileError(f"{path}: expected a tuple of layers, got {type(data).__name__}")


def _npz(path: Path) -> dict[str, Any]:
    check_growth(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zip, header and dtype errors of many kinds
        raise ImportFileError(f"{path} is no sound .npz file: {error}") from error


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:
        raise ImportFileError(f"{path} is no sound safetensors file: {error}") from error


def _named(layers: dict[str, Any]) -> list[Any]:
    """Layers by the last number in their names."""
    numbered = {}
    for name, value in layers.items():
        digits = [part for part in name.replace("_", ".").split(".") if part.isdigit()]
        if not digits:
            raise ImportFileError(f"{name!r} does not name a layer by number")
        numbered[int(digits[-1])] = value
    if len(numbered) != len(layers):
        raise ImportFileError("two entries name the same layer")
    return [numbered[number] for number in sorted(numbered)]


def _floats(value: Any, place: str) -> Array:
    try:
        array: Array = (
            value.float().numpy() if hasattr(value, "float") else np.asarray(value, np.float32)
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ImportFileError(f"{place}: expected numbers") from error
    if array.ndim == 3:
        array = array.reshape(-1, array.shape[-1])
    if array.ndim != 2 or not 0 < array.shape[1] <= MOST_EXPERTS:
        raise ImportFileError(f"{place}: expected [tokens, experts], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ImportFileError(f"{place}: a logit is not a finite number")
    return array


IMPORTER: Final = Importer(
    name="router-logits",
    description="router logits saved as tensors (.pt, .npz, .safetensors), with --rule and --top-k",
    versions=("transformers 5: a tuple over sparse layers", "one tensor [layers, tokens, experts]"),
    holds="experts and weights that the rule gives, and scores; no text",
    read=read,
)
