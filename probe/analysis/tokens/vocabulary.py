"""Vocabulary specialization: does a token id keep to one expert?

OLMoE's VS(x) is the largest share of an id's occurrences that use one expert. Its mean over ids is
dominated by ids seen once, which score 1 by necessity, so three readings stand side by side with
their chance: over all ids, over those seen often enough, and weighted by frequency.

Letters: N tokens with a label, in order of labels, V labels, U units, P prompts, E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from moescope.probe.analysis.columns import (
    KIND,
    LAYER,
    NUM_PROMPTS,
    NUM_TOKENS,
    router_index,
    stack_parts,
)
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.intervals import COVERAGE
from moescope.probe.analysis.measures import FloatArray
from moescope.probe.analysis.selection import IntArray
from moescope.probe.analysis.tokens.label_counts import (
    Arrangement,
    BoolArray,
    PerPassing,
    RouterSlots,
    arrange,
    compact,
    count_table,
    label_ranges,
    over_routers,
)
from moescope.probe.analysis.tokens.labelled_tokens import (
    LabelledTokens,
    SlotChoice,
    TokenLabel,
    check_choices,
    read_labelled,
)
from moescope.probe.storage.store import Store

_SOURCE = "vocabulary specialization: OLMoE, arXiv 2409.02060, section 5"
_RANGE = "(0, 1]"
READINGS = ("mean_all", "mean_min_count", "weighted")


def _reading(name: str, definition: str, *, interval: bool) -> tuple[Column, ...]:
    """A reading of VS, its interval where it has one, and its chance."""
    unit = "share of occurrences"
    columns = [Column(name=name, unit=unit, range=_RANGE, definition=definition, source=_SOURCE)]
    if interval:
        columns += [
            Column(
                name=f"{name}_{end}",
                unit=unit,
                range="[0, 1]",
                definition=f"{word} end of its 95 % interval over units, linearized: ids and the "
                "favorite expert of each held fixed.",
                source="Cochran, Sampling Techniques, 6.4",
            )
            for end, word in (("low", "Lower"), ("high", "Upper"))
        ]
    chance = Column(
        name=f"{name}_chance",
        unit=unit,
        range=_RANGE,
        definition="The same with labels shuffled over all counted tokens, mean over shuffles.",
    )
    return (*columns, chance)


def _number(name: str, unit: str, definition: str) -> Column:
    return Column(name=name, unit=unit, range="0 or more", definition=definition)


COLUMNS = (
    LAYER,
    KIND,
    *_reading(
        "mean_all",
        "Mean over the ids that occur of VS = max over experts of n[x,e] / N_x, the largest share "
        "of an id's occurrences that use one expert. An id seen once has VS 1.",
        interval=False,
    ),
    *_reading(
        "mean_min_count",
        "Mean of VS over the ids with at least min_count occurrences; missing when there are none.",
        interval=True,
    ),
    *_reading(
        "weighted",
        "Mean of VS over all ids, each weighted by its occurrences: share of tokens that use the "
        "favorite expert of their id.",
        interval=True,
    ),
    _number("num_ids", "ids", "Ids that occur as a label."),
    _number("num_singletons", "ids", "Ids that occur once."),
    _number("num_frequent", "ids", "Ids with at least min_count occurrences."),
    NUM_TOKENS,
    NUM_PROMPTS,
    _number("num_units", "units", "Units of resampling with a counted token."),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Labels:
    """Tokens by label, by shuffled label, and where they come from."""

    observed: Arrangement
    shuffled: tuple[Arrangement, ...]
    units: IntArray
    num_units: int
    num_prompts: int


def vocabulary_specialization(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    label: TokenLabel = "input",
    slots: SlotChoice = "top1",
    min_count: int = 10,
    shuffles: int = 1,
    unit: str = "pair_id",
    seed: int = 0,
) -> AnalysisTable:
    """How far each token id keeps to one expert, at every router.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        label: whose id: `input` (the token's own), `next` (of the token after it) or `predicted`
            (the model's prediction, where greedy generation shows it).
        slots: whether an expert is used as the first-ranked one (`top1`) or as any (`topk`).
        min_count: occurrences that an id needs for the second reading.
        shuffles: of the labels, averaged for chance.
        unit: the prompt field that joins prompts into units; a prompt without it is one alone.
        seed: of the shuffles.

    Raises:
        AnalysisInputError: when the run has no ranks for `top1`, no predictions for `predicted`,
            or no counted token with a label.
    """
    check_choices(slots, min_count=min_count, shuffles=shuffles)
    found = read_labelled(store, run_id, filters, label, unit)
    labels_of = PerPassing(lambda passed: _labels(found, passed, shuffles, seed))
    parts = over_routers(
        found.selection,
        found.tokens,
        lambda one: _part(one, labels_of(one.passed), min_count),
        top1=slots == "top1",
        ranked="slots top1" if slots == "top1" else None,
    )
    frame = stack_parts(parts, COLUMNS)
    parameters = {
        "label": label, "slots": slots, "min_count": min_count, "shuffles": shuffles, "unit": unit,
        "seed": seed,
    }  # fmt: skip
    return AnalysisTable(
        name="vocabulary",
        title="Vocabulary specialization",
        frame=frame,
        columns=COLUMNS,
        context=found.selection.context(
            num_prompts=int(frame["num_prompts"].max()),
            num_tokens=int(frame["num_tokens"].max()),
            parameters=parameters,
        ),
        notes=found.notes,
    )


def _labels(found: LabelledTokens, passed_T: BoolArray | None, shuffles: int, seed: int) -> _Labels:
    """The labels of the tokens that passed a router."""
    kept = np.flatnonzero(np.ones(len(found.codes), bool) if passed_T is None else passed_T)
    tokens = arrange(compact(found.codes[kept])[0])
    rng = np.random.default_rng(seed)
    orders = [kept[rng.permutation(len(kept))] for _ in range(shuffles)]
    order = kept[tokens.order]
    prompt_N = found.tokens.prompts[order]
    unit_N, units = compact(found.units[prompt_N])
    return _Labels(
        observed=replace(tokens, order=order),
        shuffled=tuple(replace(tokens, order=shuffled) for shuffled in orders),
        units=unit_N,
        num_units=len(units),
        num_prompts=len(np.unique(prompt_N)),
    )


def _part(slots: RouterSlots, labels: _Labels, min_count: int) -> dict[str, Any]:
    """The row of one router."""
    tokens = labels.observed
    size_V = tokens.sizes
    most_V, favorite_V = _favorites(slots, tokens)
    values = _readings(most_V, size_V, min_count)
    chances = np.mean(
        [_readings(_favorites(slots, one)[0], size_V, min_count) for one in labels.shuffled], axis=0
    )
    hit_N = (slots.of(tokens.order) == favorite_V[tokens.labels][:, None]).any(axis=1)
    is_frequent_V = size_V >= min_count
    # What one token adds to each reading, to first order.
    weight_V = np.where(is_frequent_V, 1 / np.maximum(size_V, 1), 0) / max(1, is_frequent_V.sum())
    added = {
        "mean_min_count": (hit_N - (most_V / size_V)[tokens.labels]) * weight_V[tokens.labels],
        "weighted": (hit_N - values[2]) / max(1, len(hit_N)),
    }
    row: dict[str, Any] = {}
    for name, value, chance in zip(READINGS, values, chances, strict=True):
        row |= {name: value, f"{name}_chance": chance}
        if name in added:
            reach = _reach(added[name], labels)
            low, high = np.clip([value - reach, value + reach], 0, 1)
            row |= {f"{name}_low": low, f"{name}_high": high}
    return (
        router_index(slots.router, None)
        | {name: [value] for name, value in row.items()}
        | {
            "num_ids": [len(size_V)],
            "num_singletons": [int((size_V == 1).sum())],
            "num_frequent": [int(is_frequent_V.sum())],
            "num_tokens": [len(tokens.order)],
            "num_prompts": [labels.num_prompts],
            "num_units": [labels.num_units],
        }
    )


def _favorites(slots: RouterSlots, tokens: Arrangement) -> tuple[IntArray, IntArray]:
    """Occurrences of each label that use its favorite expert, and that expert, [V] each."""
    most_V, favorite_V = np.zeros((2, tokens.num_labels), dtype=np.int64)
    for first, last in label_ranges(np.arange(tokens.num_labels + 1), slots.router.num_experts):
        counts_VE = count_table(slots, tokens, first, last)
        favorite_V[first:last] = counts_VE.argmax(axis=1)
        most_V[first:last] = counts_VE.max(axis=1)
    return most_V, favorite_V


def _readings(most_V: IntArray, size_V: IntArray, min_count: int) -> FloatArray:
    """The three readings, in the order of `READINGS`; missing where there is no such id."""
    share_V = most_V / size_V
    frequent_V = share_V[size_V >= min_count]
    return np.array(
        [
            share_V.mean() if len(share_V) else np.nan,
            frequent_V.mean() if len(frequent_V) else np.nan,
            most_V.sum() / size_V.sum() if len(size_V) else np.nan,
        ]
    )


def _reach(added_N: FloatArray, labels: _Labels) -> float:
    """Half the 95 % interval of a sum over tokens whose expectation is 0, over units."""
    number = labels.num_units
    if number < 2:
        return np.nan
    sums_U = np.bincount(labels.units, added_N, minlength=number)
    error = np.sqrt(number / (number - 1) * (sums_U**2).sum())
    return float(stats.t.ppf((1 + COVERAGE) / 2, number - 1) * error)
