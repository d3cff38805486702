"""What the figures of a sweep have in common: their subtitle, and which cells make one line."""

from __future__ import annotations

import pandas as pd

from moescope.probe.figures.style import counted
from moescope.steering.stored_sweeps import StoredSweep


def about_sweep(sweep: StoredSweep, conditions: pd.DataFrame, words: str) -> str:
    """Model, sweep, prompts, controls, how answers were made; the subtitle of its figures.

    Args:
        sweep: what is shown.
        conditions: of `sweep_conditions`.
        words: what else the reader must know.
    """
    settings = sweep.settings
    controls = conditions[conditions["control"].notna()].groupby("evaluation_id").size()
    number = conditions["n"].max()
    neutral = conditions["n_neutral"].max()
    prompts = counted(int(number), "prompt") if number == number else "prompts"
    beside = f" and {int(neutral)} neutral" if neutral == neutral else ""
    least, most = (int(controls.min()), int(controls.max())) if len(controls) else (0, 0)
    many = str(most) if least == most else f"{least} to {most}"
    return (
        f"{sweep.model} · sweep {sweep.name} · {prompts}{beside} of {settings['set_name']} · "
        f"greedy, up to {settings['max_new_tokens']} tokens · {many} control plans a cell, seed "
        f"{settings['seed']} · {words}"
    )


def series_of(frame: pd.DataFrame, *, with_strength: bool) -> list[str]:
    """The way of masking of each row, as far as the rows differ in it: a line of a figure.

    Args:
        frame: has `mode`, `layers`, `strength`.
        with_strength: whether strengths are told apart.
    """
    has_windows = frame["layers"].nunique() > 1
    names = []
    for row in frame.to_dict("records"):
        parts = [row["mode"]]
        if with_strength and not pd.isna(row["strength"]):
            parts.append(f"strength {row['strength']:g}")
        if has_windows or row["layers"] != "all":
            parts.append("all layers" if row["layers"] == "all" else f"layers {row['layers']}")
        names.append(", ".join(parts))
    return names
