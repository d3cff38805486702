"""A plan to look at: as a table, and as a map of layers and experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeGuard

import pandas as pd
import plotly.graph_objects as go

from moescope.probe.errors import PlanError
from moescope.probe.figures.heading import set_heading
from moescope.probe.figures.style import (
    counted,
    escaped,
    grid_height,
    map_axes,
    transparent,
)
from moescope.steering.check import LayerShape, RoutedLayer, check_shape, layers_of
from moescope.steering.interventions import Bias, Intervention, Scale
from moescope.steering.plan import SteeringPlan
from moescope.steering.report import scope_in_words

COLUMNS: Final = (
    "number", "layer", "kind", "expert", "action", "setting", "tokens", "prompts", "basis",
    "basis_value",
)  # fmt: skip

# Action (and direction) -> color of Okabe and Ito or Tol, marker.
_MARKS: Final = {
    "mask": ("#D55E00", "x"),
    "force": ("#0072B2", "circle"),
    "bias up": ("#56B4E9", "triangle-up"),
    "bias down": ("#E69F00", "triangle-down"),
    "scale up": ("#009E73", "triangle-up-open"),
    "scale down": ("#CC79A7", "triangle-down-open"),
    "whole router": ("#882255", "line-ew-open"),
}
_SIZES: Final = (6.0, 13.0)
_MOST_WITH_GAPS: Final = 64

# Layer, kind of router, expert; None where not told.
_Place: TypeAlias = tuple[int, str | None, int | None]


def plan_table(plan: SteeringPlan, layers: Sequence[RoutedLayer] | None = None) -> pd.DataFrame:
    """One row per intervention, layer and expert.

    Args:
        plan: any plan.
        layers: the model's routed layers; with them the kind stands there where the plan leaves
            it unsaid.

    Returns:
        `number` (of the intervention, from 1), `layer`, `kind` (missing where not known), `expert`
        (missing for interventions on a router as a whole), `action`, `setting`, `tokens`,
        `prompts` (their ids, or `all`); `basis` and `basis_value`, where the plan's provenance has
        them: the name of the number by which the expert was chosen (`effect`, `load`, ...), in the
        unit of the table that it comes from, and the number.

    Raises:
        PlanError: the plan has a layer that is not in `layers`.
    """
    rows: list[dict[str, Any]] = []
    reasons = _reasons(plan)
    for number, one in enumerate(plan.interventions, start=1):
        prompts = "all" if one.prompt_ids is None else ", ".join(map(str, one.prompt_ids))
        kinds: dict[int, str | None] = dict.fromkeys(one.on_layers, one.kind)
        if layers is not None:
            kinds = {router.layer: router.kind for router in layers_of(plan, number, layers)}
        rows.extend(
            {
                "number": number, "layer": layer, "kind": kinds[layer], "expert": expert,
                "action": one.action, "setting": one.setting,
                "tokens": scope_in_words(one.tokens), "prompts": prompts,
                **(reasons.get((layer, kinds[layer], expert)) or reasons.get((layer, None, expert))
                   or {}),
            }
            for layer in one.on_layers
            for expert in one.experts or (None,)
        )  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    kept = {"number": "int64", "layer": "int64", "expert": "Int64", "basis_value": "float64"}
    return table.astype(kept)


def plan_map(
    plan: SteeringPlan, layers: Sequence[RoutedLayer] | None = None, *, kind: str | None = None
) -> go.Figure:
    """Layers x experts: all experts of the model in grey, those of the plan marked by action.

    An intervention on a router as a whole marks all its experts. Marks are larger where the number
    by which an expert was chosen is larger, as far as the plan's provenance has it.

    Args:
        plan: what to show.
        layers: the model's routed layers; without them only what the plan names is drawn, for
            what else the model has is not known.
        kind: which kind of router; the first that the plan acts on by default.

    Raises:
        PlanError: the plan does not fit the layers, or there is no such kind.
    """
    known = layers is not None
    if layers is None:
        layers = _named_layers(plan)
    else:
        check_shape(plan, layers)
    table = plan_table(plan, layers)
    kinds = list(dict.fromkeys(router.kind for router in layers))
    acted_on = [*table["kind"], *kinds]
    shown = kind if kind is not None else acted_on[0] if acted_on else None
    if layers and shown not in kinds:
        raise PlanError(f"the model has no routers of kind {shown!r}; it has {', '.join(kinds)}")
    routers = sorted((one for one in layers if one.kind == shown), key=lambda one: one.layer)
    own = table[table["kind"] == shown]
    figure = go.Figure()
    if routers:
        figure.add_trace(_background(routers, known=known))
    marks = [_mark(plan.interventions[number - 1]) for number in own["number"]]
    width = {router.layer: router.num_experts for router in routers}
    for mark in _MARKS:
        rows = own[[found == mark for found in marks]]
        if len(rows):
            figure.add_trace(_marked(mark, rows, width, _largest(own)))
    about = _about(plan, own, shown if len(kinds) > 1 else None, known=known)
    set_heading(
        figure, f"Plan {plan.title}", about, plot_height=min(grid_height(len(routers)), 760)
    )
    map_axes(figure, [one.layer for one in routers])
    if routers:
        _fit_axes(figure, routers)
    figure.update_layout(showlegend=True)
    return figure


def kinds_of(plan: SteeringPlan, layers: Sequence[RoutedLayer]) -> list[str]:
    """The kinds of routers that a model has, those that the plan acts on first."""
    acted_on = plan_table(plan, layers)["kind"].tolist()
    return list(dict.fromkeys([*acted_on, *(router.kind for router in layers)]))


def _reasons(plan: SteeringPlan) -> dict[_Place, dict[str, Any]]:
    """Router and expert -> `basis` and `basis_value`, from the provenance.

    Tables leave `effects` (of `plan_from_contrast`) or `chosen` (of a strategy), controls matched
    on load leave `pairs`. Provenance is anybody's JSON: what does not look so is passed over.
    """
    ranked_by = plan.provenance.get("ranked_by")
    column = ranked_by if isinstance(ranked_by, str) else "value"
    found: dict[_Place, dict[str, Any]] = {}
    for part, expert_key, value_key, name in (
        ("effects", "expert", "effect", column),
        ("chosen", "expert", "value", column),
        ("pairs", "control", "control_load", "load"),
    ):
        rows = plan.provenance.get(part)
        for row in rows if isinstance(rows, list) else ():
            if not isinstance(row, Mapping):
                continue
            layer, expert, value = row.get("layer"), row.get(expert_key), row.get(value_key)
            kind = row.get("kind")
            if _is_index(layer) and _is_index(expert) and isinstance(value, int | float):
                at = (layer, kind if isinstance(kind, str) else None, expert)
                found[at] = {"basis": name, "basis_value": float(value)}
    return found


def _is_index(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _named_layers(plan: SteeringPlan) -> list[LayerShape]:
    """Routers as small as the plan allows; `top_k` is 1, for nothing is known of it."""
    experts: dict[tuple[int, str], int] = defaultdict(int)
    for one in plan.interventions:
        for layer in one.on_layers:
            at = (layer, one.kind or "mlp")
            experts[at] = max([experts[at], 1, *(expert + 1 for expert in one.experts)])
    widest = max(experts.values(), default=1)
    return [LayerShape(layer, kind, widest, 1) for layer, kind in sorted(experts)]


def _mark(one: Intervention) -> str:
    if isinstance(one, Bias):
        return "bias up" if one.value >= 0 else "bias down"
    if isinstance(one, Scale):
        return "scale up" if one.value >= 1 else "scale down"
    return one.action if one.experts else "whole router"


def _background(routers: Sequence[RoutedLayer], *, known: bool) -> go.Heatmap:
    """A pale cell per expert there is; none where that is not known."""
    widest = max(router.num_experts for router in routers)
    cells = [[0.0 if e < one.num_experts else None for e in range(widest)] for one in routers]
    pale = transparent("#808080", 0.18 if known else 0.05)
    return go.Heatmap(
        z=cells,
        x=list(range(widest)),
        y=[one.layer for one in routers],
        colorscale=[[0, pale], [1, pale]],
        showscale=False,
        xgap=1 if widest <= _MOST_WITH_GAPS else 0,
        ygap=1,
        hovertemplate="layer %{y}, expert %{x}: not acted on<extra></extra>",
    )


def _largest(own: pd.DataFrame) -> float:
    """The largest number by which an expert was chosen, or 0."""
    values = own["basis_value"].abs()
    return float(values.max()) if values.notna().any() else 0.0


def _marked(mark: str, rows: pd.DataFrame, width: Mapping[int, int], largest: float) -> go.Scatter:
    color, symbol = _MARKS[mark]
    points = [
        (expert, row["layer"], _in_words(row), _size(row["basis_value"], largest))
        for row in rows.to_dict("records")
        for expert in (
            range(width[row["layer"]]) if pd.isna(row["expert"]) else (int(row["expert"]),)
        )
    ]
    experts, at, words, sizes = zip(*points, strict=True)
    return go.Scatter(
        x=experts,
        y=at,
        mode="markers",
        name=f"{mark} ({len(rows)})",
        marker={
            "color": color, "symbol": symbol, "size": sizes, "opacity": 1,
            "line": {"width": 1, "color": color},
        },
        customdata=[escaped(text) for text in words],
        hovertemplate="layer %{y}, expert %{x}<br>%{customdata}<extra></extra>",
    )  # fmt: skip


def _in_words(row: Mapping[Any, Any]) -> str:
    """What is done, on which tokens and prompts, and why."""
    parts = [str(row["setting"]), f"tokens: {row['tokens']}"]
    if row["prompts"] != "all":
        parts.append(f"prompts: {row['prompts']}")
    if not pd.isna(row["basis_value"]):
        parts.append(f"{row['basis']} {row['basis_value']:+.4g}")
    return ", ".join(parts)


def _size(value: float, largest: float) -> float:
    least, most = _SIZES
    if pd.isna(value) or not largest:
        return (least + most) / 2
    return least + (most - least) * abs(value) / largest


def _about(plan: SteeringPlan, own: pd.DataFrame, kind: str | None, *, known: bool) -> str:
    """Model, how much is acted on, and what the marks say."""
    experts = own.dropna(subset="expert")[["layer", "expert"]].drop_duplicates()
    parts = [
        plan.model or "any model",
        counted(len(plan.interventions), "intervention"),
        f"{counted(len(experts), 'expert')} in {counted(own['layer'].nunique(), 'layer')}",
        f"id\u00a0{plan.plan_id}",
    ]
    if kind is not None:
        parts.append(f"{kind} routers")
    if _largest(own):
        parts.append(f"larger marks: larger {own['basis'].dropna().iloc[0]}")
    if not known:
        parts.append("only what the plan names is drawn")
    return " · ".join(parts)


def _fit_axes(figure: go.Figure, routers: Sequence[RoutedLayer]) -> None:
    """End the axes with the cells; marks alone would push them outward."""
    widest = max(router.num_experts for router in routers)
    layers = [router.layer for router in routers]
    figure.update_xaxes(range=[-0.5, widest - 0.5])
    figure.update_yaxes(range=[min(layers) - 0.5, max(layers) + 0.5])
