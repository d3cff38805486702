"""Plans from findings: the experts of a contrast table, and random experts as their control.

What a contrast calls group a (refused, say) is suppressed: experts that a uses more are masked,
experts that b uses more are forced (the selection of SteerMoE, arXiv 2509.09660, section 3.2).
Unlike there, an expert that the router's top-k leaves no room for is not dropped in silence: the
next one takes its place and the plan's provenance names it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from moescope.probe.errors import PlanError
from moescope.steering.check import RoutedLayer, check_shape, layers_of
from moescope.steering.plan import Intervention, SteeringPlan, TokenScope

RankColumn = Literal["effect", "risk_difference"]

_DONE = {"mask": "masked", "force": "forced"}


def plan_from_contrast(
    frame: pd.DataFrame,
    *,
    num_mask: int,
    num_force: int = 0,
    layers: Sequence[RoutedLayer] | None = None,
    confirmed_only: bool = True,
    rank_by: RankColumn | None = None,
    tokens: TokenScope = "all",
    via: Literal["min", "inf", "selection"] = "min",
    strength: Literal["max", "natural"] = "max",
    name: str | None = None,
    model: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> SteeringPlan:
    """A plan that masks what group a uses more and forces what group b uses more.

    Args:
        frame: one row per expert with `layer`, `expert`, the ranking column (or the counts
            `a1, d1, a2, d2` of active and inactive tokens in a and b), perhaps `kind` and
            `confirmed`.
        num_mask: experts to mask, largest positive effect first; ties go to the lower layer,
            then to the lower expert.
        num_force: experts to force, most negative effect first.
        layers: the model's routed layers. With them at least k experts of a layer stay unmasked
            and at most k are forced; without them nothing is known of k, and nothing is capped.
        confirmed_only: take only experts whose effect was confirmed.
        rank_by: `effect` (measured on the confirmation half) unless unconfirmed experts count,
            which have none: then `risk_difference`.
        tokens: scope of the interventions.
        via: of the masks.
        strength: of the forces.
        name: of the plan.
        model: of the plan.
        provenance: where the table comes from; what was chosen and left out is added.

    Raises:
        PlanError: a column is missing, or there are fewer experts than asked for.
    """
    if num_mask < 0 or num_force < 0 or num_mask + num_force == 0:
        raise PlanError("a plan needs experts: ask for at least one to mask or to force")
    column = rank_by or ("effect" if confirmed_only else "risk_difference")
    ranked = _ranked(frame, column, confirmed_only)
    choice = _Choice(layers, confirmed_only=confirmed_only)
    masked = choice.take(ranked, num_mask, "mask")
    forced = choice.take(_from_the_other_end(ranked), num_force, "force")
    made = {
        "ranked_by": column,
        "confirmed_only": confirmed_only,
        "num_mask": num_mask,
        "num_force": num_force,
        "effects": [
            {"layer": one.layer, "expert": one.expert, "effect": one.effect}
            for one in (*masked, *forced)
        ],
        "left_out": choice.left_out,
        "capped": layers is not None,
    }
    plan = SteeringPlan(
        name=name,
        model=model,
        provenance={**(provenance or {}), **made},
        interventions=[
            *_interventions(masked, frame, {"action": "mask", "via": via, "tokens": tokens}),
            *_interventions(
                forced, frame, {"action": "force", "strength": strength, "tokens": tokens}
            ),
        ],
    )
    if layers is not None:
        check_shape(plan, layers)
    return plan


def read_contrast_table(path: str | Path) -> pd.DataFrame:
    """A table of experts from a .csv, .parquet or .json file.

    Raises:
        PlanError: the file is missing, of another format, or has no columns layer and expert.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], object]] = {
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
        ".json": pd.read_json,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PlanError(f"{path}: a contrast table is a .csv, .parquet or .json file")
    if not path.is_file():
        raise PlanError(f"{path}: there is no such table")
    try:
        frame = reader(path)
    except (ValueError, OSError) as error:  # pyarrow's and pandas' parsing errors are ValueErrors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PlanError(f"{path}: this is no {path.suffix} table ({reason[0]})") from error
    if not isinstance(frame, pd.DataFrame):
        raise PlanError(f"{path}: this holds no table of experts")
    _require(frame, ("layer", "expert"), str(path))
    return frame


def random_plan(plan: SteeringPlan, layers: Sequence[RoutedLayer], seed: int) -> SteeringPlan:
    """The same plan with other experts of the same layers, drawn at random: its control.

    Each of the plan's experts in a layer is replaced by one drawn from the experts that the plan
    does not name there, one to one over all interventions, so that numbers, scopes and settings
    stay; interventions on a router as a whole stay as they are. Where too few others are left,
    experts of the plan fill up and the provenance says so.

    Raises:
        PlanError: the plan does not fit the layers.
    """
    check_shape(plan, layers)
    rng = np.random.default_rng(seed)
    own: dict[tuple[int, str], set[int]] = defaultdict(set)
    routers: dict[tuple[int, str], RoutedLayer] = {}
    for number, one in enumerate(plan.interventions, start=1):
        for router in layers_of(plan, number, layers):
            own[router.layer, router.kind].update(one.experts)
            routers[router.layer, router.kind] = router
    drawn: dict[tuple[int, str], dict[int, int]] = {}
    overlap: list[dict[str, Any]] = []
    for (layer, kind), experts in sorted(own.items()):
        others = sorted(set(range(routers[layer, kind].num_experts)) - experts)
        chosen = rng.permutation(others)[: len(experts)].tolist()
        if missing := len(experts) - len(chosen):
            chosen += rng.permutation(sorted(experts))[:missing].tolist()
            overlap.append({"layer": layer, "kind": kind, "num_own_experts": missing})
        drawn[layer, kind] = dict(zip(sorted(experts), chosen, strict=True))
    interventions: list[Intervention] = []
    for number, one in enumerate(plan.interventions, start=1):
        if not one.experts:
            interventions.append(one)
            continue
        for router in layers_of(plan, number, layers):
            replaced = drawn[router.layer, router.kind]
            experts_now = tuple(sorted(replaced[expert] for expert in one.experts))
            change = {"experts": experts_now, "layer": router.layer, "layers": None}
            interventions.append(one.model_copy(update=change))
    return SteeringPlan(
        name=f"random control of {plan.title}, seed {seed}",
        model=plan.model,
        provenance={
            "control": "random",
            "of": plan.plan_id,
            "seed": seed,
            "excludes_own_experts": not overlap,
            "overlap": overlap,
        },
        interventions=interventions,
    )


@dataclass(frozen=True)
class _Chosen:
    """One expert of the table that goes into the plan."""

    layer: int
    kind: str | None
    expert: int
    effect: float


class _Choice:
    """Takes experts in the order of a ranking as far as each layer has room."""

    def __init__(self, layers: Sequence[RoutedLayer] | None, *, confirmed_only: bool) -> None:
        self.layers = layers
        self.left_out: list[dict[str, Any]] = []
        self._which = "confirmed experts" if confirmed_only else "experts"
        self._taken: dict[tuple[str, int, str | None], int] = defaultdict(int)

    def take(
        self, ranked: pd.DataFrame, number: int, action: Literal["mask", "force"]
    ) -> list[_Chosen]:
        """The first `number` experts of the ranking on the side of the action."""
        sign = 1 if action == "mask" else -1
        chosen: list[_Chosen] = []
        num_left_out = 0
        for row in ranked.to_dict("records"):
            if len(chosen) == number or sign * row["rank_value"] <= 0:
                break
            one = _Chosen(
                int(row["layer"]), row.get("kind"), int(row["expert"]), float(row["rank_value"])
            )
            limit = self._limit(one, action)
            if limit is not None and self._taken[action, one.layer, one.kind] >= limit:
                num_left_out += 1
                reason = f"{limit} experts of this layer are {_DONE[action]} already, all it allows"
                self.left_out.append({"layer": one.layer, "expert": one.expert, "reason": reason})
                continue
            self._taken[action, one.layer, one.kind] += 1
            chosen.append(one)
        if len(chosen) < number:
            group = "a" if action == "mask" else "b"
            room = f" ({num_left_out} more do not fit their layers)" if num_left_out else ""
            raise PlanError(
                f"{number} experts are to be {_DONE[action]}, but the table has {len(chosen)} "
                f"{self._which} that group {group} uses more{room}; ask for at most {len(chosen)}"
            )
        return chosen

    def _limit(self, one: _Chosen, action: Literal["mask", "force"]) -> int | None:
        """How many experts of this layer the action can have, or None where k is not known."""
        if self.layers is None:
            return None
        for router in self.layers:
            if router.layer == one.layer and one.kind in (None, router.kind):
                if one.expert >= router.num_experts:
                    raise PlanError(
                        f"the table has expert {one.expert} of layer {one.layer}, but the model "
                        f"has {router.num_experts} experts there: it is a table of another model"
                    )
                return router.num_experts - router.top_k if action == "mask" else router.top_k
        raise PlanError(
            f"the table has layer {one.layer}, where the model has no router: it is a table of "
            "another model, or counts layers differently"
        )


def _ranked(frame: pd.DataFrame, column: str, confirmed_only: bool) -> pd.DataFrame:
    """Rows with a value to rank by, in `rank_value`, largest first; ties by layer and expert."""
    _require(frame, ("layer", "expert"), "the table")
    if confirmed_only:
        if "confirmed" not in frame.columns:
            raise PlanError(
                "the table has no column 'confirmed'; make it with moescope contrast, or allow "
                "unconfirmed experts"
            )
        frame = frame[_is_true(frame["confirmed"])]
    if column in frame.columns:
        values = frame[column]
    elif {"a1", "d1", "a2", "d2"} <= set(frame.columns):
        values = frame["a1"] / (frame["a1"] + frame["d1"]) - frame["a2"] / (
            frame["a2"] + frame["d2"]
        )
    else:
        raise PlanError(
            f"the table has neither a column {column!r} nor the counts a1, d1, a2, d2 to rank by"
        )
    ranked = frame.assign(rank_value=pd.to_numeric(values, errors="coerce"))
    ranked = ranked[ranked["rank_value"].notna()]
    if ranked.duplicated([name for name in ("layer", "kind", "expert") if name in ranked]).any():
        raise PlanError("the table names an expert twice; it needs one row per expert")
    return ranked.sort_values(["rank_value", "layer", "expert"], ascending=[False, True, True])


def _from_the_other_end(ranked: pd.DataFrame) -> pd.DataFrame:
    return ranked.sort_values(["rank_value", "layer", "expert"])


def _is_true(column: pd.Series[Any]) -> pd.Series[bool]:
    """A column of truth values, also as text or numbers; missing ones are false."""
    return column.map(lambda value: str(value).strip().lower() in ("true", "1", "1.0", "yes"))


def _interventions(
    chosen: Sequence[_Chosen], frame: pd.DataFrame, settings: Mapping[str, Any]
) -> list[Intervention]:
    """One intervention per router; the kind is named where a layer has more than one."""
    by_router: dict[tuple[int, str | None], list[int]] = defaultdict(list)
    for one in chosen:
        by_router[one.layer, one.kind].append(one.expert)
    has_kinds = "kind" in frame.columns
    num_kinds = frame.groupby("layer")["kind"].nunique().to_dict() if has_kinds else {}
    return [
        Intervention(
            layer=layer,
            kind=kind if num_kinds.get(layer, 1) > 1 else None,
            experts=sorted(experts),
            **settings,
        )
        for (layer, kind), experts in sorted(by_router.items(), key=lambda item: str(item[0]))
    ]


def _require(frame: pd.DataFrame, columns: Sequence[str], place: str) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise PlanError(
            f"{place} has no column {' and no column '.join(map(repr, missing))}; it has "
            f"{', '.join(map(str, frame.columns))}"
        )
