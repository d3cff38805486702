"""At which layers, and how strongly, a language uses other experts than the pivot language.

Bandarkar et al., "Multilingual Routing in Mixture-of-Experts", arXiv 2510.04694: for every
passage that exists in both languages (same `pair_id`) the mean routing distribution over experts
is compared between the two, and the divergences are averaged over passages. They count all tokens
of the templated prompt; by default we count the content tokens of the prompt.

Two things mislead. The normalized divergence is dominated by noise where both distributions are
nearly uniform, so the raw one always stands beside it. And divergences of small samples are biased
upward, more for the language with fewer tokens. So both stand against a *floor*: the divergence
that the same language shows with itself, measured as the two languages are compared with it, and
the excess over it is reported with an interval. What is taken for "itself":

- `phrasings`: another phrasing of the same passage, where a prompt field tells phrasings apart.
  The best floor; few prompt sets have one.
- `other_passages`: another passage of the same language. Passages are taken two by two, neighbors
  in length; floor and comparison both go across the two, so that content differs in both alike.
- `halves`: the other half of the same passage's tokens. Fair for long texts. In short ones the
  halves hold different words, and the floor is too high (the excess of a language routed exactly
  like the pivot is then below 0).

All samples of a comparison have the same number of tokens, as many as the shortest, drawn without
replacement and averaged over several draws, where the run holds routing rows and q is `topk` or
`counts`. Otherwise single tokens are not known, and all tokens are compared.
"""

from __future__ import annotations

import numpy as np

from moescope.probe.analysis.columns import stack_parts
from moescope.probe.analysis.counts import read_counts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.languages.columns import COLUMNS
from moescope.probe.analysis.languages.passages import find_passages
from moescope.probe.analysis.languages.rows import (
    Distribution,
    Floor,
    compare_languages,
    floor_note,
    resolve_settings,
)
from moescope.probe.analysis.selection import select
from moescope.probe.storage.store import Store

PROMPT_TOKENS = Filters(tokens="prompt")


def language_divergence(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    q: Distribution = "topk",
    pivot: str = "en",
    floor: Floor = "auto",
    phrasing: str | None = None,
    draws: int = 10,
    bootstrap: int = 1_000,
    seed: int = 0,
) -> AnalysisTable:
    """Divergence of every language from the pivot language, by layer.

    Args:
        store: where the run lies.
        run_id: the run; its prompts need `lang` and `pair_id`.
        filters: which prompts, tokens and routers count; by default content tokens of the prompt.
        q: the distribution over experts: `softmax`, all router scores (the paper); `topk`, the
            routing weights of the selected experts (the authors' later code; they renormalize
            each token, we the sum, which is the same for routers whose weights sum to 1);
            `counts`, selections.
        pivot: the language that the others are compared with.
        floor: what the same language is compared with (see the module), or `none`; `auto` is
            phrasings where `phrasing` is given, else other_passages.
        phrasing: the prompt field that tells phrasings of a passage apart.
        draws: samples of equal size averaged per comparison.
        bootstrap: draws over passages (comparisons, for the excess) for the 95 % intervals.
        seed: of samples and bootstrap.

    Raises:
        AnalysisInputError: when a parameter does not exist, there is no passage in the pivot and
            another language, or the run lacks what q or floor needs.
    """
    settings = resolve_settings(
        q=q, pivot=pivot, floor=floor, phrasing=phrasing, has_routing=store.has_routing(run_id),
        draws=draws, bootstrap=bootstrap, seed=seed,
    )  # fmt: skip
    fields = ["lang", "pair_id", *([phrasing] if phrasing else [])]
    selection = select(store, run_id, filters or PROMPT_TOKENS, fields=fields)
    passages = find_passages(selection, pivot, phrasing if settings.floor == "phrasings" else None)
    usage = read_counts(
        selection,
        passages.groups,
        quantities=list({"num_tokens", settings.quantity}),
        dtype=np.float32,
    )
    rows = compare_languages(selection, passages, usage, settings)
    return AnalysisTable(
        name="languages",
        title=f"Routing divergence from {pivot} by layer",
        frame=stack_parts(rows, COLUMNS).sort_values(["kind", "lang", "layer"], ignore_index=True),
        columns=COLUMNS,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters=vars(settings)
        ),
        notes=(*selection.notes, *passages.notes, floor_note(settings)),
    )
