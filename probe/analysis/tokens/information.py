"""Routing as information: how much knowing a factor tells about the expert of a slot.

I(e; factor) / H(e), with e the expert of a slot drawn uniformly, for the token, the token before
it, its position, or any prompt field; or per expert, I(M; factor) / H(M), with M whether a token
selects it. Information estimated from counts is biased upward, the more the more values a factor
has; the mean over shuffles of the factor is taken off. What a factor tells is not what it causes:
tokens differ between languages, so given the token less is left of the language.

Letters: G groups of units, P prompts, V values, E routed experts, X what is estimated (1, or E with
one value per expert), B shuffles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moescope.probe.analysis.columns import expert_index, router_index, stack_parts
from moescope.probe.analysis.counts import GroupedUsage, read_counts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.intervals import jackknife_groups, jackknife_interval
from moescope.probe.analysis.measures import divide
from moescope.probe.analysis.selection import IntArray, Router, Selection, select, unit_labels
from moescope.probe.analysis.token_slots import Tokens, read_tokens
from moescope.probe.analysis.tokens.information_columns import information_columns
from moescope.probe.analysis.tokens.information_factors import (
    TOKEN_FACTORS,
    Labels,
    TokenLabels,
    exchanged_blocks,
    named_factors,
    random_of,
    shuffled_within,
    token_values,
)
from moescope.probe.analysis.tokens.information_prompts import prompt_terms, prompt_values
from moescope.probe.analysis.tokens.information_terms import (
    Terms,
    grouped_terms,
    size_terms,
    summed_terms,
    table_terms,
)
from moescope.probe.analysis.tokens.label_counts import (
    PerPassing,
    RouterSlots,
    compact,
    count_table,
    over_routers,
)
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

Given = Literal["none", "token"]
Part = dict[str, Any]

# Information that differs by less than this share of the entropy is the same, up to rounding.
TIE = 1e-9


@dataclass(frozen=True, kw_only=True)
class _Settings:
    given: Given
    per_expert: bool
    shuffles: int
    min_count: int
    unit: str
    seed: int

    def check(self) -> None:
        if self.given not in ("none", "token"):
            raise AnalysisInputError(f"given is {self.given!r}; it is none or token")
        for name in ("shuffles", "min_count"):
            if getattr(self, name) < 1:
                raise AnalysisInputError(f"{name} is {getattr(self, name)}; it is 1 or more")


def routing_information(
    store: Store,
    run_id: str,
    *,
    filters: Filters | None = None,
    factor: str | Sequence[str] | None = None,
    given: Given = "none",
    per_expert: bool = False,
    shuffles: int = 10,
    min_count: int = 10,
    unit: str = "pair_id",
    seed: int = 0,
) -> AnalysisTable:
    """What each factor tells about the expert of a slot, in nats and as a share of H(e).

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        factor: token, previous_token, position (0, 1, 2-3, 4-7, ...), phase, segment or a prompt
            field; several as a sequence or with commas. By default token, previous_token, position
            and those of lang, domain and label that have two values.
        given: `token` for what is left to tell once the token is known, over the ids that occur at
            least `min_count` times.
        per_expert: one row per expert, of whether a token selects it.
        shuffles: of each factor.
        min_count: occurrences that a token needs where it is given.
        unit: the prompt field that joins prompts into units; a prompt without it is one alone.
        seed: of shuffles and of the groups of units.

    Raises:
        AnalysisInputError: for an unknown factor, one with a single value, or when nothing is left
            to count.
    """
    settings = _Settings(
        given=given, per_expert=per_expert, shuffles=shuffles, min_count=min_count, unit=unit,
        seed=seed,
    )  # fmt: skip
    settings.check()
    names = named_factors(store, run_id, factor)
    if given == "token":
        names = _without_token(names, is_named=factor is not None)
    fields = [name for name in names if name not in TOKEN_FACTORS]
    selection = select(store, run_id, filters or Filters(), fields=[unit, *fields])
    parts, skipped = _all_parts(selection, names, settings, is_named=factor is not None)
    columns = information_columns(per_expert=per_expert)
    frame = stack_parts([part for name in names for part in parts.get(name, [])], columns)
    parameters = {
        "factor": list(parts), "given": given, "per_expert": per_expert, "shuffles": shuffles,
        "min_count": min_count, "unit": unit, "seed": seed,
    }  # fmt: skip
    return AnalysisTable(
        name="information",
        title="What the routing tells about "
        + ("each factor" if given == "none" else "each factor, given the token"),
        frame=frame,
        columns=columns,
        context=selection.context(
            num_prompts=int(frame["num_prompts"].max()),
            num_tokens=int(frame["num_tokens"].max()),
            parameters=parameters,
        ),
        notes=(*selection.notes, *_notes(skipped, given)),
    )


def _without_token(names: tuple[str, ...], *, is_named: bool) -> tuple[str, ...]:
    if is_named and "token" in names:
        raise AnalysisInputError(
            "factor token tells nothing once the token is given; leave it out, or use given none"
        )
    return tuple(name for name in names if name != "token")


def _notes(skipped: Sequence[str], given: Given) -> tuple[str, ...]:
    notes = []
    if skipped:
        notes.append(
            "Left out, because the counted tokens have fewer than two values: "
            f"{', '.join(skipped)}."
        )
    if given == "token":
        notes.append(
            "Given the token, values are shuffled among the occurrences of a token, which stand in "
            "prompts that differ in other ways too; so there is no p, and the interval decides."
        )
    return tuple(notes)


def _all_parts(
    selection: Selection, names: Sequence[str], settings: _Settings, *, is_named: bool
) -> tuple[dict[str, list[Part]], list[str]]:
    """Rows of every factor, and the factors that have too few values."""
    unit_P = unit_labels(selection.prompts, settings.unit)
    of_prompts = [name for name in names if name not in TOKEN_FACTORS]
    by_usage = of_prompts if settings.given == "none" else []
    by_token = [name for name in names if name not in by_usage]
    found: dict[str, list[Part]] = {}
    if by_usage:
        usage = read_counts(selection, np.arange(len(unit_P)), dtype=np.float32)
        for name in by_usage:
            found[name] = _prompt_parts(selection, usage, name, unit_P, settings)
    if by_token:
        found |= _token_parts(selection, by_token, unit_P, settings)
    skipped = [name for name in names if not found[name]]
    if skipped and (is_named or len(skipped) == len(names)):
        among = f" among ids seen {settings.min_count} times" if settings.given == "token" else ""
        raise AnalysisInputError(
            f"the counted tokens of run {selection.run_id!r} have fewer than two values of "
            f"{skipped[0]!r}{among}, so it tells nothing; name another factor or widen the filters"
        )
    return {name: found[name] for name in names if found[name]}, skipped


def _token_parts(
    selection: Selection, names: Sequence[str], unit_P: IntArray, settings: _Settings
) -> dict[str, list[Part]]:
    """Rows of factors that need the routing of single tokens; none where there is one value."""
    columns = {TOKEN_FACTORS.get(name) for name in names} - {None}
    columns |= {"token_id"} if settings.given == "token" else set()
    tokens = read_tokens(selection, sorted(str(column) for column in columns))
    all_labels = {
        name: PerPassing(_token_labels(selection, tokens, name, unit_P, settings).labels)
        for name in names
    }
    all_labels = {name: of for name, of in all_labels.items() if of(None).num_values > 1}

    def work(slots: RouterSlots) -> list[Part]:
        parts = []
        for name, labels_of in all_labels.items():
            labels = labels_of(slots.passed)
            terms = _token_terms(slots, labels, per_expert=settings.per_expert)
            numbers = {
                "num_values": labels.num_values, "share_counted": labels.share_counted,
                "num_tokens": labels.num_tokens, "num_prompts": labels.num_prompts,
                "num_units": labels.num_units,
            }  # fmt: skip
            parts.append(_part(name, slots.router, terms, numbers, settings))
        return parts

    found: dict[str, list[Part]] = {name: [] for name in names}
    if all_labels:
        for parts in over_routers(selection, tokens, work):
            for part in parts:
                found[part["factor"][0]].append(part)
    return found


def _token_labels(
    selection: Selection, tokens: Tokens, name: str, unit_P: IntArray, settings: _Settings
) -> TokenLabels:
    is_given = settings.given == "token"
    if name in TOKEN_FACTORS:
        value_T, block_P = token_values(name, tokens), None
    else:
        value_P = prompt_values(selection, name)
        value_T, block_P = value_P[tokens.prompts], exchanged_blocks(value_P, unit_P)
    return TokenLabels(
        name=name,
        values=value_T,
        given=np.asarray(tokens.columns["token_id"], dtype=np.int64) if is_given else None,
        prompts=tokens.prompts,
        units=unit_P,
        blocks=block_P,
        min_count=settings.min_count,
        shuffles=settings.shuffles,
        seed=settings.seed,
    )


def _token_terms(slots: RouterSlots, labels: Labels, *, per_expert: bool) -> Terms:
    everything = labels.everything.pairs
    counts_GE = count_table(slots, everything, 0, everything.num_labels)
    shuffled = [summed_terms(slots, one, per_expert=per_expert) for one in labels.shuffled]
    marginal = table_terms(counts_GE[:, None], everything.sizes[:, None], per_expert=per_expert)
    is_given = len(labels.given.starts) > 2
    return Terms(
        label=grouped_terms(slots, labels.observed, per_expert=per_expert),
        given=grouped_terms(slots, labels.given, per_expert=per_expert) if is_given else marginal,
        marginal=marginal,
        size=size_terms(counts_GE, everything.sizes, per_expert=per_expert),
        shuffled=np.stack(shuffled),
    )


def _prompt_parts(
    selection: Selection, usage: GroupedUsage, name: str, unit_P: IntArray, settings: _Settings
) -> list[Part]:
    """Rows of a factor of prompts, from their usage; none where it has one value."""
    all_P = prompt_values(selection, name)
    kept = np.flatnonzero((all_P >= 0) & (usage.prompt_tokens > 0))
    value_P, values = compact(all_P[kept])
    if len(values) < 2:
        return []
    own_units_P = compact(unit_P[kept])[0]
    rng = random_of(settings.seed, name)
    group_P, _ = jackknife_groups(own_units_P, rng)
    block_P = exchanged_blocks(value_P, own_units_P)
    value_B = np.empty(int(block_P.max()) + 1, dtype=np.int64)
    value_B[block_P] = value_P
    shuffled = [
        value_B[shuffled_within(np.zeros_like(value_B), rng)][block_P]
        for _ in range(settings.shuffles)
    ]
    parts = []
    for one in usage.routers:
        own = one.tokens[kept] > 0
        terms = prompt_terms(
            one, kept, group_P, [value_P, *shuffled], per_expert=settings.per_expert
        )
        numbers = {
            "num_values": len(np.unique(value_P[own])), "share_counted": 1.0,
            "num_tokens": int(one.tokens[kept].sum()), "num_prompts": int(own.sum()),
            "num_units": len(np.unique(own_units_P[own])),
        }  # fmt: skip
        parts.append(_part(name, one.router, terms, numbers, settings))
    return parts


def _part(
    name: str, router: Router, terms: Terms, numbers: Mapping[str, Any], settings: _Settings
) -> Part:
    """The rows of one factor at one router; missing where every slot has the same expert."""
    size = terms.size
    plug_in_X = divide(terms.label.total - terms.given.total, size.total)
    plug_in_GX = divide(terms.label.without - terms.given.without, size.without)
    entropy_X = 0.0 - divide(terms.marginal.total, size.total)
    entropy_GX = -divide(terms.marginal.without, size.without)
    shuffled_BX = divide(terms.shuffled - terms.given.total, size.total)
    chance_X = shuffled_BX.mean(axis=0)
    share_X = divide(plug_in_X - chance_X, entropy_X)
    low_X, high_X = jackknife_interval(
        share_X, divide(plug_in_GX - chance_X, entropy_GX), bounds=(-np.inf, 1.0)
    )
    # Up to rounding, which is relative to the entropy that information is a difference of.
    reached_X = (shuffled_BX >= plug_in_X - TIE * entropy_X).sum(axis=0)
    p_X = (reached_X + 1.0) / (len(shuffled_BX) + 1)
    if settings.given != "none":
        p_X = np.full_like(p_X, np.nan)
    measures = {
        "share": share_X, "low": low_X, "high": high_X, "p": p_X,
        "information": plug_in_X - chance_X, "information_nats": plug_in_X,
        "shuffled_nats": chance_X,
    }  # fmt: skip
    index = expert_index(router, None) if settings.per_expert else router_index(router, None)
    return (
        {"factor": [name] * len(entropy_X)}
        | index
        | {key: np.where(entropy_X > 0, values, np.nan) for key, values in measures.items()}
        | {"entropy_nats": entropy_X}
        | {key: np.full(len(entropy_X), number) for key, number in numbers.items()}
    )
