"""Strategies that go by all experts of a layer: those that a task needs, and only these.

ESFT (Wang et al., arXiv 2407.01906) chooses, per layer, the experts that a task uses most; its
authors then train them. Here the choice becomes a plan: the model keeps nothing else (pruning to a
domain), or uses them more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final, Literal, Unpack

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.steering.check import RoutedLayer
from moescope.steering.draft import CommonOptions, Draft
from moescope.steering.plan import SteeringPlan
from moescope.steering.ranked import RankedExpert, router_of

ESFT: Final = "ESFT, arXiv 2407.01906: its choice of experts; steering by it is ours"
KEEP: Final = (
    "pruning to a domain, as in EASY-EP, arXiv 2504.06792: best experts of each layer stay"
)

_RATHER_SCORE = ("score", "effect", "risk_difference", "delta")


def esft(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    use: Literal["scale", "force", "keep"] = "scale",
    beta: float = 2.0,
    via: Literal["min", "inf", "selection"] = "inf",
    **common: Unpack[CommonOptions],
) -> SteeringPlan:
    """Act on the experts that ESFT chose for a task.

    Args:
        frame: a contrast of method `esft_token` or `esft_gate`, or any with `candidate`.
        layers: the model's routed layers; `keep` needs them, and `force` leaves out what a layer
            has no room for.
        use: `scale`: their routing weights times beta; `force`: always selected, with the weight
            of their own score; `keep`: all others are masked.
        beta: the factor of `scale`, over 0.
        via: of the masks of `keep`.
        **common: see `CommonOptions`; of candidates only confirmed ones count if that is asked for.

    Raises:
        PlanError: no column `candidate`, or no candidates.
    """
    parameters: dict[str, Any] = {"use": use}
    if use not in ("scale", "force", "keep"):
        raise PlanError(f"use {use!r} is not available; available: scale, force, keep")
    if use == "keep":
        draft = _draft("esft", ESFT, frame, layers, parameters | {"via": via}, common)
        _keep(draft, None, via)
        return draft.plan()
    if use == "scale":
        if not (math.isfinite(beta) and beta > 0):
            raise PlanError(f"beta is {beta:g}; it must be over 0")
        parameters["beta"] = beta
    draft = _draft("esft", ESFT, frame, layers, parameters, common)
    chosen = _candidates(draft)
    if use == "scale":
        draft.add(chosen, action="scale", value=beta)
    else:
        draft.add(draft.at_most_k(chosen), action="force", strength="natural")
    return draft.plan()


def keep(
    frame: pd.DataFrame,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    per_layer: int | None = None,
    via: Literal["min", "inf", "selection"] = "inf",
    **common: Unpack[CommonOptions],
) -> SteeringPlan:
    """Mask every expert of a layer that the table does not keep.

    Layers that the table does not hold stay as they are. No layer keeps fewer experts than a token
    selects: where candidates are fewer, the next of the ranking are kept too, which is told.

    Args:
        frame: a number per expert; without `per_layer` also `candidate`.
        layers: the model's routed layers; needed, since they say which experts there are.
        per_layer: how many of each layer are kept, the largest numbers first (whatever their
            sign); by default the candidates.
        via: of the masks; with `inf` the weights are those of a model without the masked experts.
        **common: see `CommonOptions`.

    Raises:
        PlanError: no layers are given, too few experts have a number, or nothing would be masked.
    """
    parameters = {"per_layer": per_layer, "via": via}
    draft = _draft("keep", KEEP, frame, layers, parameters, common)
    _keep(draft, per_layer, via)
    return draft.plan()


def _draft(
    strategy: str,
    source: str,
    frame: pd.DataFrame,
    layers: Sequence[RoutedLayer] | None,
    parameters: dict[str, Any],
    common: CommonOptions,
) -> Draft:
    """All experts take part unless the user says otherwise: also unconfirmed ones fill a layer."""
    if common.get("confirmed_only") is None:
        common = {**common, "confirmed_only": False}
    return Draft(strategy, source, frame, layers, parameters, common, wanted=_RATHER_SCORE)


def _candidates(draft: Draft) -> list[RankedExpert]:
    if "candidate" not in draft.ranking.columns:
        raise PlanError("the table has no column 'candidate', which says what a method chose")
    chosen = [one for one in draft.ranking.largest_first() if one.is_candidate]
    if not chosen:
        raise PlanError("the table has no candidates: its method chose no expert")
    return chosen


def _keep(draft: Draft, per_layer: int | None, via: str) -> None:
    """Mask what is neither among the first of its layer nor a candidate."""
    if draft.layers is None:
        raise PlanError("keeping experts needs the model's layers: they say which are to go")
    if per_layer is None:
        _candidates(draft)
    by_router: dict[tuple[int, str | None], list[RankedExpert]] = defaultdict(list)
    for one in draft.ranking.largest_first():
        by_router[one.router].append(one)
    for (layer, kind), ranked in sorted(by_router.items(), key=lambda item: item[1][0].place):
        router = router_of(layer, kind, draft.layers)
        kept = _kept(draft, ranked, router, per_layer)
        masked = [expert for expert in range(router.num_experts) if expert not in kept]
        if masked:
            draft.add_ids(router, masked, action="mask", mode="replace", via=via)
        else:
            draft.note(f"layer {layer} keeps all its {router.num_experts} experts")
    untouched = sorted({router.layer for router in draft.layers} - {at for at, _ in by_router})
    if untouched:
        draft.note(f"not in the table or the range, so kept whole: layers {_listed(untouched)}")


def _kept(
    draft: Draft, ranked: Sequence[RankedExpert], router: RoutedLayer, per_layer: int | None
) -> set[int]:
    """The ids that a router keeps: at least as many as it selects per token."""
    if per_layer is None:
        kept = [one for one in ranked if one.is_candidate]
        missing = max(0, router.top_k - len(kept))
        others = [one for one in ranked if not one.is_candidate][:missing]
        if others:
            draft.note(
                f"layer {router.layer} has {len(kept)} candidates and selects {router.top_k}, so "
                f"the next are kept too: {_listed([one.expert for one in others])}"
            )
        kept += others
        number = router.top_k
    else:
        if per_layer < router.top_k:
            raise PlanError(
                f"{per_layer} experts of each layer are to be kept, but layer {router.layer} "
                f"selects {router.top_k} per token; keep at least {router.top_k}"
            )
        number = min(per_layer, router.num_experts)
        kept = list(ranked[:number])
    if len(kept) < number:
        raise PlanError(
            f"{number} experts of layer {router.layer} are to be kept, but the table has "
            f"{len(kept)} {draft.ranking.noun} of it with a {draft.ranking.column}"
        )
    return {one.expert for one in kept}


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
