"""How much the expert of one layer tells about the expert of a later one.

Two numbers for each pair of layers, both for top-1 experts. The share of tokens that take the most
frequent successor of their expert says how well a table of successors would predict; it stands
beside the best guess without knowing the expert, which can be nearly as good (OLMoE on arXiv text,
layers 7 to 15: .613 against .573). The mutual information counts all successors. Both are too high
on few tokens; tokens shuffled against each other show by how much. The table of successors is the
affinity of ExFlow (arXiv 2401.08383).

Letters: E experts of the first layer, F of the next, G groups of units, S shuffles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from moescope.probe.analysis.columns import KIND, NUM_PROMPTS, NUM_TOKENS, stack_parts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.intervals import jackknife_groups, jackknife_interval
from moescope.probe.analysis.measures import FloatArray, divide, entropy_nats, normalize
from moescope.probe.analysis.pairs.pair_counts import PairCounts, count_pairs
from moescope.probe.analysis.pairs.transitions import (
    EXFLOW,
    FIRST_LAYER,
    NEXT_LAYER,
    link_index,
    linked_routers,
)
from moescope.probe.analysis.selection import select, unit_labels
from moescope.probe.analysis.token_slots import read_tokens
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

_SOURCE = f"moescope, after {EXFLOW}"
_INTERVAL = "95 % interval over units (delete-a-group jackknife)"
_SHUFFLED = (
    "mean over `shuffles` permutations of the tokens of one layer against those of the other "
    "(drawn as tables with the same margins)"
)


def _bounds(name: str, of: str, unit: str, span: str) -> tuple[Column, Column]:
    ends = (("low", "Lower"), ("high", "Upper"))
    low, high = (
        Column(
            name=f"{name}_{end}",
            unit=unit,
            range=f"{span}; missing with fewer than 2 groups of units",
            definition=f"{word} end of the {_INTERVAL} of {of}.",
        )
        for end, word in ends
    )
    return low, high


COLUMNS = (
    FIRST_LAYER,
    NEXT_LAYER,
    KIND,
    Column(
        name="best_successor_share",
        unit="share of tokens",
        range="[base_rate, 1]",
        definition="Tokens whose top-1 expert of next_layer is the most frequent successor of "
        "their top-1 expert of layer: sum over i of max over j of N_ij, over N.",
        source=_SOURCE,
    ),
    Column(
        name="base_rate",
        unit="share of tokens",
        range="[1/F, 1]",
        definition="The same without knowing the expert: max over j of p(j), the share of tokens "
        "that the busiest top-1 expert of next_layer gets.",
        source=_SOURCE,
    ),
    Column(
        name="gain",
        unit="share of tokens",
        range="[0, 1]",
        definition="best_successor_share minus base_rate.",
        source=_SOURCE,
    ),
    *_bounds("gain", "gain", "share of tokens", "[-1, 1]"),
    Column(
        name="gain_chance",
        unit="share of tokens",
        range="[0, 1]",
        definition=f"Gain that choosing the most frequent of few gives by itself: {_SHUFFLED}.",
    ),
    Column(
        name="mutual_information",
        unit="nats",
        range="[0, next_entropy]",
        definition="I(e; e') of the top-1 experts of both layers, from the shares of tokens; too "
        "high on few tokens.",
    ),
    Column(
        name="information_chance",
        unit="nats",
        range="0 or more",
        definition=f"Mutual information of independent tokens, all of it bias: {_SHUFFLED}.",
    ),
    Column(
        name="excess_information",
        unit="nats",
        range="[-next_entropy, next_entropy]; 0 by chance",
        definition="mutual_information minus information_chance.",
    ),
    *_bounds("excess", "excess_information", "nats", "any number"),
    Column(
        name="next_entropy",
        unit="nats",
        range="[0, ln F]",
        definition="H(e'), entropy of the top-1 expert of next_layer: what there is to know.",
    ),
    Column(
        name="information_share",
        unit="share of next_entropy",
        range="[-1, 1]; 0 by chance; missing where next_entropy is 0",
        definition="excess_information / next_entropy.",
    ),
    *_bounds("information_share", "information_share", "share of next_entropy", "[-1, 1]"),
    NUM_TOKENS,
    NUM_PROMPTS,
    Column(
        name="num_units",
        unit="units",
        range="1 or more",
        definition="Units of resampling with a counted token.",
    ),
)


def transition_strength(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    distance: int = 1,
    unit: str = "pair_id",
    shuffles: int = 10,
    seed: int = 0,
) -> AnalysisTable:
    """How well the top-1 expert of a layer predicts that of a later layer.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        distance: how many routed layers of the same kind further the later layer is, in the
            model, not among the selected layers.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.
        shuffles: permutations of tokens whose mean is the chance level.
        seed: of the shuffles, and of the groups of units that the jackknife leaves out.

    Raises:
        AnalysisInputError: for bad parameters, when the run holds no routing or no ranks, or no
            two selected layers are so far apart.
    """
    if shuffles < 1:
        raise AnalysisInputError(f"shuffles is {shuffles}; it is 1 or more")
    selection = select(store, run_id, filters or Filters(), fields=[unit])
    links = linked_routers(selection, distance)
    tokens = read_tokens(selection)
    unit_P = unit_labels(selection.prompts, unit)
    rng = np.random.default_rng(seed)
    counts = count_pairs(
        selection,
        tokens,
        links,
        unit_P,
        form="top1",
        group_P=jackknife_groups(unit_P, rng)[0],
        ranked="transition-strength",
    )
    later = "the next one" if distance == 1 else f"the one {distance} layers on"
    return AnalysisTable(
        name="transition-strength",
        title=f"How far a layer's expert tells {later}",
        frame=stack_parts([_part(one, shuffles, rng) for one in counts if one.num_tokens], COLUMNS),
        columns=COLUMNS,
        context=selection.context(
            num_prompts=tokens.num_prompts,
            num_tokens=len(tokens),
            parameters={"distance": distance, "unit": unit, "shuffles": shuffles, "seed": seed},
        ),
        notes=(
            *selection.notes,
            "Shuffling treats tokens as independent; tokens of one prompt are not, so part of what "
            "is left over chance can come from the topic of a prompt.",
        ),
    )


def mutual_information(pairs_EF: FloatArray) -> FloatArray:
    """I(i; j) = H(i) + H(j) - H(i, j) of counts of pairs, in nats. [..., E, F] -> [...]."""
    joint = normalize(pairs_EF.reshape(*pairs_EF.shape[:-2], -1)).reshape(pairs_EF.shape)
    both = entropy_nats(joint.reshape(*joint.shape[:-2], -1))
    information = entropy_nats(joint.sum(axis=-1)) + entropy_nats(joint.sum(axis=-2)) - both
    return np.maximum(information, 0.0)


def best_successor(pairs_EF: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Share of pairs with the most frequent j of their i, and with the most frequent j of all."""
    total = pairs_EF.sum(axis=(-2, -1))
    best = divide(pairs_EF.max(axis=-1).sum(axis=-1), total)
    return best, divide(pairs_EF.sum(axis=-2).max(axis=-1), total)


