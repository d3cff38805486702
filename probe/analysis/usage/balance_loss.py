"""The load-balancing loss over sequences, over batches and over the whole run.

    loss = E * sum over experts of f_e * p_e

with f_e the share of tokens that selected expert e (they sum to K) and p_e its mean router score
(they sum to 1), so that alike use of all experts gives K. Balance within every sequence forces each
to use all experts; balance over many lets sequences differ. The gap, sequence minus corpus,
therefore measures specialization (Qiu et al., "Demons in the Detail", arXiv 2501.11873).

Short sequences have a gap by chance alone: the few tokens of one cannot use all experts. Where the
routing weights are the router's softmax scores, that share of the gap is known (`gap_chance`).

Letters: P prompts, U units, B batches, E experts of a router, D draws.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from moescope.probe.analysis.columns import (
    KIND,
    LAYER,
    NUM_PROMPTS,
    NUM_TOKENS,
    stack_parts,
    value_column,
)
from moescope.probe.analysis.counts import (
    FloatArray,
    GroupedUsage,
    Quantity,
    RouterUsage,
    has_quantity,
    read_counts,
)
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.measures import divide, normalize
from moescope.probe.analysis.selection import (
    IntArray,
    Router,
    Selection,
    group_by_value,
    missing_value_notes,
    select,
    unit_labels,
)
from moescope.probe.analysis.statistics import bootstrap_weights, percentile_interval
from moescope.probe.analysis.token_fields import TOKEN_FIELDS, TokenField, token_field
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

_DEMONS = "Qiu et al., arXiv 2501.11873"


def _loss(name: str, of: str) -> Column:
    return Column(
        name=name,
        unit="",
        range="[0, E]; K when all experts are used alike",
        definition=f"E * sum of f * p, f the share of tokens that selected an expert (sums to K) "
        f"and p its mean router score (sums to 1), both {of}",
        source=_DEMONS,
    )


COLUMNS = (
    LAYER,
    KIND,
    _loss("loss_sequence", "of one prompt; mean over prompts, weighted by their tokens."),
    _loss("loss_batch", "of one batch of prompts; mean over batches, weighted by their tokens."),
    _loss("loss_corpus", "of all counted tokens."),
    Column(
        name="loss_balanced",
        unit="",
        range="K",
        definition="The loss if all experts were used alike.",
    ),
    Column(
        name="gap",
        unit="",
        range="any number; 0 when all prompts use experts alike",
        definition="loss_sequence minus loss_corpus: how much prompts specialize.",
        source=_DEMONS,
    ),
    Column(
        name="gap_low",
        unit="",
        range="missing with fewer than 2 units",
        definition="2.5th percentile of the gap over resampled units.",
    ),
    Column(
        name="gap_high",
        unit="",
        range="missing with fewer than 2 units",
        definition="97.5th percentile of the gap over resampled units.",
    ),
    Column(
        name="gap_chance",
        unit="",
        range="0 or more; missing where weights are not the router's softmax scores",
        definition="The gap expected when tokens are dealt to prompts of these lengths at random: "
        "E * sum of (P - 1) / (N - 1) * (mean of M p - f p), for N tokens in P prompts, M whether "
        "a token selects the expert.",
    ),
    Column(
        name="batch_size",
        unit="prompts",
        range="1 or more",
        definition="Prompts of a batch; the last may have fewer.",
    ),
    NUM_TOKENS,
    NUM_PROMPTS,
    Column(
        name="num_units",
        unit="units",
        range="1 or more",
        definition="Units of resampling with a counted token.",
    ),
)


def balance_loss(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    by: str | None = None,
    batch_size: int = 16,
    unit: str = "pair_id",
    bootstrap: int = 500,
    seed: int = 0,
) -> AnalysisTable:
    """The load-balancing loss of every router at three levels.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        by: a field of prompts or tokens; one row per value, in a first column `value`.
        batch_size: prompts of a batch; they are drawn into batches at random.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.
        bootstrap: draws for the 95 % interval of the gap; 0 leaves it missing.
        seed: of batches and draws.

    Raises:
        AnalysisInputError: when the run has no router scores, a parameter is out of range, or
            nothing is left to count.
    """
    if batch_size < 1 or bootstrap < 0:
        raise AnalysisInputError(
            f"batch_size is {batch_size} and bootstrap {bootstrap}; they are at least 1 and 0"
        )
    is_token_field = by in TOKEN_FIELDS
    fields = [unit] if by is None or is_token_field else [unit, by]
    selection = select(store, run_id, filters or Filters(), fields=fields)
    if not has_quantity(selection, "prob_sum"):
        raise AnalysisInputError(
            f"run {run_id!r} has no router scores over all experts, which the load-balancing loss "
            "needs: its source did not record them"
        )
    has_weights = has_quantity(selection, "weight_sum")
    quantities: list[Quantity] = ["num_tokens", "prob_sum"]
    quantities += ["weight_sum"] if has_weights else []
    field = token_field(selection, by) if by is not None and is_token_field else None
    size = len(selection.prompts)
    usage = read_counts(selection, np.arange(size), quantities=quantities, field=field)
    values, value_G = _values(selection, by, field)
    width = 1 if field is None else len(field.labels)
    unit_G = np.repeat(unit_labels(selection.prompts, unit), width)
    scales = _weight_scales(selection) if has_weights else {}
    parts = []
    for number, value in enumerate(values):
        own_G = np.flatnonzero((value_G == number) & (usage.group_prompts > 0))
        if len(own_G):
            rng = np.random.default_rng([seed, number])
            draws = _Draws.of(unit_G[own_G], batch_size, bootstrap, rng)
            parts += [
                ({} if by is None else {"value": [value]})
                | _row(one, own_G, draws, scales.get(one.router))
                | {"batch_size": batch_size}
                for one in usage.routers
            ]
    return _table(selection, usage, parts, by, batch_size, unit, bootstrap, seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Draws:
    """The batches and resampled units of the prompts of one value.

    Attributes:
        batches: the batch of each prompt, [P].
        units: the unit of each prompt, from 0, [P].
        weights: how often each unit is drawn, [D, U]; None without intervals.
    """

    batches: IntArray
    units: IntArray
    weights: FloatArray | None

    @classmethod
    def of(
        cls, unit_P: IntArray, batch_size: int, bootstrap: int, rng: np.random.Generator
    ) -> _Draws:
        """Deal prompts into batches at random, and draw units."""
        units = np.unique(unit_P, return_inverse=True)[1]
        number = int(units.max()) + 1
        return cls(
            batches=rng.permutation(len(unit_P)) // batch_size,
            units=units,
            weights=bootstrap_weights(number, bootstrap, rng) if bootstrap else None,
        )


def _values(
    selection: Selection, by: str | None, field: TokenField | None
) -> tuple[list[str], IntArray]:
    """The values of a table's rows, and the value of each group that usage was read for."""
    size = len(selection.prompts)
    if by is None:
        return [""], np.zeros(size, dtype=np.int64)
    if field is not None:
        return list(field.labels), np.tile(np.arange(len(field.labels)), size)
    return group_by_value(selection, by)


