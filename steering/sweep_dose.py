"""Figure of a sweep: the share of each outcome by dose, in front of the range of the controls."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moescope.probe.figures.heading import set_heading
from moescope.probe.figures.outcomes import OUTCOME_COLORS, OUTCOME_SYMBOLS
from moescope.probe.figures.style import escaped, transparent
from moescope.probe.outcomes import OUTCOMES
from moescope.steering.evaluation import STEERED, UNSTEERED
from moescope.steering.stored_sweeps import StoredSweep
from moescope.steering.sweep_series import about_sweep, series_of

# Shown though none has it: that answers do not break is a finding.
_ALWAYS: Final = ("correct", "refused", "broken")
_BAND: Final = 0.16
# How far apart the outcomes of one dose stand, in steps of the dose, so that no interval hides one.
_DODGE: Final = 0.04
_PANEL_HEIGHT: Final = 250
_AROUND: Final = 150


def sweep_dose(conditions: pd.DataFrame, sweep: StoredSweep, group: str) -> go.Figure:
    """The share of each outcome by dose, a panel for each way of masking.

    Lines are the chosen experts with 95 % intervals (Wilson), shades of the same color the range of
    the controls, dashes right answers to neutral prompts. The dose is the number of experts, or the
    strength where that alone differs; its steps are drawn evenly. The first is the unsteered model.

    Args:
        conditions: of `sweep_conditions`.
        sweep: what they are of.
        group: the label that they were made for.
    """
    by_strength = conditions["count"].nunique() == 1 and conditions["strength"].nunique() > 1
    rows = conditions.assign(
        dose=conditions["strength"].fillna(np.inf) if by_strength else conditions["count"],
        series=series_of(conditions, with_strength=not by_strength),
    )
    doses = sorted(rows["dose"].unique())
    place = {dose: at for at, dose in enumerate(doses, start=1)}
    rows["x"] = rows["dose"].map(place)
    panels = list(rows.groupby("series", sort=False))
    height = _AROUND + _PANEL_HEIGHT * len(panels)
    figure = make_subplots(
        rows=len(panels), cols=1, shared_xaxes="all", vertical_spacing=70 / height,
        subplot_titles=[escaped(str(name)) for name, _ in panels] if len(panels) > 1 else None,
    )  # fmt: skip
    seen = [
        outcome for outcome in OUTCOMES
        if outcome in _ALWAYS or (rows[outcome] > 0).any()
    ]  # fmt: skip
    for at, (_, panel) in enumerate(panels, start=1):
        for outcome in seen:
            shift = _DODGE * (seen.index(outcome) - (len(seen) - 1) / 2)
            for trace in _dose_traces(panel, outcome, shift, is_first=at == 1):
                figure.add_trace(trace, row=at, col=1)
    set_heading(
        figure, f"Outcomes by {'strength' if by_strength else 'experts'}, {group} prompts",
        about_sweep(sweep, conditions, "95 % intervals (Wilson); shades: range of the controls"),
        plot_height=height,
    )  # fmt: skip
    ticks = ["mask" if dose == np.inf else f"{dose:g}" for dose in doses]
    figure.update_xaxes(
        tickvals=[0, *place.values()], ticktext=["0", *ticks], range=[-0.3, len(doses) + 0.3],
        showticklabels=True, zeroline=False,
    )  # fmt: skip
    what = "strength" if by_strength else "number of experts"
    figure.update_xaxes(title_text=f"{what} (0: unsteered)", row=len(panels), col=1)
    figure.update_yaxes(range=[-0.04, 1.04], tickformat=".0%", nticks=5, zeroline=False)
    figure.update_yaxes(title_text="share of prompts", row=(len(panels) + 1) // 2, col=1)
    return figure


def _dose_traces(
    panel: pd.DataFrame, outcome: str, shift: float, *, is_first: bool
) -> list[go.Scatter]:
    """Band of the controls, line of the chosen experts, dashes of neutral prompts."""
    steered = panel[panel["condition"] == STEERED].sort_values("x")
    before = float(panel.loc[panel["condition"] == UNSTEERED, outcome].iloc[0])
    controls = panel[panel["control"].notna()].groupby("x")[outcome].agg(["min", "max"])
    color = OUTCOME_COLORS[outcome]
    traces = []
    if len(controls):
        x = [0, *controls.index]
        low, high = [before, *controls["min"]], [before, *controls["max"]]
        traces.append(go.Scatter(
            x=[*x, *x[::-1]], y=[*high, *low[::-1]], mode="lines", fill="toself",
            fillcolor=transparent(color, _BAND), line={"width": 0}, legendgroup=outcome,
            showlegend=False, hoverinfo="skip",
        ))  # fmt: skip
    ends = {
        end: np.array([np.nan, *steered[f"{outcome}_{end}"]], dtype=float)
        for end in ("low", "high")
    }
    share = np.array([before, *steered[outcome]], dtype=float)
    traces.append(go.Scatter(
        x=np.array([0, *steered["x"]]) + shift, y=share, mode="lines+markers", name=outcome,
        legendgroup=outcome,
        showlegend=is_first, line={"color": color, "width": 2},
        marker={"symbol": OUTCOME_SYMBOLS[outcome], "size": 8, "color": color},
        error_y={
            "type": "data", "symmetric": False, "array": ends["high"] - share,
            "arrayminus": share - ends["low"], "color": color, "thickness": 1.2, "width": 3,
        },
        customdata=np.stack([ends["low"], ends["high"]], axis=1),
        hovertemplate=f"{outcome}: %{{y:.1%}} (%{{customdata[0]:.1%}} to %{{customdata[1]:.1%}})"
        "<extra></extra>",
    ))  # fmt: skip
    if outcome == "correct" and "neutral_correct" in panel and steered["neutral_correct"].any():
        first = float(panel.loc[panel["condition"] == UNSTEERED, "neutral_correct"].iloc[0])
        traces.append(go.Scatter(
            x=[0, *steered["x"]], y=[first, *steered["neutral_correct"]], mode="lines",
            name="correct, neutral prompts", legendgroup="neutral", showlegend=is_first,
            line={"color": color, "dash": "dash", "width": 1.5},
            hovertemplate="correct, neutral prompts: %{y:.1%}<extra></extra>",
        ))  # fmt: skip
    return traces