def _part(counts: PairCounts, shuffles: int, rng: np.random.Generator) -> dict[str, Any]:
    """The row of one pair of layers."""
    shuffled_SEF = stats.random_table(
        counts.users.astype(np.int64), counts.followers.astype(np.int64)
    ).rvs(shuffles, method="patefield", random_state=rng)
    chance = mutual_information(shuffled_SEF).mean()
    best, base = best_successor(shuffled_SEF)
    row = _measures(counts.pairs[None], chance)
    without = _measures(counts.pairs - counts.group_pairs.astype(np.float64), chance)
    intervals: dict[str, FloatArray] = {}
    for name, prefix, bounds in (
        ("gain", "gain", (-1.0, 1.0)),
        ("excess_information", "excess", (-np.inf, np.inf)),
        ("information_share", "information_share", (-1.0, 1.0)),
    ):
        low, high = jackknife_interval(row[name], without[name][:, None], bounds)
        intervals |= {f"{prefix}_low": low, f"{prefix}_high": high}
    return (
        link_index(counts, 1)
        | row
        | intervals
        | {
            "gain_chance": np.array([(best - base).mean()]),
            "information_chance": np.array([chance]),
            "num_units": np.array([counts.num_units]),
        }
    )


def _measures(pairs_XEF: FloatArray, chance: float) -> dict[str, FloatArray]:
    """The numbers of each table of pairs, [X] each."""
    best_X, base_X = best_successor(pairs_XEF)
    information_X = mutual_information(pairs_XEF)
    entropy_X = entropy_nats(normalize(pairs_XEF.sum(axis=-2)))
    return {
        "best_successor_share": best_X,
        "base_rate": base_X,
        "gain": best_X - base_X,
        "mutual_information": information_X,
        "excess_information": information_X - chance,
        "next_entropy": entropy_X,
        "information_share": divide(information_X - chance, entropy_X),
    }
