"""How the commands on causes print what they found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moescope.app import console

if TYPE_CHECKING:
    from moescope.probe.models import ModelBundle
    from moescope.steering.causes.asking import Question


def say_first(title: str, question: Question, columns: str, seed: int) -> None:
    """What was asked, what the columns mean, and over what the intervals are."""
    num_units = len(set(question.units))
    console.emit(f"{title}: {question.note}")
    console.emit(columns)
    console.emit(
        f"n: prompts; low and high, in brackets too: 95 % intervals over {num_units} units (pairs, "
        f"else prompts), seed {seed}"
    )


def largest_first(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by the size of their effect."""
    order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def print_rows(frame: pd.DataFrame, rows: int) -> None:
    """The first rows; columns that say nothing are left out."""
    console.print_frame(for_people(frame).head(rows))
    if len(frame) > rows:
        console.emit(f"... {len(frame) - rows} more rows; --out FILE.csv writes them all")


def for_people(frame: pd.DataFrame) -> pd.DataFrame:
    """A table to print: `all` for what is of all layers, no column of one kind alone."""
    found = frame.drop(columns=[name for name in ("quantity", "same_weights") if name in frame])
    if len(set(found["kind"]) - {"all"}) < 2:
        found = found.drop(columns="kind")
    if "expert" in found and found["expert"].isna().all():
        found = found.drop(columns="expert")
    is_all = found["layer"].isna()
    layers = ["all" if every else int(layer)
              for layer, every in zip(found["layer"], is_all, strict=True)]  # fmt: skip
    return found.assign(layer=pd.Series(layers, index=found.index, dtype=object))


def patch_table(split: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """The split and the single layers as one table, all shares of the difference a - b.

    Args:
        split: of `moescope.steering.causes.patching.RoutingPatch.summary`.
        layers: of its `frame`, whose shares are of the way to the other side: in a towards b.
    """
    sign = layers["weights"].map({"b": 1.0, "a": -1.0})
    ends = sign * layers["share_low"], sign * layers["share_high"]
    single = layers.drop(columns=["weights", "routing"]).assign(
        share=sign * layers["share"],
        share_low=np.minimum(*ends),
        share_high=np.maximum(*ends),
    )
    single.insert(0, "quantity", "routing in " + layers["weights"])
    whole = split[~split["quantity"].isin(single["quantity"])].assign(
        kind="all", layer=pd.array([pd.NA] * 3, dtype="Int64")
    )
    return pd.concat([single, whole[single.columns]], ignore_index=True)


def side_by_side(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per expert with its paths beside each other, the largest total first."""
    found = []
    for (layer, kind, expert), own in frame.groupby(["layer", "kind", "expert"], sort=False):
        cells = {
            row["path"]: f"{row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            for row in own.to_dict("records")
        }
        total = float(own["effect"].iloc[0])
        found.append({"size": abs(total), "layer": layer, "kind": kind, "expert": expert,
                      "n": int(own["n"].iloc[0]), **cells})  # fmt: skip
    table = pd.DataFrame(found).sort_values("size", ascending=False, kind="stable")
    return table.drop(columns="size")


def tokens_in_words(bundle: ModelBundle, table: pd.DataFrame | None, side: str) -> str | None:
    """Tokens in quotes, each with the change of its logit."""
    if table is None:
        return None
    own = table[table["side"] == side]
    return ", ".join(
        f"{_token(bundle, number, word)} {logit:+.2f}"
        for number, word, logit in zip(own["token_id"], own["token"], own["logit"], strict=True)
    )


def _token(bundle: ModelBundle, number: int, word: str) -> str:
    """A token as text, as the tokenizer names it where it is a part of a character.

    Models may have more outputs than their tokenizer has tokens; those have a number alone.
    """
    if "\N{REPLACEMENT CHARACTER}" in word or not word:
        named = bundle.tokenizer.convert_ids_to_tokens(int(number))
        if not named:
            return f"no token {number}"
        word = str(named)
    return json.dumps(word, ensure_ascii=False)
