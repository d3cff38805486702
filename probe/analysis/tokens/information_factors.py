"""The factors that routing may carry information about, and their shuffles.

A factor belongs to tokens (the token itself, the one before it, its position, phase, segment) or
to prompts (any prompt field). Shuffles keep what the factor does not speak of: those of tokens are
shuffled within their prompt, those of prompts over prompts, whole prompts keeping their slots; or
over units where every unit has one value, so that translations of one item never part. Given the
token, values are shuffled among the occurrences of a token only (prompt fields: among the prompts
it occurs in), because which values come with which tokens must stay as it is.

Letters: T counted tokens, N tokens of a router with a value, P prompts, V values, G groups of
units, B shuffles.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.probe.analysis.intervals import jackknife_groups
from moescope.probe.analysis.selection import IntArray, known_fields
from moescope.probe.analysis.token_fields import position_buckets
from moescope.probe.analysis.token_slots import Tokens
from moescope.probe.analysis.tokens.information_terms import LabelGroups, group_labels
from moescope.probe.analysis.tokens.label_counts import Arrangement, BoolArray, arrange, compact
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

#: Factors of tokens -> the column of `tokens` they are made of.
TOKEN_FACTORS = {
    "token": "token_id",
    "previous_token": "previous_token_id",
    "position": None,
    "phase": "phase",
    "segment": "segment",
}
DEFAULT_TOKEN_FACTORS = ("token", "previous_token", "position")
DEFAULT_PROMPT_FACTORS = ("lang", "domain", "label")


def named_factors(store: Store, run_id: str, factor: str | Sequence[str] | None) -> tuple[str, ...]:
    """The factors that were asked for; all default ones for None.

    Args:
        store: where the run lies.
        run_id: the run.
        factor: a name, several as a sequence, or several with commas between them.

    Raises:
        AnalysisInputError: for a name that is neither a factor of tokens nor a prompt field.
    """
    if factor is None:
        return (*DEFAULT_TOKEN_FACTORS, *DEFAULT_PROMPT_FACTORS)
    listed = factor.split(",") if isinstance(factor, str) else factor
    names = tuple(dict.fromkeys(name.strip() for name in listed if name.strip()))
    fields = known_fields(store, run_id)
    for name in names:
        if name not in TOKEN_FACTORS and name not in fields:
            raise AnalysisInputError(
                f"run {run_id!r} has no factor {name!r}; tokens have {', '.join(TOKEN_FACTORS)}, "
                f"prompts have {', '.join(fields)}"
            )
    if not names:
        raise AnalysisInputError("factor names nothing; write for example token,position,lang")
    return names


def token_values(name: str, tokens: Tokens) -> IntArray:
    """The value of a factor of tokens as a number, -1 where there is none, [T]."""
    if name == "position":
        return position_buckets(tokens.positions)
    column = tokens.columns[TOKEN_FACTORS[name] or name]
    if name in ("phase", "segment"):
        return pd.factorize(column, sort=True)[0].astype(np.int64)
    return np.asarray(column).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """The labels of the tokens of a router, observed and shuffled.

    Attributes:
        observed: tokens by label and group of units.
        given: tokens by what is given (a token id; one label where nothing is) and group.
        everything: tokens by group alone.
        shuffled: tokens by shuffled label, one entry per shuffle.
        num_values: values of the factor.
        num_prompts: prompts with such a token.
        num_units: units with such a token.
        num_tokens: tokens.
        share_counted: these tokens over those with a value, before rare ids were left out.
    """

    observed: LabelGroups
    given: LabelGroups
    everything: LabelGroups
    shuffled: tuple[Arrangement, ...]
    num_values: int
    num_prompts: int
    num_units: int
    num_tokens: int
    share_counted: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLabels:
    """Makes the labels of a factor for the tokens that passed a router.

    Attributes:
        name: of the factor.
        values: its value for each token, -1 where there is none, [T].
        given: the id of each token where it is given, else None; below 0 it is unknown, [T].
        prompts: prompt of each token, [T].
        units: unit of each prompt, [P].
        blocks: for a factor of prompts, what keeps its value in a shuffle (prompt or unit), [P].
        min_count: occurrences that a given token needs.
        shuffles: B.
        seed: of groups and shuffles.
    """

    name: str
    values: IntArray
    given: IntArray | None
    prompts: IntArray
    units: IntArray
    blocks: IntArray | None
    min_count: int
    shuffles: int
    seed: int

    def labels(self, passed_T: BoolArray | None) -> Labels:
        """The labels of the tokens that passed a router; of all for None."""
        has_value_T = self.values >= 0
        if passed_T is not None:
            has_value_T &= passed_T
        kept = np.flatnonzero(has_value_T)
        with_value = len(kept)
        given_N = np.zeros(with_value, dtype=np.int64)
        if self.given is not None:
            kept = kept[_frequent(self.given[kept], self.min_count)]
            given_N = compact(self.given[kept])[0]
        value_N, values = compact(self.values[kept])
        prompt_N = self.prompts[kept]
        rng = random_of(self.seed, self.name)
        unit_N, units = compact(self.units[prompt_N])
        group_N, num_groups = jackknife_groups(unit_N, rng) if len(units) else (unit_N, 1)
        label_N, _ = compact(given_N * max(1, len(values)) + value_N)

        def grouped(of_N: IntArray) -> LabelGroups:
            made = group_labels(of_N, group_N, num_groups)
            return replace(made, pairs=replace(made.pairs, order=kept[made.pairs.order]))

        shuffled = self._shuffled(label_N, value_N, given_N, prompt_N, rng)
        return Labels(
            observed=grouped(label_N),
            given=grouped(given_N),
            everything=grouped(np.zeros(len(kept), dtype=np.int64)),
            shuffled=tuple(replace(one, order=kept[one.order]) for one in shuffled),
            num_values=len(values),
            num_prompts=len(np.unique(prompt_N)),
            num_units=len(units),
            num_tokens=len(kept),
            share_counted=len(kept) / with_value if with_value else np.nan,
        )

    def _shuffled(
        self,
        label_N: IntArray,
        value_N: IntArray,
        given_N: IntArray,
        prompt_N: IntArray,
        rng: np.random.Generator,
    ) -> list[Arrangement]:
        """Tokens arranged by shuffled labels, as indices of the kept tokens."""
        if self.blocks is not None:
            return [self._shuffled_blocks(value_N, given_N, prompt_N, rng) for _ in self._draws]
        tokens = arrange(label_N)
        within_N = prompt_N if self.given is None else given_N
        # Labels change places exactly as experts do the other way round.
        return [
            replace(tokens, order=shuffled_within(within_N, rng)[tokens.order]) for _ in self._draws
        ]

    def _shuffled_blocks(
        self, value_N: IntArray, given_N: IntArray, prompt_N: IntArray, rng: np.random.Generator
    ) -> Arrangement:
        """Values of whole blocks exchanged among the blocks in which a token occurs."""
        assert self.blocks is not None
        num_blocks = int(self.blocks.max()) + 1
        pair_N, key_Q = compact(given_N * num_blocks + self.blocks[prompt_N])
        value_Q = np.empty(len(key_Q), dtype=np.int64)
        value_Q[pair_N] = value_N
        value_Q = value_Q[shuffled_within(key_Q // num_blocks, rng)]
        num_values = int(value_N.max(initial=0)) + 1
        return arrange(compact(given_N * num_values + value_Q[pair_N])[0])

    @property
    def _draws(self) -> range:
        return range(self.shuffles)


def random_of(seed: int, name: str) -> np.random.Generator:
    """Random numbers of a factor, the same whatever other factors are asked for."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def shuffled_within(group_N: IntArray, rng: np.random.Generator) -> IntArray:
    """A random order that keeps every element in its group, [N]."""
    order = np.argsort(group_N, kind="stable")
    # Ties of the random part are too rare to matter, and harmless.
    shuffled = np.argsort(group_N[order] + rng.random(len(group_N)))
    result = np.empty_like(order)
    result[order] = order[shuffled]
    return result


def exchanged_blocks(value_P: IntArray, unit_P: IntArray) -> IntArray:
    """What keeps its value in a shuffle: units where each has one value, else prompts, [P]."""
    known_P = value_P >= 0
    pairs = np.unique(np.stack([unit_P[known_P], value_P[known_P]]), axis=1)
    if len(np.unique(pairs[0])) == pairs.shape[1]:
        return unit_P
    return np.arange(len(unit_P))


def _frequent(ids_N: NDArray[np.int64], min_count: int) -> BoolArray:
    """Which tokens have a known id that occurs often enough."""
    if not len(ids_N):
        return np.zeros(0, dtype=bool)
    _, code_N, count_V = np.unique(ids_N, return_inverse=True, return_counts=True)
    return np.asarray((count_V[code_N] >= min_count) & (ids_N >= 0))
