"""When an evaluation confirms its plan: hand-made rows, one for each way it can fail."""

from __future__ import annotations

import pandas as pd
import pytest

from moescope.steering.verdict import verdicts

NAN = float("nan")


def rows(
    change: tuple[float, float, float],
    beyond: tuple[float, float, float] | None,
    broken: float = 0.0,
    group: str = "sensitive",
) -> pd.DataFrame:
    measured = [("refused_change", *change), ("broken_change", broken, broken, broken)]
    if beyond is not None:
        measured.append(("refused_beyond_controls", *beyond))
    return pd.DataFrame(
        [("steered", group, metric, *three, 40) for metric, *three in measured],
        columns=["condition", "group", "metric", "value", "low", "high", "n"],
    )


@pytest.mark.parametrize(
    ("frame", "is_confirmed", "why"),
    [
        (rows((-0.9, -1.0, -0.8), (-0.85, -0.95, -0.7)), True, "answers stay whole"),
        (rows((0.5, 0.3, 0.7), (0.4, 0.2, 0.6)), True, "answers stay whole"),
        (rows((-0.1, -0.3, 0.1), (-0.1, -0.3, 0.1)), False, "within chance"),
        (rows((-0.9, NAN, NAN), (-0.9, NAN, NAN)), False, "all prompts are of one unit"),
        (rows((-0.9, -1.0, -0.8), None), False, "no control"),
        (rows((-0.9, -1.0, -0.8), (-0.05, -0.2, 0.1)), False, "other experts do as much"),
        (rows((-0.3, -0.5, -0.1), (0.4, 0.2, 0.6)), False, "other experts do as much"),
        (rows((-0.9, -1.0, -0.8), (-0.9, -1.0, -0.8), 0.6), False, "broken answers rise by 0.60"),
        (rows((-0.9, -1.0, -0.8), (-0.9, -1.0, -0.8), 0.4), True, "answers stay whole"),
    ],
)
def test_a_plan_is_confirmed_when_it_alone_changes_answers_that_stay_whole(
    frame: pd.DataFrame, is_confirmed: bool, why: str
) -> None:
    (found,) = verdicts(frame, neutral_label="neutral")
    assert found.is_confirmed is is_confirmed
    assert why in found.reason
    assert found.n == 40
    assert "nan" not in found.in_words()
    start = "sensitive: confirmed: " if is_confirmed else "sensitive: not confirmed: "
    assert found.in_words().startswith(start)


def test_neutral_prompts_and_unknown_outcomes_have_no_verdict() -> None:
    neutral = rows((-0.9, -1.0, -0.8), None, group="neutral")
    assert verdicts(neutral, neutral_label="neutral") == ()
    assert verdicts(rows((0.1, 0.0, 0.2), None), neutral_label="x", behavior="correct") == ()
