"""Figure of an evaluation: the share of each outcome, without the plan, with it, and by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from moescope.probe.outcomes import OUTCOMES

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from moescope.steering.evaluation import EvaluationResult

# The outcomes' colors on badges, as told apart with any color vision (Okabe and Ito).
_COLORS: Final = {
    "correct": "#009E73", "other": "#8C8C8C", "partial": "#E69F00", "refused": "#D55E00",
    "broken": "#CC79A7",
}  # fmt: skip
_SYMBOLS: Final = {
    "correct": "circle", "other": "square", "partial": "diamond", "refused": "x",
    "broken": "triangle-up",
}  # fmt: skip
_CLEAR: Final = "rgba(0,0,0,0)"
_GRID: Final = "rgba(128,128,128,0.25)"
_ROW_HEIGHT: Final = 62


def outcome_chart(result: EvaluationResult, run_id: str) -> Figure:
    """One panel per group of prompts: conditions down, shares with 95 % intervals across."""
    from plotly.subplots import make_subplots

    rates = result.frame[result.frame["metric"].isin(OUTCOMES)]
    groups = {str(name): part for name, part in rates.groupby("group", sort=True)}
    conditions = list(dict.fromkeys(rates["condition"]))
    titles = [f"{name} ({part['n'].iloc[0]} prompts)" for name, part in groups.items()]
    figure = make_subplots(
        rows=1, cols=len(groups), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.07
    )
    seen = rates.loc[rates["value"] > 0, "metric"].unique()
    for column, part in enumerate(groups.values(), start=1):
        for outcome in (outcome for outcome in OUTCOMES if outcome in seen):
            rows = part[part["metric"] == outcome]
            figure.add_trace(_points(rows, outcome, is_first=column == 1), row=1, col=column)
    context = result.context
    figure.update_layout(
        title={
            "text": "Outcomes without the plan, with it, and with random experts",
            "subtitle": {
                "text": f"{context['model']} · run {run_id} · {context['num_prompts']} prompts of "
                f"{context['set_name']} · greedy, up to {context['max_new_tokens']} tokens · "
                f"plan {result.plan.plan_id}"
            },
            "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 12},
        },
        height=230 + _ROW_HEIGHT * len(conditions),
        margin={"l": 160, "r": 30, "t": 120, "b": 60},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        scattermode="group",
        legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0, "bgcolor": _CLEAR},
    )  # fmt: skip
    figure.update_annotations(font_size=14)
    figure.update_xaxes(
        range=[-0.03, 1.03], nticks=4, tickformat=".0%", gridcolor=_GRID, zeroline=False
    )
    figure.update_xaxes(title_text="share of prompts, 95 % interval", row=1, col=1)
    figure.update_yaxes(
        autorange="reversed", categoryorder="array", categoryarray=conditions, gridcolor=_GRID,
        type="category", tickvals=conditions, ticktext=[_in_words(name) for name in conditions],
    )  # fmt: skip
    return figure


def _in_words(condition: str) -> str:
    return condition.replace("control:random:", "random experts, seed ")


def _points(rows: pd.DataFrame, outcome: str, *, is_first: bool) -> object:
    import plotly.graph_objects as go

    value = rows["value"].to_numpy()
    return go.Scatter(
        x=value,
        y=rows["condition"].tolist(),
        orientation="h",  # with scattermode group: the outcomes of a condition one below another
        offsetgroup=outcome,
        mode="markers",
        name=outcome,
        legendgroup=outcome,
        showlegend=is_first,
        marker={"color": _COLORS[outcome], "symbol": _SYMBOLS[outcome], "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": rows["high"].to_numpy() - value,
            "arrayminus": value - rows["low"].to_numpy(),
            "color": _COLORS[outcome],
            "thickness": 1.5,
        },
        customdata=rows[["low", "high", "n"]].to_numpy(),
        hovertemplate="%{y}: %{x:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%}), "
        "n = %{customdata[2]}",
    )
