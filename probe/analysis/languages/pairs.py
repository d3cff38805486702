"""How far every two languages are routed apart, layer by layer: a matrix and a tree.

The measures and the floor are those of `divergence`, with every language as the pivot in turn.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from moescope.probe.analysis.columns import stack_parts
from moescope.probe.analysis.counts import read_counts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.languages.columns import COLUMNS as PIVOT_COLUMNS
from moescope.probe.analysis.languages.divergence import PROMPT_TOKENS
from moescope.probe.analysis.languages.passages import find_passages
from moescope.probe.analysis.languages.rows import (
    Distribution,
    Floor,
    compare_languages,
    floor_note,
    resolve_settings,
)
from moescope.probe.analysis.selection import Selection, select
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

COLUMNS = (
    Column(name="lang_a", unit="", range="text", definition="The language first in the alphabet."),
    Column(name="lang_b", unit="", range="text", definition="The other language."),
    *(
        replace(column, name="num_tokens_a", definition="The same of lang_a.")
        if column.name == "num_tokens_pivot"
        else replace(column, name="num_tokens_b", definition="Counted tokens of lang_b.")
        if column.name == "num_tokens"
        else column
        for column in PIVOT_COLUMNS
        if column.name != "lang"
    ),
)


def language_pairs(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    q: Distribution = "topk",
    floor: Floor = "auto",
    draws: int = 10,
    bootstrap: int = 1_000,
    seed: int = 0,
) -> AnalysisTable:
    """Divergence of every two languages, by layer.

    Args:
        store: where the run lies.
        run_id: the run; its prompts need `lang` and `pair_id`.
        filters: which prompts, tokens and routers count; by default content tokens of the prompt.
        q: the distribution over experts, as in `language_divergence`.
        floor: what a language is compared with beside the other one, as there.
        draws: samples of equal size averaged per comparison.
        bootstrap: draws over passages for the 95 % intervals.
        seed: of samples and bootstrap.

    Raises:
        AnalysisInputError: as `language_divergence`; when no two languages share a passage.
    """
    selection = select(store, run_id, filters or PROMPT_TOKENS, fields=["lang", "pair_id"])
    parts, num_prompts, num_tokens = [], 0, 0
    settings = partial(
        resolve_settings, q=q, floor=floor, phrasing=None, has_routing=store.has_routing(run_id),
        draws=draws, bootstrap=bootstrap, seed=seed,
    )  # fmt: skip
    for lang_a, others in _in_turn(selection):
        of_pivot = settings(pivot=lang_a)
        passages = find_passages(selection, lang_a, None, others)
        usage = read_counts(
            selection, passages.groups, quantities=list({"num_tokens", of_pivot.quantity}),
            dtype=np.float32,
        )  # fmt: skip
        num_prompts = max(num_prompts, usage.num_prompts)
        num_tokens = max(num_tokens, usage.num_tokens)
        for row in compare_languages(selection, passages, usage, of_pivot):
            names = {"num_tokens_a": "num_tokens_pivot", "num_tokens_b": "num_tokens"}
            parts.append(
                {name: row[old] for name, old in names.items()}
                | row
                | {"lang_a": [lang_a], "lang_b": row["lang"]}
            )
    parameters = {k: v for k, v in vars(of_pivot).items() if k not in ("pivot", "phrasing")}
    frame = stack_parts(parts, COLUMNS)
    return AnalysisTable(
        name="language-pairs",
        title="Routing divergence of every two languages by layer",
        frame=frame.sort_values(["kind", "lang_a", "lang_b", "layer"], ignore_index=True),
        columns=COLUMNS,
        context=selection.context(
            num_prompts=num_prompts, num_tokens=num_tokens, parameters=parameters
        ),
        notes=(*selection.notes, floor_note(of_pivot)),
    )


def _in_turn(selection: Selection) -> list[tuple[str, list[str]]]:
    """Each language with those after it in the alphabet that share a passage with it.

    Raises:
        AnalysisInputError: when no two languages share one.
    """
    usable = selection.prompts.dropna(subset=["lang", "pair_id"])
    passages = {str(lang): set(part["pair_id"]) for lang, part in usable.groupby("lang")}
    languages = sorted(passages)
    found = []
    for index, lang in enumerate(languages):
        others = [other for other in languages[index + 1 :] if passages[lang] & passages[other]]
        if others:
            found.append((lang, others))
    if not found:
        raise AnalysisInputError(
            f"run {selection.run_id!r} has no two prompts with the same pair_id in two languages"
        )
    return found
