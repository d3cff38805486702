"""Do languages that are routed unlike the pivot also do worse? Divergence against a score.

Bandarkar et al. (arXiv 2510.04694) correlate, layer by layer, the divergence of each language from
English with the accuracy in that language. The units are languages, mostly few, so the interval is
wide and says so; the p-value counts all (or many) assignments of scores to languages. A correlation
over layers searched for its extreme is optimistic: `p_max` is the chance that the strongest of all
layers is as strong as this one (max-statistic over the same assignments).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from math import factorial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
from scipy import stats

from moescope.probe.analysis.columns import KIND, LAYER
from moescope.probe.analysis.filters import Filters, describe_conditions
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.languages.divergence import language_divergence
from moescope.probe.analysis.languages.rows import Distribution, Floor
from moescope.probe.analysis.measures import FloatArray, divide
from moescope.probe.analysis.selection import IntArray, matching_prompts, read_fields
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

Measure = Literal["jsd_excess", "jsd", "d_hjs"]

#: All assignments of scores to languages are tried up to so many, else so many drawn at random.
MOST_ASSIGNMENTS = 50_000
FEWEST_LANGUAGES = 4
CORRECT: Mapping[str, tuple[str, ...]] = {"outcome": ("correct",)}

_PAPER = "Bandarkar et al., arXiv 2510.04694"
COLUMNS = (
    LAYER,
    KIND,
    Column(
        name="pearson",
        unit="",
        range="[-1, 1]; missing where one side does not vary",
        definition="Pearson correlation over languages of the divergence from the pivot with the "
        "score.",
        source=_PAPER,
    ),
    Column(
        name="low",
        unit="",
        range="[-1, 1]",
        definition="Lower end of the 95 % interval of pearson (Fisher's z; units are languages).",
    ),
    Column(name="high", unit="", range="[-1, 1]", definition="Upper end of that interval."),
    Column(
        name="spearman",
        unit="",
        range="[-1, 1]; missing where one side does not vary",
        definition="Rank correlation of the same.",
    ),
    Column(
        name="p",
        unit="",
        range="(0, 1]",
        definition="Share of assignments of scores to languages with a pearson as far from 0.",
    ),
    Column(
        name="p_max",
        unit="",
        range="(0, 1]",
        definition="Share of assignments whose strongest layer is as far from 0: p after the "
        "search over layers.",
    ),
    Column(
        name="divergence",
        unit="as the measure",
        range="mean over languages",
        definition="Mean divergence of the languages from the pivot.",
    ),
    Column(
        name="num_languages",
        unit="languages",
        range=f"{FEWEST_LANGUAGES} or more",
        definition="Languages with a divergence and a score, the pivot left out.",
    ),
)


def language_scores(
    store: Store,
    run_id: str,
    *,
    score: Mapping[str, tuple[str, ...]] = CORRECT,
    among: Mapping[str, tuple[str, ...]] | None = None,
    scores: Mapping[str, float] | str | Path | None = None,
    measure: Measure = "jsd_excess",
    filters: Filters | None = None,
    q: Distribution = "topk",
    pivot: str = "en",
    floor: Floor = "auto",
    draws: int = 10,
    seed: int = 0,
) -> AnalysisTable:
    """Correlation over languages of divergence from the pivot with a score, by layer.

    Args:
        store: where the run lies.
        run_id: the run; its prompts need `lang` and `pair_id`.
        score: the share of a language's prompts that meet these conditions is its score.
        among: the prompts that the share is of, by conditions; all prompts of the language else.
        scores: a number per language instead, or a CSV file with the columns `lang` and `score`.
        measure: the divergence: above the floor, raw, or entropy-normalized.
        filters: which prompts, tokens and routers count in the divergence.
        q: the distribution over experts, as in `language_divergence`.
        pivot: the language that the others are compared with.
        floor: what the same language is compared with, as there.
        draws: samples of equal size averaged per comparison.
        seed: of samples, and of assignments where not all are tried.

    Raises:
        AnalysisInputError: for an unknown measure or field, or fewer than 4 languages with both.
    """
    if measure not in get_args(Measure):
        raise AnalysisInputError(
            f"measure is {measure!r}; it is one of {', '.join(get_args(Measure))}"
        )
    if measure == "jsd_excess" and floor == "none":
        raise AnalysisInputError("measure jsd_excess needs a floor; take measure jsd without one")
    table = language_divergence(
        store, run_id, filters=filters, q=q, pivot=pivot, floor=floor, draws=draws, bootstrap=1,
        seed=seed,
    )  # fmt: skip
    if scores is None:
        by_lang, words = _shares(store, run_id, score, among or {})
    else:
        by_lang, words = _given(scores)
    wide = table.frame.pivot_table(
        index=["kind", "layer"], columns="lang", values=measure, dropna=False
    )
    shared = [lang for lang in wide.columns if lang in by_lang and wide[lang].notna().all()]
    if len(shared) < FEWEST_LANGUAGES:
        raise AnalysisInputError(
            f"a correlation needs {FEWEST_LANGUAGES} languages beside {pivot!r} with a divergence "
            f"and a score; there are {', '.join(shared) or 'none'}"
        )
    divergence_RN = wide[shared].to_numpy(dtype=np.float64)
    score_N = np.array([by_lang[lang] for lang in shared])
    frame = pd.DataFrame(
        {
            "layer": wide.index.get_level_values("layer"),
            "kind": wide.index.get_level_values("kind"),
            **_correlations(divergence_RN, score_N, np.random.default_rng(seed)),
            "divergence": divergence_RN.mean(axis=1),
            "num_languages": len(shared),
        }
    )
    parameters = {
        **table.context.parameters, "score": words, "measure": measure, "seed": seed,
    }  # fmt: skip
    return AnalysisTable(
        name="language-scores",
        title=f"Divergence from {pivot} against {words}, over languages",
        frame=frame[[column.name for column in COLUMNS]],
        columns=COLUMNS,
        context=replace(table.context, parameters=parameters),
        notes=(
            *table.notes,
            "Score of each language: "
            + ", ".join(f"{lang} {by_lang[lang]:.3f}" for lang in shared)
            + ". So few units describe these languages and prove little about others.",
        ),
    )


def _shares(
    store: Store,
    run_id: str,
    score: Mapping[str, tuple[str, ...]],
    among: Mapping[str, tuple[str, ...]],
) -> tuple[dict[str, float], str]:
    """The share of prompts that meet the conditions, by language."""
    prompts = read_fields(store, run_id, list(dict.fromkeys(["lang", *score, *among])))
    asked = prompts[matching_prompts(prompts, among)].dropna(subset=["lang"])
    hits = pd.Series(matching_prompts(asked, score), index=asked.index)
    words = f"share with {describe_conditions(score)}"
    if among:
        words += f" among {describe_conditions(among)}"
    shares = hits.groupby(asked["lang"]).mean()
    return {str(lang): float(share) for lang, share in shares.items()}, words


def _given(scores: Mapping[str, float] | str | Path) -> tuple[dict[str, float], str]:
    """Scores that the user brings."""
    if isinstance(scores, Mapping):
        return {lang: float(value) for lang, value in scores.items()}, "the given score"
    path = Path(scores)
    try:
        table = pd.read_csv(path, dtype={"lang": "str"})
    except (OSError, ValueError) as error:
        raise AnalysisInputError(f"scores {path} cannot be read as CSV: {error}") from error
    if not {"lang", "score"} <= set(table.columns):
        raise AnalysisInputError(
            f"scores {path} must have the columns lang and score; it has {', '.join(table.columns)}"
        )
    numbers = pd.to_numeric(table["score"], errors="coerce")
    if numbers.isna().any() or table["lang"].duplicated().any():
        line = int(np.flatnonzero(numbers.isna() | table["lang"].duplicated())[0]) + 2
        raise AnalysisInputError(f"scores {path}, line {line}: one number per language is right")
    return dict(zip(table["lang"], numbers.astype(float), strict=True)), f"score of {path.name}"


def _correlations(
    divergence_RN: FloatArray, score_N: FloatArray, rng: np.random.Generator
) -> dict[str, FloatArray]:
    """Correlation of each router's divergences with the scores, with interval and p-values."""
    orders_AN = _assignments(len(score_N), rng)
    pearson_AR = _pearson(divergence_RN, score_N[orders_AN])
    pearson_R = _pearson(divergence_RN, score_N[None])[0]
    low_R, high_R = _fisher_interval(pearson_R, len(score_N))
    far_R = np.abs(pearson_R) - 1e-9
    strongest_A = np.nanmax(np.abs(pearson_AR), axis=1, initial=0.0)
    missing_R = np.isnan(pearson_R)
    p_R = np.where(missing_R, np.nan, (np.abs(pearson_AR) >= far_R).mean(axis=0))
    p_max_R = np.where(missing_R, np.nan, (strongest_A[:, None] >= far_R).mean(axis=0))
    ranks_RN, rank_N = stats.rankdata(divergence_RN, axis=1), stats.rankdata(score_N)
    spearman_R = _pearson(ranks_RN, rank_N[None])[0]
    return {
        "pearson": pearson_R, "low": low_R, "high": high_R, "spearman": spearman_R,
        "p": p_R, "p_max": p_max_R,
    }  # fmt: skip