def _table(
    selection: Selection,
    usage: GroupedUsage,
    parts: list[dict[str, Any]],
    by: str | None,
    batch_size: int,
    unit: str,
    bootstrap: int,
    seed: int,
) -> AnalysisTable:
    columns = COLUMNS if by is None else (value_column(by), *COLUMNS)
    notes = selection.notes
    if by is not None and by not in TOKEN_FIELDS:
        notes += missing_value_notes(selection, by)
    missing = sum(bool(np.isnan(part["gap_chance"])) for part in parts)
    if missing:
        notes += (
            f"gap_chance is missing in {missing} of {len(parts)} rows: the routing weights are not "
            "the softmax scores themselves, so it is not known how large a gap short prompts "
            "alone would make.",
        )
    parameters = {
        "by": by, "batch_size": batch_size, "unit": unit, "bootstrap": bootstrap, "seed": seed,
    }  # fmt: skip
    title = "Load-balancing loss of sequences, batches and corpus"
    return AnalysisTable(
        name="balance-loss",
        title=title if by is None else f"{title} by {by}",
        frame=stack_parts(parts, columns),
        columns=columns,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters=parameters
        ),
        notes=notes,
    )


def loss(counts_GE: FloatArray, scores_GE: FloatArray, tokens_G: FloatArray) -> FloatArray:
    """E * sum of f p of groups, f = counts / tokens and p = scores over their sum. [..., E]."""
    f_GE = divide(counts_GE, tokens_G[..., None])
    return np.asarray(counts_GE.shape[-1] * (f_GE * normalize(scores_GE)).sum(axis=-1))


