"""Two runs on the tokens that are the same in both: checkpoints, base and tuned, steered or not.

Routing depends on the context, so a token counts only while everything before it is the same too:
prompts are matched first, then their tokens up to the first difference. Under every analysis of two
runs.

Letters: M matched prompts, P matched prompts with a counted token, T counted tokens, N tokens of a
block at a router, K slots of a token in the run, J in the reference, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moescope.probe.analysis import token_slots
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.selection import (
    IntArray,
    Router,
    Selection,
    select,
    unit_labels,
)
from moescope.probe.analysis.token_filters import router_condition
from moescope.probe.analysis.token_slots import SlotBlock, Tokens, read_slots, read_tokens
from moescope.probe.analysis.two_runs.shared_tokens import IDENTITY, SharedPrompts, shared_prompts
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

# Rows read per row counted, at most: prompts between those of a block are read along.
MOST_READ_ALONG = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchedRuns:
    """The tokens that two runs share, and where their routing lies.

    Attributes:
        run: the run; its routers are those that both have, its prompts those with a counted token.
        reference: the same of the run it is compared with, routers in the same order.
        partners: index in `reference.prompts` of the match of each of `run.prompts`, [P].
        tokens: the counted tokens, in the order of the run.
        units: unit of resampling of each prompt, from 0 without gaps, [P].
        has_ranks: whether both runs say which expert of a token ranks first.
        has_weights: whether both runs recorded routing weights.
        blocks: first and last token of what is read at a time, whole prompts.
        notes: what the reader of any table must know.
    """

    run: Selection
    reference: Selection
    partners: IntArray
    tokens: Tokens
    units: IntArray
    has_ranks: bool
    has_weights: bool
    blocks: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]

    @property
    def num_units(self) -> int:
        """Units with a counted token."""
        return int(self.units.max()) + 1


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedSlots:
    """What tokens used at one router in both runs; only tokens that passed it in both.

    Attributes:
        router: index in `run.routers`.
        num_experts: E.
        prompts: index of each token's prompt in `run.prompts`, ascending, [N].
        run: uint16[K, N] in rank order; E where a token has no further slot.
        reference: uint16[J, N]; E + 1 where a token has no further slot.
        run_weights: float32[K, N], 0 where there is no slot; [0, N] unless asked for.
        reference_weights: float32[J, N].
    """

    router: int
    num_experts: int
    prompts: IntArray
    run: NDArray[np.uint16]
    reference: NDArray[np.uint16]
    run_weights: NDArray[np.float32]
    reference_weights: NDArray[np.float32]

    def kept(self) -> NDArray[np.bool_]:
        """Which slots of the reference went to an expert that the run uses too, [J, N]."""
        kept_JN = np.zeros(self.reference.shape, dtype=bool)
        for reference_N, kept_N in zip(self.reference, kept_JN, strict=True):
            for run_N in self.run:
                kept_N |= run_N == reference_N
        return kept_JN

    def at_run_slots(self, values_JN: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values of the reference's slots at the run's slots of the same expert, else 0, [K, N]."""
        found_KN = np.zeros(self.run.shape, dtype=np.float32)
        for run_N, found_N in zip(self.run, found_KN, strict=True):
            for reference_N, values_N in zip(self.reference, values_JN, strict=True):
                np.copyto(found_N, values_N, where=run_N == reference_N)
        return found_KN


