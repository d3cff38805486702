"""Which prompts are the same passage in which language, and which of them are compared.

A passage is a `pair_id`: all its prompts in one language together are that passage in that
language. Where a field tells phrasings apart, each phrasing is a group of its own, so that
phrasings can be compared with each other.

Letters: P prompts, G groups (passage, language, phrasing), N passages of one pair of languages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moescope.probe.analysis.languages.floor import Comparisons, neighbors_in_length
from moescope.probe.analysis.measures import FloatArray
from moescope.probe.analysis.selection import IntArray, Selection
from moescope.probe.errors import AnalysisInputError


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguagePair:
    """The passages that a language shares with the pivot.

    Attributes:
        lang: the language beside the pivot.
        pair_ids: of the N passages.
        pivot: text (index into `Passages.texts`) of each passage in the pivot language.
        other: text of each passage in `lang`.
    """

    lang: str
    pair_ids: tuple[str, ...]
    pivot: IntArray
    other: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Passages:
    """The prompts of all compared passages.

    Attributes:
        groups: group of each prompt, -1 for prompts outside.
        keys: `lang`, `pair_id`, `phrasing` and `text` of each group; a text is a passage in a
            language, all phrasings together.
        pairs: one per language beside the pivot.
        notes: what was left out.
    """

    groups: IntArray
    keys: pd.DataFrame
    pairs: tuple[LanguagePair, ...]
    notes: tuple[str, ...]


def find_passages(
    selection: Selection,
    pivot: str,
    phrasing: str | None,
    others: Collection[str] | None = None,
) -> Passages:
    """Find the passages that the pivot shares with each other language, or with those of `others`.

    Raises:
        AnalysisInputError: when there is no pivot, or it shares no passage with any language.
    """
    prompts = selection.prompts
    usable = (prompts["lang"].notna() & prompts["pair_id"].notna()).to_numpy()
    table = prompts.loc[usable, ["lang", "pair_id"]]
    table["phrasing"] = "" if phrasing is None else prompts.loc[usable, phrasing].fillna("")
    languages = sorted(table["lang"].unique())
    if pivot not in languages:
        raise AnalysisInputError(
            f"run {selection.run_id!r} has no prompt with a pair_id in the pivot language "
            f"{pivot!r}; it has {', '.join(languages) or 'none in any language'}"
        )
    texts = table[["lang", "pair_id"]].drop_duplicates(ignore_index=True)
    texts["text"] = np.arange(len(texts))
    of_pivot = texts[texts["lang"] == pivot]
    pairs, alone = [], []
    for language in languages:
        if language == pivot or (others is not None and language not in others):
            continue
        shared = of_pivot.merge(texts[texts["lang"] == language], on="pair_id")
        if shared.empty:
            alone.append(language)
            continue
        pairs.append(
            LanguagePair(
                lang=language,
                pair_ids=tuple(shared["pair_id"]),
                pivot=shared["text_x"].to_numpy(),
                other=shared["text_y"].to_numpy(),
            )
        )
    if not pairs:
        raise AnalysisInputError(
            f"run {selection.run_id!r} has no two prompts with the same pair_id, one in {pivot!r} "
            "and one in another language"
        )
    used = np.unique(np.concatenate([np.r_[pair.pivot, pair.other] for pair in pairs]))
    table = table.merge(texts, on=["lang", "pair_id"], how="left").set_axis(table.index)
    table = table[table["text"].isin(used)]
    keys = table.drop_duplicates(ignore_index=True)
    group_P = np.full(len(prompts), -1, dtype=np.int64)
    numbered = table.merge(keys.reset_index(names="group"), how="left")
    group_P[table.index.to_numpy()] = numbered["group"].to_numpy()
    notes = _notes(prompts, usable, table, alone, pivot)
    return Passages(groups=group_P, keys=keys, pairs=tuple(pairs), notes=notes)


def pair_passages(pair: LanguagePair, keys: pd.DataFrame, tokens_G: FloatArray) -> Comparisons:
    """Compare across two passages, neighbors in length over both languages together."""
    group_of_text = _only_group(keys)
    pivot_N, other_N = group_of_text[pair.pivot], group_of_text[pair.other]
    first, second = neighbors_in_length(tokens_G[pivot_N] + tokens_G[other_N])
    groups = [pivot_N[first], pivot_N[second], other_N[first], other_N[second]]
    return Comparisons(groups=np.stack(groups), is_halved=False)


def pair_halves(pair: LanguagePair, keys: pd.DataFrame) -> Comparisons:
    """Compare across two halves of the same passage."""
    group_of_text = _only_group(keys)
    pivot_N, other_N = group_of_text[pair.pivot], group_of_text[pair.other]
    return Comparisons(groups=np.stack([pivot_N, pivot_N, other_N, other_N]), is_halved=True)


def pair_phrasings(
    pair: LanguagePair, keys: pd.DataFrame, pivot: str, phrasing: str
) -> Comparisons:
    """Compare across the first two phrasings that a passage has in both languages.

    Raises:
        AnalysisInputError: when no passage has two.
    """
    known = keys[keys["phrasing"] != ""].reset_index(names="group")
    both = known[known["lang"] == pivot].merge(
        known[known["lang"] == pair.lang], on=["pair_id", "phrasing"]
    )
    both = both.sort_values(["pair_id", "phrasing"])
    place = both.groupby("pair_id").cumcount()
    paired = both[place == 0].merge(both[place == 1], on="pair_id", suffixes=("_1", "_2"))
    if paired.empty:
        raise AnalysisInputError(
            f"floor phrasings needs passages with two values of {phrasing!r} in {pivot!r} and the "
            f"same two in {pair.lang!r}; there is none"
        )
    names = ["group_x_1", "group_x_2", "group_y_1", "group_y_2"]
    return Comparisons(groups=paired[names].to_numpy().T, is_halved=False)


def _only_group(keys: pd.DataFrame) -> IntArray:
    """The group of each text, where every text is one group."""
    group_of_text = np.full(int(keys["text"].max()) + 1, -1, dtype=np.int64)
    group_of_text[keys["text"].to_numpy()] = np.arange(len(keys))
    return group_of_text


def _notes(
    prompts: pd.DataFrame,
    usable: np.ndarray[tuple[int], np.dtype[np.bool_]],
    table: pd.DataFrame,
    alone: Sequence[str],
    pivot: str,
) -> tuple[str, ...]:
    notes = []
    if not usable.all():
        notes.append(f"Prompts without lang or pair_id, left out: {len(prompts) - usable.sum()}.")
    if alone:
        notes.append(f"Languages that share no pair_id with {pivot}: {', '.join(alone)}.")
    pooled = int((table.groupby("text").size() > 1).sum())
    if pooled:
        notes.append(f"Passages with several prompts in one language, pooled: {pooled}.")
    return tuple(notes)
