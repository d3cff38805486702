"""Figure of a sweep: what each cell reaches against what it costs, beside all controls.

An effect within the range of the controls is none of the experts chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.probe.errors import PlanError
from moescope.probe.figures.heading import set_heading
from moescope.probe.figures.style import (
    LINE_COLORS,
    NEUTRAL,
    SYMBOLS,
    counted,
    escaped,
    transparent,
)
from moescope.steering.condition_names import condition_in_words, kind_in_words
from moescope.steering.evaluation import STEERED, UNSTEERED
from moescope.steering.stored_sweeps import StoredSweep
from moescope.steering.sweep_series import about_sweep, series_of
from moescope.steering.sweep_table import Goal

SideEffect = Literal["neutral_correct", "kl_answer"]

_GOALS: Final[Mapping[str, tuple[str, ...]]] = {
    "correct": ("correct",), "complied": ("correct", "other"), "refused": ("refused",),
}  # fmt: skip
_SIDE_EFFECTS: Final = {
    "neutral_correct": "right neutral answers lost, points",
    "kl_answer": "KL of neutral answers, nats a token",
}
_CONTROL_SYMBOLS: Final = {
    "random": "x-thin-open", "load-matched": "diamond-open", "bottom": "triangle-down-open",
}  # fmt: skip
_BEST: Final = "#E69F00"
_BUDGET: Final = "#D55E00"


def side_effects_of(conditions: pd.DataFrame) -> list[SideEffect]:
    """The side effects that a sweep measured, that to look at first before the other."""
    steered = conditions[conditions["condition"] == STEERED]
    before = conditions[conditions["condition"] == UNSTEERED]
    found: list[SideEffect] = []
    if "neutral_correct" in conditions and (before["neutral_correct"] > 0).any():
        found.append("neutral_correct")
    if "kl_answer" in conditions and steered["kl_answer"].notna().any():
        found.append("kl_answer")
    return found


def sweep_tradeoff(
    conditions: pd.DataFrame,
    sweep: StoredSweep,
    group: str,
    *,
    goal: Goal = "correct",
    side_effect: SideEffect | None = None,
    budget: float | None = None,
    best: str | None = None,
) -> go.Figure:
    """Effect against side effect: up is more of what is wanted, right is more harm.

    One point a cell with 95 % intervals (bootstrap over units; a goal of two outcomes has none up),
    its number of experts beside it; grey points are the controls, the band their range.

    Args:
        conditions: of `sweep_conditions`.
        sweep: what they are of.
        group: the label that they were made for.
        goal: what is wanted.
        side_effect: across; the first that was measured by default.
        budget: by how many points right neutral answers may fall; a line.
        best: evaluation id of the cell to mark.

    Raises:
        PlanError: the sweep measured no such side effect.
    """
    measured = side_effects_of(conditions)
    across = side_effect or (measured[0] if measured else None)
    if across not in measured:
        raise PlanError(
            f"sweep {sweep.name!r} has no side effects to draw: it needs neutral prompts"
            + (f" with known answers, for {across}" if across == "neutral_correct" else "")
        )
    points = _tradeoff_points(conditions, goal, across)
    cells, controls = points[points["control"].isna()], points[points["control"].notna()]
    span = _span(points, budget if across == "neutral_correct" else None, _least(across))
    figure = go.Figure()
    if len(controls):
        figure.add_trace(_range_of_controls(controls, span))
    for kind, rows in controls.groupby("control", sort=False):
        figure.add_trace(_control_points(str(kind), rows))
    series = list(cells.groupby("series", sort=False))
    for at, (name, rows) in enumerate(series):
        figure.add_trace(_cell_points(str(name), rows, at, controls["y"]))
    _mark_best(figure, cells, best)
    if budget is not None and across == "neutral_correct":
        _draw_budget(figure, budget, span)
    set_heading(
        figure, f"Effect and side effects, {group} prompts",
        about_sweep(sweep, conditions, "95 % intervals by bootstrap over pairs"), plot_height=520,
    )  # fmt: skip
    figure.update_xaxes(title_text=_SIDE_EFFECTS[str(across)], range=span, zeroline=True)
    figure.update_yaxes(title_text=f"change of {goal} answers, points", zeroline=True)
    return figure


def _tradeoff_points(conditions: pd.DataFrame, goal: Goal, across: SideEffect) -> pd.DataFrame:
    """Steered and controls: x, y and their intervals, in points and nats."""
    frame = conditions.assign(series=series_of(conditions, with_strength=True))
    frame = frame[frame["condition"] != UNSTEERED].copy()
    wanted = _GOALS[goal]
    frame["y"] = 100 * sum(frame[f"{outcome}_change"] for outcome in wanted)
    is_single = len(wanted) == 1
    for end in ("low", "high"):
        change = frame[f"{wanted[0]}_change_{end}"]
        frame[f"y_{end}"] = 100 * change if is_single else np.nan
    if across == "kl_answer":
        for end in ("", "_low", "_high"):
            frame[f"x{end}"] = frame[f"kl_answer{end}"]
    else:
        frame["x"] = -100 * frame["neutral_correct_change"]
        frame["x_low"] = -100 * frame["neutral_correct_change_high"]
        frame["x_high"] = -100 * frame["neutral_correct_change_low"]
    return frame


def _least(across: str | None) -> float:
    """What the axis shows at least, so that noise around nothing does not fill the figure."""
    return 10.0 if across == "neutral_correct" else 1e-4


def _span(points: pd.DataFrame, budget: float | None, least: float) -> list[float]:
    """The range across: all intervals, the budget, and some room."""
    steered = points[points["control"].isna()]
    low = float(np.nanmin([0.0, *points["x"], *steered["x_low"]]))
    high = float(np.nanmax([least, budget or 0.0, *points["x"], *steered["x_high"]]))
    room = 0.1 * (high - low)
    return [low - room, high + room]


def _range_of_controls(controls: pd.DataFrame, span: list[float]) -> go.Scatter:
    low, high = float(controls["y"].min()), float(controls["y"].max())
    return go.Scatter(
        x=[span[0], span[1], span[1], span[0], span[0]],
        y=[low, low, high, high, low],
        mode="lines",
        fill="toself",
        fillcolor=transparent("#808080", 0.18),
        line={"color": transparent("#808080", 0.5), "width": 1},
        name=f"range of {len(controls)} controls",
        hoverinfo="skip",
    )


def _control_points(kind: str, rows: pd.DataFrame) -> go.Scatter:
    words = [
        f"{condition_in_words(row['condition'])}, in place of {row['count']} experts, "
        f"{row['series']}"
        for row in rows.to_dict("records")
    ]
    return go.Scatter(
        x=rows["x"], y=rows["y"], mode="markers", name=escaped(kind_in_words(kind)),
        marker={
            "symbol": _CONTROL_SYMBOLS.get(kind, "pentagon-open"), "size": 7, "color": NEUTRAL,
            "line": {"width": 1.5, "color": NEUTRAL},
        },
        customdata=[escaped(text) for text in words],
        hovertemplate="%{customdata}<br>effect %{y:+.1f} points, side effect %{x:.3g}"
        "<extra></extra>",
    )  # fmt: skip


def _cell_points(name: str, rows: pd.DataFrame, at: int, of_controls: pd.Series[Any]) -> go.Scatter:
    """The cells of one way of masking, with intervals, larger with more experts."""
    color = LINE_COLORS[at % len(LINE_COLORS)]
    rows = rows.sort_values("count")
    return go.Scatter(
        x=rows["x"], y=rows["y"], mode="lines+markers+text", name=escaped(name),
        line={"color": transparent(color, 0.45), "width": 1.5},
        marker={
            "color": color, "symbol": _symbol(at), "size": _sizes(rows["count"]),
            "line": {"width": 2 if at % 2 else 0, "color": color},
        },
        text=_labels(rows, of_controls),
        textposition=("middle right", "middle left", "top center", "bottom center")[at % 4],
        error_x=_bars(rows, "x", color),
        error_y=_bars(rows, "y", color),
        customdata=np.stack([rows["count"], *(rows[f"y_{e}"] for e in ("low", "high"))], axis=1),
        hovertemplate=f"{escaped(name)}, %{{customdata[0]}} experts<br>effect %{{y:+.1f}} points "
        "(%{customdata[1]:+.1f} to %{customdata[2]:+.1f})<br>side effect %{x:.3g}<extra></extra>",
    )  # fmt: skip


def _symbol(at: int) -> str:
    """Every second one is open, so that of two cells in one place both are seen."""
    return SYMBOLS[at % len(SYMBOLS)] + ("-open" if at % 2 else "")


def _sizes(counts: pd.Series[Any]) -> list[float]:
    """Marker sizes whose areas follow the number of experts."""
    largest = max(float(counts.max()), 1.0)
    return [8 + 10 * float(np.sqrt(count / largest)) for count in counts]


def _labels(rows: pd.DataFrame, of_controls: pd.Series[Any]) -> list[str]:
    """The number of experts beside each point; points in one place share a label.

    Those that do no more than controls have none: they lie in a heap.
    """
    near: dict[tuple[str, str], list[int]] = {}
    scale = float(rows["x"].abs().max()) or 1.0
    for place, row in enumerate(rows.to_dict("records")):
        spot = (f"{row['x'] / scale:.2f}", f"{row['y']:.0f}")
        if not of_controls.min() <= row["y"] <= of_controls.max():
            near.setdefault(spot, []).append(place)
    labels = [""] * len(rows)
    counts = rows["count"].tolist()
    for places in near.values():
        # The spaces keep it off the larger marks.
        labels[places[-1]] = (
            f"\u00a0\u00a0{', '.join(str(counts[at]) for at in places)}\u00a0\u00a0"
        )
    return labels


def _bars(rows: pd.DataFrame, axis: str, color: str) -> dict[str, Any]:
    value, low, high = (rows[f"{axis}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high"))
    return {
        "type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low,
        "color": transparent(color, 0.6), "thickness": 1.2, "width": 3,
    }  # fmt: skip


def _mark_best(figure: go.Figure, cells: pd.DataFrame, best: str | None) -> None:
    row = cells[cells["evaluation_id"] == best]
    if row.empty:
        return
    number = int(row["count"].iloc[0])
    figure.add_trace(go.Scatter(
        x=row["x"], y=row["y"], mode="markers",
        name=escaped(f"best: {counted(number, 'expert')}, {row['series'].iloc[0]}"),
        marker={"symbol": "circle-open", "size": 28, "color": _BEST, "line": {"width": 3}},
        hoverinfo="skip",
    ))  # fmt: skip


def _draw_budget(figure: go.Figure, budget: float, span: list[float]) -> None:
    figure.add_vrect(x0=budget, x1=span[1], fillcolor=transparent(_BUDGET, 0.07), line_width=0)
    figure.add_vline(
        x=budget, line={"color": _BUDGET, "dash": "dash", "width": 1.5},
        annotation={"text": f"budget {budget:g} points", "yanchor": "bottom", "font": {"size": 12}},
        annotation_position="top left" if budget > sum(span) / 2 else "top",
    )  # fmt: skip