def match_runs(
    store: Store, run_id: str, *, against: str, filters: Filters | None, unit: str
) -> MatchedRuns:
    """Find the tokens and routers that two runs of a store share.

    Prompts are matched by set_name and key where these tell every prompt apart, the others by
    rendered text (the first of equals with the first). Of their tokens those count that the filters
    leave in the run, up to the first position where the token ids differ. Routers are matched by
    layer and kind.

    Args:
        store: where both runs lie.
        run_id: the run.
        against: the reference: final checkpoint, base model, unsteered run.
        filters: which prompts, tokens and routers of the run count.
        unit: the prompt field that joins prompts into units of resampling.

    Raises:
        RunError: when there is no such run.
        AnalysisInputError: when the runs are the same, one has no routing per token, a router has
            another number of experts, or no router, prompt or token is shared.
    """
    run, reference, router_notes = _select_both(store, run_id, against, filters, unit)
    shared = shared_prompts(store, run_id, reference)
    found = read_tokens(run)
    match_T = shared.match_of(run.prompt_ids[found.prompts])
    same_T = shared.is_same(match_T, found.positions)
    if not same_T.any():
        raise shared.nothing_shared(run.prompt_ids, run.filters.describe())
    notes = (
        *run.notes,
        *(f"Run {against!r}: {note}" for note in reference.notes),
        *shared.notes(run.prompt_ids, match_T, int(same_T.sum())),
        *router_notes,
    )
    used_P, prompts_T = np.unique(found.prompts[same_T], return_inverse=True)
    tokens = Tokens(prompts=prompts_T, positions=found.positions[same_T], columns={})
    run = _with_prompts(run, used_P)
    match_P = shared.match_of(run.prompt_ids)
    partner_ids_P = shared.partner_ids[match_P]
    reference = _with_prompts(
        reference, np.flatnonzero(np.isin(reference.prompt_ids, partner_ids_P))
    )
    recorded = [_recorded(selection) for selection in (run, reference)]
    return MatchedRuns(
        run=run,
        reference=reference,
        partners=np.searchsorted(reference.prompt_ids, partner_ids_P),
        tokens=tokens,
        units=unit_labels(run.prompts, unit),
        has_ranks=all(ranks for ranks, _ in recorded),
        has_weights=all(weights for _, weights in recorded),
        blocks=tuple(_blocks((run, reference), tokens, shared, match_P)),
        notes=notes,
    )


def read_pairs(matched: MatchedRuns, *, weights: bool) -> Iterator[PairedSlots]:
    """Go through the routing of both runs: block by block, in each all routers in turn.

    Args:
        matched: of `match_runs`.
        weights: whether to fetch routing weights; both runs must have them.
    """
    for first, last in matched.blocks:
        positions = matched.tokens.positions[first:last]
        prompts_N = matched.tokens.prompts[first:last]
        sides = (
            (matched.run, prompts_N),
            (matched.reference, matched.partners[prompts_N]),
        )
        blocks = []
        for selection, of_token in sides:
            some = Tokens(prompts=of_token, positions=positions, columns={})
            (block,) = read_slots(selection, some, weights=weights)
            blocks.append(block)
        routers = zip(matched.run.routers, matched.reference.routers, strict=True)
        for index, pair in enumerate(routers):
            yield _paired(index, pair, (blocks[0], blocks[1]), prompts_N)


def _paired(
    index: int,
    routers: tuple[Router, Router],
    blocks: tuple[SlotBlock, SlotBlock],
    prompts_N: IntArray,
) -> PairedSlots:
    """One router's slots, without the tokens that did not pass it in both runs."""
    experts = [block.experts[router] for block, router in zip(blocks, routers, strict=True)]
    weights = [
        block.weights.get(router, np.empty((len(prompts_N), 0), dtype=np.float32))
        for block, router in zip(blocks, routers, strict=True)
    ]
    num_experts = routers[0].num_experts
    passed_N = (experts[0][:, 0] < num_experts) & (experts[1][:, 0] < num_experts)
    if not passed_N.all():
        experts = [experts_NK[passed_N] for experts_NK in experts]
        weights = [weights_NK[passed_N] for weights_NK in weights]
        prompts_N = prompts_N[passed_N]
    # Slots first: operations along the tokens are then on neighboring memory.
    run_KN, reference_JN = (np.ascontiguousarray(experts_NK.T) for experts_NK in experts)
    run_weights_KN, reference_weights_JN = (
        np.ascontiguousarray(weights_NK.T) for weights_NK in weights
    )
    reference_JN[reference_JN == num_experts] = num_experts + 1
    return PairedSlots(
        router=index,
        num_experts=num_experts,
        prompts=prompts_N,
        run=run_KN,
        reference=reference_JN,
        run_weights=run_weights_KN,
        reference_weights=reference_weights_JN,
    )


def _select_both(
    store: Store, run_id: str, against: str, filters: Filters | None, unit: str
) -> tuple[Selection, Selection, tuple[str, ...]]:
    """The run as filtered and the whole reference, with the routers that both have; notes."""
    if against == run_id:
        raise AnalysisInputError(f"run {run_id!r} is compared with itself; name another run")
    run = select(store, run_id, filters or Filters(), fields=[unit])
    reference = select(store, against, Filters(content_only=False), fields=IDENTITY)
    for selection in (run, reference):
        selection.require_routing("a comparison of two runs")
    return _share_routers(run, reference)


