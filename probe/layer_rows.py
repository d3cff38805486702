"""One layer's rows of a batch: experts by rank, and what the table `usage` sums of them.

Letters: N routed tokens of the batch, K experts per token, E routed experts, G groups of tokens
(prompt, phase, segment, special or not).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.kernels.route import RoutingRule
from moescope.probe.errors import RecordingError
from moescope.probe.recording import LayerTrace
from moescope.probe.routers import LayerInfo
from moescope.probe.scores import ranking_scores, router_probs
from moescope.probe.storage.schema import SHARD_TABLES

Array = NDArray[Any]


@dataclass(frozen=True)
class RankedLayer:
    """One layer's routed tokens, experts by rank.

    Attributes:
        weights: float[N, K].
        expert_ids: int[N, K].
        probs: float[N, E].
        slot_sums: what is summed over a token's slots beside the weights, by the name of its
            column in `usage`, float[N, K]; empty without norms.
        max_abs: float[N, K], or None without norms.
        has_easyep: whether EASY-EP's score can be had for this layer.
    """

    weights: Array
    expert_ids: Array
    probs: Array
    slot_sums: dict[str, Array]
    max_abs: Array | None
    has_easyep: bool


def rank_layer(info: LayerInfo, trace: LayerTrace, rows: Array) -> RankedLayer:
    """Pick the batch's real tokens and put each token's experts in rank order."""
    where = f"layer {info.layer} ({info.module})"
    weights = trace.weights.float().numpy()[rows]
    ids = trace.expert_ids.numpy()[rows]
    probs = router_probs(trace.logits, info.rule).numpy()[rows]
    if not (np.isfinite(weights).all() and np.isfinite(probs).all()):
        raise RecordingError(f"{where}: routing weights or scores are not finite numbers")
    if ids.min() < 0 or ids.max() >= info.num_experts:
        raise RecordingError(f"{where}: expert ids outside 0..{info.num_experts - 1}")
    order = _rank_order(info, trace, rows, weights, ids)
    ids = np.take_along_axis(ids, order, axis=1)
    weights = np.take_along_axis(weights, order, axis=1)
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise RecordingError(f"{where}: an expert id repeats within a token")
    if trace.norms is None:
        return RankedLayer(weights, ids, probs, {}, None, False)
    norm = np.take_along_axis(trace.norms.output_norm.numpy()[rows], order, axis=1)
    change = trace.norms.residual_change.numpy()[rows]
    has_easyep = bool(np.isfinite(change).all())
    if not has_easyep and np.isfinite(change).any():
        raise RecordingError(
            f"{where}: the change of the residual stream is known for some tokens only"
        )
    sums = {"norm_sum": norm, "weighted_norm_sum": norm * weights}
    if has_easyep:
        sums["easyep_sum"] = norm * weights * change[:, None]
    largest = np.take_along_axis(trace.norms.max_abs.numpy()[rows], order, axis=1)
    if not all(np.isfinite(part).all() for part in (*sums.values(), largest)):
        raise RecordingError(f"{where}: an expert's output is not a finite number")
    return RankedLayer(weights, ids, probs, sums, largest, has_easyep)


def _rank_order(
    info: LayerInfo, trace: LayerTrace, rows: Array, weights: Array, ids: Array
) -> Array:
    """Each token's slots from the best to the worst, int[N, K]; ties go to the lowest id.

    Where weights follow the selection they decide, and the score decides between equal weights
    (coarse dtypes); elsewhere the selection score comes first.
    """
    scores = ranking_scores(trace.logits, info.rule, trace.bias)
    if scores is None:
        return np.lexsort((ids, -weights), axis=1)
    chosen = np.take_along_axis(scores.numpy()[rows], ids, axis=1)
    if _weights_follow_selection(info.rule):
        return np.lexsort((ids, -chosen, -weights), axis=1)
    return np.lexsort((ids, -weights, -chosen), axis=1)


def _weights_follow_selection(rule: RoutingRule) -> bool:
    """Whether a better selection score always has at least the weight of a worse one."""
    return (
        rule.selection_bias == "none"
        and rule.groups is None
        and rule.weights in ("score", "softmax_topk", "sigmoid_topk", "sigmoid_all")
    )


@dataclass(frozen=True)
class Groups:
    """Routed tokens grouped as the table `usage` counts them.

    Attributes:
        group_of: group of each routed token, int[N].
        columns: what makes a group, one entry per group.
    """

    group_of: Array
    columns: dict[str, Array]

    @classmethod
    def of(cls, tokens: dict[str, Array], prompt_id: Array, position: Array) -> Groups:
        """Group the routed tokens (prompts and positions int[N]) as the table `usage` does."""
        kept = tokens["is_routed"]
        if not (
            np.array_equal(tokens["prompt_id"][kept], prompt_id)
            and np.array_equal(tokens["position"][kept], position)
        ):
            raise RecordingError("recorded rows and tokens do not match")
        names = ("prompt_id", "phase", "segment", "is_special")
        keys = list(zip(*(tokens[name][kept].tolist() for name in names), strict=True))
        number: dict[tuple[Any, ...], int] = {}
        group_of = np.array([number.setdefault(key, len(number)) for key in keys])
        columns = zip(names, zip(*number, strict=True), strict=True)
        return cls(group_of, {name: np.array(column) for name, column in columns})

    def __len__(self) -> int:
        return len(self.columns["prompt_id"])


def usage_table(info: LayerInfo, layer: RankedLayer, groups: Groups) -> pa.Table:
    """Rows of `usage_arrays`: one per group of tokens, arrays by expert."""
    num_groups, num_experts = len(groups), info.num_experts
    cell = (groups.group_of[:, None] * num_experts + layer.expert_ids).reshape(-1)
    size = num_groups * num_experts
    counts = np.bincount(cell, minlength=size)
    prob_sums = np.zeros((num_groups, num_experts))
    np.add.at(prob_sums, groups.group_of, layer.probs)
    slot_sums = {
        name: np.bincount(cell, weights=values.reshape(-1), minlength=size)
        for name, values in {"weight_sum": layer.weights, **layer.slot_sums}.items()
    }
    table = pa.table(
        {
            **{name: pa.array(column) for name, column in groups.columns.items()},
            "layer": np.full(num_groups, info.layer),
            "kind": pa.repeat(pa.scalar(info.kind), num_groups),
            "routed_tokens": np.bincount(groups.group_of, minlength=num_groups),
            "num_tokens": lists_of(counts.astype(np.int32), num_experts),
            "prob_sum": lists_of(prob_sums.astype(np.float32).reshape(-1), num_experts),
            **{
                name: lists_of(sums.astype(np.float32), num_experts)
                for name, sums in slot_sums.items()
            },
        }
    )
    if layer.max_abs is not None:
        largest = np.zeros(size, np.float32)
        np.maximum.at(largest, cell, layer.max_abs.reshape(-1))
        table = table.append_column("max_abs", lists_of(largest, num_experts))
    return _with_missing_columns(table)


def _with_missing_columns(table: pa.Table) -> pa.Table:
    """Empty columns for what was not measured, so that all layers' rows fit together."""
    for name in ("norm_sum", "weighted_norm_sum", "easyep_sum", "max_abs"):
        if name not in table.column_names:
            empty = pa.nulls(len(table), pa.list_(pa.float32()))
            table = table.append_column(name, empty)
    return table.select(SHARD_TABLES["usage_arrays"].names)


def lists_of(values: Array, width: int) -> pa.Array:
    """A flat array as a column of lists of `width` values each."""
    offsets = np.arange(0, len(values) + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
