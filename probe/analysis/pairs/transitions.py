"""Which expert follows which: transitions between routed layers.

ExFlow (arXiv 2401.08383) calls it affinity: of the tokens whose expert in one layer is i, the share
whose expert in the next one is j, for top-1 experts. With all K slots there are two generalizations
and both are given: the share of the slots that follow (it sums to 1), and the share of the tokens
that have j among their slots (a sure successor has 1). Busy experts follow everybody, so each share
stands beside the share of all tokens.

Letters: E experts of the first layer, F of the next.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np

from moescope.probe.analysis.columns import KIND, NUM_PROMPTS, NUM_TOKENS, stack_parts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.measures import divide
from moescope.probe.analysis.pairs.pair_counts import PairCounts, PairForm, check_rows, count_pairs
from moescope.probe.analysis.selection import Router, Selection, select, unit_labels
from moescope.probe.analysis.token_slots import read_tokens
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

EXFLOW = "affinity: ExFlow, arXiv 2401.08383"
_WIDER = "moescope, after ExFlow, arXiv 2401.08383"
Slots = Literal["top1", "topk"]
_FORMS: Final[dict[str, PairForm]] = {"top1": "top1", "topk": "all"}

FIRST_LAYER = Column(
    name="layer", unit="", range="0 or more", definition="Decoder layer index, as in the model."
)
NEXT_LAYER = Column(
    name="next_layer",
    unit="",
    range="above layer",
    definition="The routed layer of the same kind that is `distance` routed layers further.",
)


def _bound(name: str, end: str, of: str, unit: str) -> Column:
    return Column(
        name=name,
        unit=unit,
        range="[0, 1]; missing with fewer than 2 units",
        definition=f"{end} end of the 95 % interval of {of} over units.",
    )


COLUMNS = (
    FIRST_LAYER,
    NEXT_LAYER,
    KIND,
    Column(name="expert", unit="", range="[0, E-1]", definition="Expert i of layer."),
    Column(name="successor", unit="", range="[0, F-1]", definition="Expert j of next_layer."),
    Column(
        name="num_pairs",
        unit="pairs",
        range="0 or more",
        definition="Tokens that use i and then j: as top-1 experts, or (topk) among their slots.",
        source=EXFLOW,
    ),
    Column(
        name="share",
        unit="share of slots",
        range="[0, 1]; sums to 1 over j; missing where no token uses i",
        definition="P(j | i). top1: tokens with top-1 i and then j, over tokens with top-1 i. "
        "topk: pairs of a slot i and a slot j, over all pairs with a slot i, K' for each of its "
        "tokens; a sure successor has 1/K'.",
        source=EXFLOW,
    ),
    _bound("low", "Lower", "share", "share of slots"),
    _bound("high", "Upper", "share", "share of slots"),
    Column(
        name="base_rate",
        unit="share of slots",
        range="[0, 1]; sums to 1 over j",
        definition="Chance level of share: p(j), the share of all slots of next_layer that are "
        "j's (top1: of all tokens).",
    ),
    Column(
        name="lift",
        unit="ratio",
        range="0 or more; 1 by chance; missing where share is missing or j is never used",
        definition="share / base_rate.",
    ),
    Column(
        name="hit_rate",
        unit="share of tokens",
        range="[0, 1]; sums to K' over j (top1: 1); missing where no token uses i",
        definition="Tokens that use i and have j among their slots of next_layer, over tokens "
        "that use i; a sure successor has 1. The same as share for top1.",
        source=_WIDER,
    ),
    _bound("hit_low", "Lower", "hit_rate", "share of tokens"),
    _bound("hit_high", "Upper", "hit_rate", "share of tokens"),
    Column(
        name="hit_base_rate",
        unit="share of tokens",
        range="[0, 1]; sums to K' over j (top1: 1)",
        definition="Chance level of hit_rate: the share of all tokens that use j.",
    ),
    Column(
        name="num_slots",
        unit="slots",
        range="0 or more",
        definition="Tokens that use i (top1: as their top-1 expert).",
    ),
    NUM_TOKENS,
    NUM_PROMPTS,
    Column(
        name="num_units",
        unit="units",
        range="0 or more",
        definition="Units of resampling with a token that uses i.",
    ),
)


def expert_transitions(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    slots: Slots = "top1",
    distance: int = 1,
    unit: str = "pair_id",
) -> AnalysisTable:
    """For each expert, the share of its tokens that go to each expert of a later layer.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        slots: `top1` for the expert of rank 0 in both layers, `topk` for all of a token's slots.
        distance: how many routed layers of the same kind further the later layer is, in the
            model, not among the selected layers.
        unit: the prompt field that joins prompts into units of resampling; a prompt without it is
            a unit of its own.

    Raises:
        AnalysisInputError: for bad parameters, when the run holds no routing or (for `top1`) no
            ranks, no two selected layers are so far apart, or the table would be too long.
    """
    if slots not in _FORMS:
        raise AnalysisInputError(f"slots is {slots!r}; it is one of {', '.join(_FORMS)}")
    selection = select(store, run_id, filters or Filters(), fields=[unit])
    links = linked_routers(selection, distance)
    check_rows(
        sum(first.num_experts * second.num_experts for first, second in links), "transitions"
    )
    tokens = read_tokens(selection)
    counts = count_pairs(
        selection,
        tokens,
        links,
        unit_labels(selection.prompts, unit),
        form=_FORMS[slots],
        ranked="slots top1" if slots == "top1" else None,
    )
    words = "top-1 experts" if slots == "top1" else "experts"
    steps = "the next routed layer" if distance == 1 else f"the routed layer {distance} further"
    return AnalysisTable(
        name="transitions",
        title=f"Transitions between {words} of a layer and {steps}",
        frame=stack_parts([_part(one) for one in counts], COLUMNS),
        columns=COLUMNS,
        context=selection.context(
            num_prompts=tokens.num_prompts,
            num_tokens=len(tokens),
            parameters={"slots": slots, "distance": distance, "unit": unit},
        ),
        notes=selection.notes,
    )


def linked_routers(selection: Selection, distance: int) -> list[tuple[Router, Router]]:
    """Pairs of selected routers of one kind that are `distance` routed layers apart in the model.

    Raises:
        AnalysisInputError: for a distance below 1, or when there is no such pair.
    """
    if distance < 1:
        raise AnalysisInputError(f"distance is {distance}; it is 1 (the next routed layer) or more")
    layers = selection.store.arrow(
        "SELECT kind, layer FROM layers WHERE run_id = ? ORDER BY kind, layer", [selection.run_id]
    ).to_pylist()
    by_key = {(router.kind, router.layer): router for router in selection.routers}
    keys = [(row["kind"], row["layer"]) for row in layers]
    links = []
    for kind in dict.fromkeys(kind for kind, _ in keys):
        own = [key for key in keys if key[0] == kind]
        found = zip(own, own[distance:], strict=False)
        links += [(by_key[a], by_key[b]) for a, b in found if a in by_key and b in by_key]
    if not links:
        known = ", ".join(f"{router.layer} ({router.kind})" for router in selection.routers)
        raise AnalysisInputError(
            f"no two selected layers of run {selection.run_id!r} are of one kind and {distance} "
            f"routed layers apart; selected are {known}"
        )
    return links


def link_index(counts: PairCounts, size: int) -> dict[str, Any]:
    """Columns layer, next_layer, kind, and those of n, `size` times."""
    return {
        "layer": np.full(size, counts.first.layer),
        "next_layer": np.full(size, counts.second.layer),
        "kind": [counts.first.kind] * size,
        "num_tokens": np.full(size, counts.num_tokens),
        "num_prompts": np.full(size, counts.num_prompts),
    }


def _part(counts: PairCounts) -> dict[str, Any]:
    """The rows of one pair of layers."""
    size_E, size_F = counts.pairs.shape
    hit_low_EF, hit_high_EF = counts.share_interval()
    # Slots of the next layer per token of i: K', whatever i, in all but layers of varying K.
    slots_E = divide(counts.pairs.sum(axis=1), counts.users)[:, None]
    share_EF = divide(counts.share, slots_E)
    base_F = counts.followers / max(counts.followers.sum(), 1)
    cells = {
        "num_pairs": counts.pairs.astype(np.int64),
        "share": share_EF,
        "low": divide(hit_low_EF, slots_E),
        "high": divide(hit_high_EF, slots_E),
        "lift": divide(share_EF, base_F),
        "hit_rate": counts.share,
        "hit_low": hit_low_EF,
        "hit_high": hit_high_EF,
    }
    per_expert = {"num_slots": counts.users.astype(np.int64), "num_units": counts.user_units}
    per_successor = {
        "base_rate": base_F,
        "hit_base_rate": divide(counts.followers, counts.num_tokens),
    }
    return (
        link_index(counts, size_E * size_F)
        | {
            "expert": np.repeat(np.arange(size_E), size_F),
            "successor": np.tile(np.arange(size_F), size_E),
        }
        | {name: values_EF.ravel() for name, values_EF in cells.items()}
        | {name: np.repeat(values_E, size_F) for name, values_E in per_expert.items()}
        | {name: np.tile(values_F, size_E) for name, values_F in per_successor.items()}
    )
