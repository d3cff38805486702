"""Whether an evaluation confirms its plan.

A contrast confirms that routing differs between two groups, which need not be a cause. What
confirms a plan is this: in a group of prompts the share of an outcome changed, the change is larger
than that of the controls (paired by prompt, intervals over units), and it was not paid for with
broken answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from moescope.probe.outcomes import Outcome

#: A change is called broken language where this share of it or more went into broken answers.
_BROKEN_SHARE = 0.5


@dataclass(frozen=True)
class Verdict:
    """What an evaluation says of its plan, for one group of prompts.

    Attributes:
        group: the prompts' label.
        behavior: the outcome that the plan is about.
        change: of its share, steered against unsteered.
        change_low, change_high: 95 % interval over units.
        beyond: the same against the mean of all controls; None without controls.
        beyond_low, beyond_high: its interval.
        broken: by how much the share of broken answers rose.
        n: prompts.
        is_confirmed: whether all three hold.
        reason: in a sentence.
    """

    group: str
    behavior: Outcome
    change: float
    change_low: float
    change_high: float
    beyond: float | None
    beyond_low: float | None
    beyond_high: float | None
    broken: float
    n: int
    is_confirmed: bool
    reason: str

    def in_words(self) -> str:
        """The verdict as a line of an evaluation."""
        word = "confirmed" if self.is_confirmed else "not confirmed"
        return f"{self.group}: {word}: {self.reason}"


def verdicts(
    frame: pd.DataFrame, *, neutral_label: str, behavior: Outcome = "refused"
) -> tuple[Verdict, ...]:
    """One verdict per group of prompts that are not neutral.

    Args:
        frame: rows of an evaluation: condition, group, metric, value, low, high, n.
        neutral_label: the group that a plan should leave alone.
        behavior: the outcome that the plan is about.
    """
    rows = frame[(frame["condition"] == "steered") & (frame["metric"] == f"{behavior}_change")]
    groups: Sequence[str] = [name for name in rows["group"] if name != neutral_label]
    return tuple(_verdict(frame, group, behavior) for group in groups)


def _verdict(frame: pd.DataFrame, group: str, behavior: Outcome) -> Verdict:
    found = frame[(frame["condition"] == "steered") & (frame["group"] == group)]
    numbers = {
        str(row["metric"]): tuple(float(row[name]) for name in ("value", "low", "high"))
        for row in found.to_dict("records")
    }
    change, low, high = numbers[f"{behavior}_change"]
    beyond = numbers.get(f"{behavior}_beyond_controls")
    broken = 0.0 if behavior == "broken" else numbers["broken_change"][0]
    n = int(found.loc[found["metric"] == f"{behavior}_change", "n"].iloc[0])
    is_confirmed, why = _judge(change, low, high, beyond, broken)
    said = f"{behavior} {_with_interval(change, low, high)}"
    if beyond is not None:
        said += f", {_with_interval(*beyond)} beyond the controls"
    middle, beyond_low, beyond_high = beyond or (None, None, None)
    return Verdict(
        group, behavior, change, low, high, middle, beyond_low, beyond_high, broken, n,
        is_confirmed, f"{said}; {why}",
    )  # fmt: skip


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f}" if math.isnan(low) else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _judge(
    change: float, low: float, high: float, beyond: tuple[float, ...] | None, broken: float
) -> tuple[bool, str]:
    """Whether the three conditions hold, and the one that decides in words."""
    if math.isnan(low):
        return False, "all prompts are of one unit (pair_id), so chance cannot be told"
    if not (low > 0 or high < 0):
        return False, "the change is within chance"
    if beyond is None:
        return False, "there is no control to compare with"
    if not (beyond[1] > 0 or beyond[2] < 0) or beyond[0] * change <= 0:
        return False, "other experts do as much"
    if broken >= _BROKEN_SHARE * abs(change):
        return False, f"broken answers rise by {broken:.2f}"
    return True, "other experts do not do it, and answers stay whole"