def _assignments(number: int, rng: np.random.Generator) -> IntArray:
    """Orders of so many languages [A, N]: all of them, or many at random with the given one."""
    if factorial(number) <= MOST_ASSIGNMENTS:
        return np.array(list(permutations(range(number))))
    drawn = rng.permuted(np.tile(np.arange(number), (MOST_ASSIGNMENTS - 1, 1)), axis=1)
    return np.vstack([np.arange(number), drawn])


def _pearson(first_RN: FloatArray, second_AN: FloatArray) -> FloatArray:
    """Correlations [A, R]; missing where one side does not vary."""
    first_RN = first_RN - first_RN.mean(axis=1, keepdims=True)
    second_AN = second_AN - second_AN.mean(axis=1, keepdims=True)
    norms_R = np.linalg.norm(first_RN, axis=1)
    norms_A = np.linalg.norm(second_AN, axis=1)
    # What varies by rounding alone does not vary.
    norms_R[norms_R < 1e-12] = 0.0
    norms_A[norms_A < 1e-12] = 0.0
    return np.clip(divide(second_AN @ first_RN.T, norms_A[:, None] * norms_R), -1.0, 1.0)


def _fisher_interval(pearson_R: FloatArray, number: int) -> tuple[FloatArray, FloatArray]:
    """95 % interval of correlations over so many languages."""
    with np.errstate(divide="ignore"):
        z_R = np.arctanh(pearson_R)
    half = stats.norm.ppf(0.975) / np.sqrt(number - 3)
    return np.tanh(z_R - half), np.tanh(z_R + half)
