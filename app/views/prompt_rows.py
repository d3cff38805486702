"""Choosing among the prompts of a run, as a frame holds them; nothing here knows Streamlit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def matching_prompts(
    frame: pd.DataFrame, words: str, kept: Mapping[str, tuple[str, ...]]
) -> pd.DataFrame:
    """The prompts with all the words (in prompt, answer or key) and one value of each field."""
    for name, values in kept.items():
        frame = frame[frame[name].isin(values)]
    searched = frame["text"].fillna("")
    for name in ("response", "key"):
        searched = searched + "\n" + frame[name].fillna("")
    for word in words.casefold().split():
        frame = frame[searched.loc[frame.index].str.casefold().str.contains(word, regex=False)]
    return frame


def sampled_prompts(frame: pd.DataFrame, number: int, seed: int) -> pd.DataFrame:
    """Prompts of every label, at least `number` of each where there are as many.

    What shares a label and a `pair_id` is drawn together. The order is that of the run.
    """
    own = "prompt " + frame["prompt_id"].astype(str)
    unit = ("pair " + frame["pair_id"]).where(frame["pair_id"].notna(), own)
    label = frame["label"].fillna("")
    sizes = frame.groupby([label.rename("label"), unit.rename("unit")]).size().rename("size")
    drawn = sizes.reset_index().sample(frac=1, random_state=seed)
    before = drawn.groupby("label")["size"].cumsum() - drawn["size"]
    kept = set(drawn.loc[before < number, ["label", "unit"]].itertuples(index=False, name=None))
    return frame[[pair in kept for pair in zip(label, unit, strict=True)]]
