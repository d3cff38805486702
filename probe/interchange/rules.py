"""The rule by which recorded logits become routing: named, or read from what `doctor` printed."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.kernels.route import RoutingRule, select
from moescope.kernels.route.rule import Groups
from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.imported import Array, ImportOptions, LayerSlots

PLAIN: Final[dict[str, dict[str, Any]]] = {
    "softmax": {"renormalize": False},
    "softmax-renormalized": {"renormalize": True},
    "softmax-of-chosen": {"renormalize": False, "weights": "softmax_topk"},
    "sigmoid": {"renormalize": True, "score": "sigmoid"},
}
"""Rules that need only a name and k."""


def named_rule(options: ImportOptions, num_experts: int, layer: int, place: str) -> RoutingRule:
    """The rule of a layer with so many experts.

    Raises:
        ImportFileError: no such rule, k is not told, or it needs more than logits (a selection
            bias, a table, shared experts' logits).
    """
    name = options.rule or "softmax"
    if name in PLAIN:
        if options.top_k is None:
            raise ImportFileError(f"{place}: logits do not say top-k: give --top-k")
        try:
            return RoutingRule(num_experts=num_experts, top_k=options.top_k, **PLAIN[name])
        except ValueError as error:
            raise ImportFileError(f"{place}: {error}") from error
    rule = _from_file(Path(name), layer)
    if rule.num_experts != num_experts:
        raise ImportFileError(f"{place} has {num_experts} experts, its rule {rule.num_experts}")
    needs_more = rule.selection_bias != "none" or rule.from_table or rule.has_skip
    if needs_more or rule.weights in ("logsigmoid_shared", "scaled_probability"):
        raise ImportFileError(
            f"{place}: its rule ({rule.description}) needs more than logits; record the model"
        )
    return rule


def select_slots(logits: Array, layer: int, options: ImportOptions, place: str) -> LayerSlots:
    """What the rule makes of a layer's logits, float32[T, E], by rank."""
    import torch

    rule = named_rule(options, logits.shape[1], layer, place)
    values = torch.from_numpy(np.ascontiguousarray(logits, dtype=np.float32))
    weights, ids = select(values, rule)
    if not bool((weights[:, 1:] <= weights[:, :-1]).all()):  # some rules select unsorted
        weights, order = torch.sort(weights, dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
    scores = torch.softmax(values, -1) if rule.score == "softmax" else torch.sigmoid(values)
    return LayerSlots(
        layer=layer,
        experts=ids.numpy().astype(np.int32),
        weights=weights.float().numpy(),
        num_experts=logits.shape[1],
        scores=scores.numpy(),
    )


def _from_file(path: Path, layer: int) -> RoutingRule:
    if not path.is_file():
        raise ImportFileError(
            f"there is no rule {str(path)!r}: name one of {', '.join(PLAIN)}, or a JSON file"
        )
    try:
        data = json.loads(path.read_text())
        if "layers" in data:
            data = next(row["rule"] for row in data["layers"] if row["layer"] == layer)
        known = {field.name for field in fields(RoutingRule)}
        rule = RoutingRule(**{name: value for name, value in data.items() if name in known})
        return replace(rule, groups=None if rule.groups is None else Groups(**data["groups"]))
    except StopIteration as error:
        raise ImportFileError(f"{path} has no rule for layer {layer}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ImportFileError(f"{path} is no rule as `moescope doctor --json` prints it") from error
