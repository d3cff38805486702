"""Figure of an evaluation: the share of each outcome, without the plan, with it, and by chance."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from moescope.probe.outcomes import OUTCOMES

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from moescope.steering.evaluation import EvaluationResult

_ROW_HEIGHT: Final = 62
_SECOND_LINE: Final = 18
# As long as the margin on the left has room for; longer names go on below.
_NAME_WIDTH: Final = 19


def outcome_chart(result: EvaluationResult, run_id: str | None = None) -> Figure:
    """One panel per group of prompts: conditions down, shares with 95 % intervals across.

    Args:
        result: the evaluation.
        run_id: the run that the prompts were taken from, where they were.
    """
    from plotly.subplots import make_subplots

    from moescope.probe.figures.heading import set_heading
    from moescope.probe.figures.style import GRID, escaped

    rates = result.frame[result.frame["metric"].isin(OUTCOMES)]
    groups = {str(name): part for name, part in rates.groupby("group", sort=True)}
    conditions = list(dict.fromkeys(rates["condition"]))
    titles = [f"{escaped(name)}<br>{part['n'].iloc[0]} prompts" for name, part in groups.items()]
    figure = make_subplots(
        rows=1, cols=len(groups), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.1
    )
    seen = rates.loc[rates["value"] > 0, "metric"].unique()
    for column, part in enumerate(groups.values(), start=1):
        for outcome in (outcome for outcome in OUTCOMES if outcome in seen):
            rows = part[part["metric"] == outcome]
            figure.add_trace(_points(rows, outcome, is_first=column == 1), row=1, col=column)
    context = result.context
    source = str(context["model"]) if run_id is None else f"{context['model']} · run {run_id}"
    set_heading(
        figure, "Outcomes without the plan, with it, and under controls",
        f"{source} · {context['num_prompts']} prompts of {context['set_name']} · "
        f"greedy, up to {context['max_new_tokens']} tokens · plan {result.plan.plan_id}",
        plot_height=150 + _ROW_HEIGHT * len(conditions),
    )  # fmt: skip
    figure.update_layout(
        scattermode="group",
        margin={"l": 140, "t": figure.layout.margin.t + _SECOND_LINE},
        height=figure.layout.height + _SECOND_LINE,
    )
    figure.update_annotations(font_size=14)
    figure.update_xaxes(
        range=[-0.03, 1.03], tickvals=[0, 0.5, 1], tickformat=".0%", gridcolor=GRID, zeroline=False
    )
    figure.update_xaxes(title_text="share of prompts, 95 % interval", row=1, col=1)
    figure.update_yaxes(
        autorange="reversed", categoryorder="array", categoryarray=conditions, gridcolor=GRID,
        type="category", tickvals=conditions, ticktext=[_in_words(name) for name in conditions],
    )  # fmt: skip
    return figure


def _in_words(condition: str) -> str:
    """`random experts, seed 0`, in lines."""
    from moescope.probe.figures.style import escaped
    from moescope.steering.condition_names import condition_in_words

    return "<br>".join(map(escaped, textwrap.wrap(condition_in_words(condition), _NAME_WIDTH)))


def _points(rows: pd.DataFrame, outcome: str, *, is_first: bool) -> object:
    import plotly.graph_objects as go

    from moescope.probe.figures.outcomes import OUTCOME_COLORS, OUTCOME_SYMBOLS

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
        marker={"color": OUTCOME_COLORS[outcome], "symbol": OUTCOME_SYMBOLS[outcome], "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": rows["high"].to_numpy() - value,
            "arrayminus": value - rows["low"].to_numpy(),
            "color": OUTCOME_COLORS[outcome],
            "thickness": 1.5,
        },
        customdata=rows[["low", "high", "n"]].to_numpy(),
        hovertemplate="%{y}: %{x:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%}), "
        "n = %{customdata[2]}",
    )