def _row(
    usage: RouterUsage, groups: IntArray, draws: _Draws, scale: float | None
) -> dict[str, Any]:
    """One router, over the prompts (or their tokens of one value) that these groups are."""
    passed = usage.tokens[groups] > 0
    own_P = groups[passed]
    counts, scores = (usage.sums[name][own_P] for name in ("num_tokens", "prob_sum"))
    tokens = usage.tokens[own_P]
    by_batch = [_summed(values, draws.batches[passed]) for values in (counts, scores, tokens)]
    gap = _gap(np.ones((1, len(own_P))), counts, scores, tokens)[0]
    low, high = np.nan, np.nan
    units = draws.units[passed]
    num_units = len(np.unique(units))
    if draws.weights is not None and num_units >= 2:
        draws_D = _gap(draws.weights[:, units], counts, scores, tokens)
        low, high = (float(end[0]) for end in percentile_interval(draws_D[:, None]))
    return {
        "layer": [usage.router.layer],
        "kind": [usage.router.kind],
        "loss_sequence": _mean(loss(counts, scores, tokens), tokens),
        "loss_batch": _mean(loss(*by_batch), by_batch[2]),
        "loss_corpus": loss(counts.sum(axis=0), scores.sum(axis=0), tokens.sum()),
        "loss_balanced": float(divide(counts.sum(), tokens.sum())),
        "gap": gap,
        "gap_low": low,
        "gap_high": high,
        "gap_chance": _gap_chance(usage, own_P, scale),
        "num_tokens": int(tokens.sum()),
        "num_prompts": len(own_P),
        "num_units": num_units,
    }


def _gap(
    weights_DP: FloatArray, counts: FloatArray, scores: FloatArray, tokens: FloatArray
) -> FloatArray:
    """Mean over prompts minus the loss of their sum, for weighted prompts, [D]."""
    drawn_DP = weights_DP * tokens
    sequences_D = divide(drawn_DP @ np.nan_to_num(loss(counts, scores, tokens)), drawn_DP.sum(1))
    corpus_D = loss(weights_DP @ counts, weights_DP @ scores, drawn_DP.sum(axis=1))
    return np.asarray(sequences_D - corpus_D)


def _gap_chance(usage: RouterUsage, own_P: IntArray, scale: float | None) -> float:
    """The gap of tokens dealt at random, from the mean score of the selected experts."""
    if scale is None:
        return np.nan
    tokens = usage.tokens[own_P].sum()
    if tokens < 2:
        return np.nan
    f_E = usage.counts[own_P].sum(axis=0) / tokens
    p_E = normalize(usage.sums["prob_sum"][own_P].sum(axis=0))
    together_E = usage.sums["weight_sum"][own_P].sum(axis=0) / scale / tokens
    share = (len(own_P) - 1) / (tokens - 1)
    return float(usage.router.num_experts * share * (together_E - f_E * p_E).sum())


def _mean(losses_G: FloatArray, tokens_G: FloatArray) -> float:
    return float(divide((losses_G * tokens_G).sum(), tokens_G.sum()))


def _summed(values_P: FloatArray, batch_P: IntArray) -> FloatArray:
    total = np.zeros((int(batch_P.max()) + 1, *values_P.shape[1:]))
    np.add.at(total, batch_P, values_P)
    return total[np.bincount(batch_P) > 0]


def _weight_scales(selection: Selection) -> dict[Router, float]:
    """What the weights are scaled by, for the routers whose weights are their softmax scores."""
    rows = selection.store.arrow(
        "SELECT layer, kind, rule FROM layers WHERE run_id = ?", [selection.run_id]
    ).to_pylist()
    rules = {(row["layer"], row["kind"]): json.loads(row["rule"] or "{}") for row in rows}
    found = {}
    for router in selection.routers:
        rule = rules[router.layer, router.kind]
        is_score = rule.get("weights", "score") == "score" and not rule.get("renormalize", True)
        if rule.get("score") == "softmax" and is_score:
            in_block = bool(rule.get("scale_in_block", False))
            found[router] = 1.0 if in_block else float(rule.get("scale") or 1.0)
    return found