def _with_prompts(selection: Selection, kept_P: IntArray) -> Selection:
    """A selection of some of its prompts."""
    return replace(selection, prompts=selection.prompts.iloc[kept_P].reset_index(drop=True))


def _blocks(
    selections: tuple[Selection, Selection],
    tokens: Tokens,
    shared: SharedPrompts,
    match_P: IntArray,
) -> Iterator[tuple[int, int]]:
    """First and last token of each block: whole prompts, one after the other in both runs.

    A block is cut where the reference has its prompts in another order, or where too many prompts
    that do not count lie between, so that what is fetched at a time stays bounded.
    """
    most = min(
        max(1, token_slots.SLOTS_PER_READ // sum(router.top_k for router in selection.routers))
        for selection in selections
    )
    edges = np.append(np.flatnonzero(np.diff(tokens.prompts, prepend=-1)), len(tokens))
    spans = [
        (starts[match_P], ends[match_P])
        for starts, ends in (shared.run_spans, shared.reference_spans)
    ]
    order = spans[1][0]
    first = 0
    for index in range(1, len(match_P)):
        is_long = edges[index + 1] - edges[first] > most
        is_wide = any(
            ends[index] - starts[first] > MOST_READ_ALONG * most for starts, ends in spans
        )
        if is_long or is_wide or order[index] < order[index - 1]:
            yield int(edges[first]), int(edges[index])
            first = index
    yield int(edges[first]), int(edges[-1])


def _share_routers(
    run: Selection, reference: Selection
) -> tuple[Selection, Selection, tuple[str, ...]]:
    """Both selections with the routers that both have, in the order of the run."""
    theirs = {(router.layer, router.kind): router for router in reference.routers}
    pairs = [
        (router, theirs[router.layer, router.kind])
        for router in run.routers
        if (router.layer, router.kind) in theirs
    ]
    if not pairs:
        raise AnalysisInputError(
            f"runs {run.run_id!r} and {reference.run_id!r} share no router: {_named(run.routers)} "
            f"against {_named(reference.routers)}"
        )
    for own, other in pairs:
        if own.num_experts != other.num_experts:
            raise AnalysisInputError(
                f"the {own.kind} router of layer {own.layer} has {own.num_experts} experts in run "
                f"{run.run_id!r} and {other.num_experts} in {reference.run_id!r}; runs of the same "
                "architecture can be compared"
            )
    shared = {(own.layer, own.kind) for own, _ in pairs}
    filters = run.filters
    notes = []
    for selection in (run, reference):
        alone = [
            router
            for router in selection.routers
            if (router.layer, router.kind) not in shared
            # What the filters leave out of the run is not missing in it.
            and filters.kind in (None, router.kind)
            and (filters.layers is None or router.layer in filters.layers)
        ]
        if alone:
            notes.append(f"Routers only in run {selection.run_id!r}, left out: {_named(alone)}.")
    return (
        replace(run, routers=tuple(own for own, _ in pairs)),
        replace(reference, routers=tuple(other for _, other in pairs)),
        tuple(notes),
    )


def _named(routers: Sequence[Router]) -> str:
    """`mlp layers 0, 1; attention layers 3`."""
    kinds: dict[str, list[str]] = {}
    for router in routers:
        kinds.setdefault(router.kind, []).append(str(router.layer))
    return "; ".join(f"{kind} layers {', '.join(layers)}" for kind, layers in kinds.items())


def _recorded(selection: Selection) -> tuple[bool, bool]:
    """Whether a run has ranks, and weights, for all tokens of these routers."""
    facts = selection.store.arrow(
        "SELECT bool_and(is_ranked) AS ranks, "
        "bool_and(weights IS NOT NULL OR bf16_weights IS NOT NULL) AS weights "
        f"FROM routing_arrays WHERE run_id = ? AND {router_condition(selection.routers)}",
        [selection.run_id],
    ).to_pylist()[0]
    return bool(facts["ranks"]), bool(facts["weights"])
