"""What must hold of an import before a row of it is written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.imported import (
    MISSING,
    MOST_EXPERTS,
    Array,
    Imported,
    ImportOptions,
    LayerSlots,
    check_ids,
)


def checked_slots(imported: Imported, options: ImportOptions) -> Imported:
    """Known numbers of experts; tokens that were not captured everywhere left out.

    Raises:
        ImportFileError: ids, weights or shapes that cannot be, or nothing is left.
    """
    report = imported.report
    num_tokens = sum(sequence.num_tokens for sequence in imported.sequences)
    layers, captured = [], []
    for slots in imported.slots:
        where = f"layer {slots.layer}"
        if len(slots.experts) != num_tokens:
            raise ImportFileError(
                f"{where} has {len(slots.experts)} rows, the sequences have {num_tokens} tokens"
            )
        known = replace(slots, num_experts=_num_experts(slots, options))
        here = check_ids(known.experts, int(known.num_experts or 0), where)
        _check_weights(known, here, where)
        if here.any():
            layers.append(known)
            captured.append(here)
        else:
            report.drop("layers", 1, f"layer {slots.layer} was never captured, or is dense")
    if not layers:
        raise ImportFileError("no token was captured in any layer")
    if options.num_experts is None and any(slots.num_experts is None for slots in imported.slots):
        report.assumed.append(
            "a layer has as many experts as its highest id says (see --num-experts)"
        )
    everywhere = np.logical_and.reduce(captured)
    partly = np.logical_or.reduce(captured) & ~everywhere
    report.drop("tokens", int(partly.sum()), "captured in some layers and not in others")
    report.drop("tokens", int((~everywhere & ~partly).sum()), "not captured in any layer")
    if not everywhere.any():
        raise ImportFileError("no token was captured in every layer")
    kept = [
        replace(slots, experts=np.where(everywhere[:, None], slots.experts, MISSING))
        for slots in layers
    ]
    report.found.update(
        sequences=len(imported.sequences), tokens=num_tokens, layers=len(kept),
        slots=int(everywhere.sum()) * sum(slots.experts.shape[1] for slots in kept),
    )  # fmt: skip
    return replace(imported, slots=kept)


def _num_experts(slots: LayerSlots, options: ImportOptions) -> int:
    number = slots.num_experts or options.num_experts or int(slots.experts.max(initial=0)) + 1
    if not 0 < number <= MOST_EXPERTS:
        raise ImportFileError(f"layer {slots.layer} has {number} experts; 1 to {MOST_EXPERTS} fit")
    return number


def _check_weights(slots: LayerSlots, captured: Array, where: str) -> None:
    if slots.weights is None:
        return
    if slots.weights.shape != slots.experts.shape:
        raise ImportFileError(
            f"{where}: weights are {list(slots.weights.shape)}, ids {list(slots.experts.shape)}"
        )
    if not np.isfinite(slots.weights[captured]).all():
        raise ImportFileError(f"{where}: a weight is not a finite number")


def checked_counts(imported: Imported, options: ImportOptions) -> Imported:
    """Counts that could be; `top_k` known.

    Raises:
        ImportFileError: counts or shapes that cannot be, or k is not told.
    """
    top_k = imported.top_k or options.top_k
    if top_k is None:
        raise ImportFileError("it holds counts and does not say top-k: give --top-k")
    for layer in imported.counts:
        where = f"layer {layer.layer}"
        if layer.counts.ndim != 2 or len(layer.counts) != len(imported.sequences):
            raise ImportFileError(f"{where}: counts are {list(layer.counts.shape)}")
        if not 0 < layer.counts.shape[1] <= MOST_EXPERTS:
            raise ImportFileError(f"{where} has {layer.counts.shape[1]} experts")
        if (layer.counts < 0).any() or (layer.counts > np.iinfo(np.int32).max).any():
            raise ImportFileError(f"{where}: a count is negative or beyond 32 bits")
    kept = [layer for layer in imported.counts if layer.counts.any()]
    empty = len(imported.counts) - len(kept)
    imported.report.drop("layers", empty, "no expert was ever counted there")
    if not kept:
        raise ImportFileError("all counts are zero")
    imported.report.found.update(
        sequences=len(imported.sequences), layers=len(kept),
        slots=int(sum(int(layer.counts.sum()) for layer in kept)),
    )  # fmt: skip
    return replace(imported, counts=kept, top_k=top_k)
