"""A plan to look at: as a table, and as a map of layers and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pandas as pd
import plotly.graph_objects as go

from moescope.probe.errors import PlanError
from moescope.probe.figures.style import (
    CLEAR,
    escaped,
    grid_height,
    legend_above,
    map_axes,
    transparent,
)
from moescope.steering.check import RoutedLayer, layers_of
from moescope.steering.interventions import Bias, Intervention, Scale
from moescope.steering.plan import SteeringPlan
from moescope.steering.report import scope_in_words

COLUMNS: Final = ("number", "layer", "kind", "expert", "action", "setting", "tokens", "prompts")

# Action (and direction) -> color of Okabe and Ito or Tol, marker. Grey is for whole routers.
_MARKS: Final = {
    "mask": ("#D55E00", "x"),
    "force": ("#0072B2", "circle"),
    "bias up": ("#56B4E9", "triangle-up"),
    "bias down": ("#E69F00", "triangle-down"),
    "scale up": ("#009E73", "triangle-up-open"),
    "scale down": ("#CC79A7", "triangle-down-open"),
    "whole router": ("#888888", "line-ew-open"),
}


def plan_table(plan: SteeringPlan, layers: Sequence[RoutedLayer] | None = None) -> pd.DataFrame:
    """One row per intervention, layer and expert.

    Args:
        plan: any plan.
        layers: the model's routed layers; with them the kind stands there where the plan leaves
            it unsaid.

    Returns:
        `number` (of the intervention, from 1), `layer`, `kind` (missing where not known), `expert`
        (missing for interventions on a router as a whole), `action`, `setting`, `tokens`,
        `prompts` (their ids, or `all`).

    Raises:
        PlanError: the plan has a layer that is not in `layers`.
    """
    rows: list[dict[str, Any]] = []
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
            }
            for layer in one.on_layers
            for expert in one.experts or (None,)
        )  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"number": "int64", "layer": "int64", "expert": "Int64"})


def plan_map(
    plan: SteeringPlan, layers: Sequence[RoutedLayer], *, kind: str | None = None
) -> go.Figure:
    """Layers x experts: all experts of the model in grey, those of the plan marked by action.

    An intervention on a router as a whole marks all its experts.

    Args:
        plan: what to show.
        layers: the model's routed layers.
        kind: which kind of router; the first that the plan acts on by default.

    Raises:
        PlanError: the plan does not fit the layers, or there is no such kind.
    """
    table = plan_table(plan, layers)
    kinds = list(dict.fromkeys(router.kind for router in layers))
    acted_on = [*table["kind"], *kinds]
    shown = kind if kind is not None else acted_on[0] if acted_on else None
    if shown not in kinds:
        raise PlanError(
            f"the model has no routers of kind {shown!r}; it has {', '.join(kinds) or 'none'}"
        )
    routers = sorted((one for one in layers if one.kind == shown), key=lambda one: one.layer)
    figure = go.Figure()
    figure.add_trace(_background(routers))
    own = table[table["kind"] == shown]
    marks = [_mark(plan.interventions[number - 1]) for number in own["number"]]
    width = {router.layer: router.num_experts for router in routers}
    for mark in _MARKS:
        rows = own[[found == mark for found in marks]]
        if len(rows):
            figure.add_trace(_marked(mark, rows, width))
    _dress(figure, plan, routers, shown if len(kinds) > 1 else None)
    return figure


def _mark(one: Intervention) -> str:
    if isinstance(one, Bias):
        return "bias up" if one.value >= 0 else "bias down"
    if isinstance(one, Scale):
        return "scale up" if one.value >= 1 else "scale down"
    return one.action if one.experts else "whole router"


def _background(routers: Sequence[RoutedLayer]) -> go.Heatmap:
    """A pale cell per expert there is."""
    widest = max(router.num_experts for router in routers)
    cells = [[0.0 if e < one.num_experts else None for e in range(widest)] for one in routers]
    pale = transparent("#808080", 0.15)
    return go.Heatmap(
        z=cells,
        x=list(range(widest)),
        y=[one.layer for one in routers],
        colorscale=[[0, pale], [1, pale]],
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate="layer %{y}, expert %{x}: unchanged<extra></extra>",
    )


def _marked(mark: str, rows: pd.DataFrame, width: dict[int, int]) -> go.Scatter:
    color, symbol = _MARKS[mark]
    points = [
        (expert, row["layer"], f"{row['setting']}, tokens: {row['tokens']}")
        for row in rows.to_dict("records")
        for expert in (
            range(width[row["layer"]]) if pd.isna(row["expert"]) else (int(row["expert"]),)
        )
    ]
    experts, at, words = zip(*points, strict=True)
    return go.Scatter(
        x=experts,
        y=at,
        mode="markers",
        name=mark,
        marker={"color": color, "symbol": symbol, "size": 9, "line": {"width": 1, "color": color}},
        customdata=[escaped(text) for text in words],
        hovertemplate="layer %{y}, expert %{x}<br>%{customdata}<extra></extra>",
    )


def _dress(
    figure: go.Figure, plan: SteeringPlan, routers: Sequence[RoutedLayer], kind: str | None
) -> None:
    ours = f" · {kind} routers" if kind is not None else ""
    model = f"{plan.model} · " if plan.model is not None else ""
    count = len(plan.interventions)
    figure.update_layout(
        title={
            "text": escaped(f"Plan {plan.title}"),
            "subtitle": {"text": escaped(f"{model}{count} interventions{ours}")},
            "x": 0, "xref": "container", "xanchor": "left",
            "y": 1, "yref": "container", "yanchor": "top", "pad": {"l": 12, "t": 14},
        },
        height=grid_height(len(routers)),
        margin={"l": 70, "r": 30, "t": 76, "b": 60},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"bgcolor": CLEAR},
        showlegend=True,
    )  # fmt: skip
    legend_above(figure)
    map_axes(figure, [one.layer for one in routers])
