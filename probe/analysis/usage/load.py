"""How evenly a model uses its experts: load, importance, balance.

`expert_load` has one row per router and expert, `load_balance` one per router. Load counts slots
(token, rank), token share counts tokens, importance sums routing weights: three different
questions, never mixed. Shared experts see every token and take no part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moescope.probe.analysis.columns import (
    CHANCE,
    EXPERT,
    KIND,
    LAYER,
    NUM_PROMPTS,
    NUM_TOKENS,
    expert_index,
    router_index,
    stack_parts,
    value_column,
)
from moescope.probe.analysis.counts import (
    FloatArray,
    GroupedUsage,
    Quantity,
    RouterUsage,
    has_quantity,
    read_counts,
)
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.measures import (
    coefficient_of_variation,
    divide,
    entropy_nats,
    gini,
    imbalance,
    normalize,
)
from moescope.probe.analysis.selection import Selection, group_by_value, missing_value_notes, select
from moescope.probe.analysis.token_fields import TOKEN_FIELDS, token_field
from moescope.probe.storage.store import Store

LOAD_COLUMNS = (
    LAYER,
    KIND,
    EXPERT,
    Column(
        name="load",
        unit="share of slots",
        range="[0, 1]; sums to 1 over the experts of a router",
        definition="Slots (token, rank) that went to this expert, over all slots of the router.",
    ),
    Column(
        name="load_chance",
        unit="share of slots",
        range="1/E",
        definition="Load if all experts were used alike.",
    ),
    Column(
        name="token_share",
        unit="share of tokens",
        range="[0, 1]; sums to K over the experts of a router",
        definition="Tokens that selected this expert, over all tokens.",
        source="OLMoE, arXiv 2409.02060, section 5",
    ),
    CHANCE,
    Column(
        name="importance",
        unit="share of routing weight",
        range="[0, 1]; sums to 1 over the experts of a router",
        definition="Sum of the routing weights this expert got, over the sum for all experts.",
        source="Shazeer et al., arXiv 1701.06538, section 4",
    ),
    Column(
        name="num_slots",
        unit="slots",
        range="0 or more",
        definition="Slots that went to this expert: tokens that selected it.",
    ),
    NUM_TOKENS,
    NUM_PROMPTS,
)

BALANCE_COLUMNS = (
    LAYER,
    KIND,
    Column(
        name="usage_entropy_nats",
        unit="nats",
        range="[0, ln E]",
        definition="Entropy of the load over many tokens (not of one token's router scores).",
    ),
    Column(
        name="usage_entropy",
        unit="share of ln E",
        range="[0, 1]; 1 when all experts are used alike",
        definition="Usage entropy over ln E.",
    ),
    Column(
        name="gini",
        unit="",
        range="[0, (E-1)/E]; 0 when all experts are used alike",
        definition="Gini coefficient of the load.",
    ),
    Column(
        name="gini_chance",
        unit="",
        range="0 or more",
        definition="Gini coefficient expected when independent tokens select K of E experts "
        "uniformly: sqrt((1 - K/E) / (N K/E) / pi). Tokens of one prompt are not independent, so "
        "a real router without preferences lies above it.",
    ),
    Column(
        name="imbalance",
        unit="",
        range="[0, E-1]; 0 when all experts are used alike",
        definition="Largest load over mean load, minus 1.",
        source="MaxVio: Wang et al., arXiv 2408.15664",
    ),
    Column(
        name="cv",
        unit="",
        range="[0, sqrt(E-1)]",
        definition="Coefficient of variation of the load: standard deviation over mean.",
        source="Shazeer et al., arXiv 1701.06538, section 4",
    ),
    Column(
        name="cv_chance",
        unit="",
        range="0 or more",
        definition="Coefficient of variation expected when independent tokens select K of E "
        "experts uniformly: sqrt((1 - K/E) / (N K/E)).",
    ),
    Column(
        name="never_used",
        unit="experts",
        range="[0, E]",
        definition="Experts that no counted token selected.",
    ),
    Column(
        name="never_used_chance",
        unit="experts",
        range="[0, E]",
        definition="Unused experts expected when N independent tokens select uniformly: "
        "E (1 - K/E)^N.",
    ),
    Column(
        name="top_expert",
        unit="",
        range="expert id; the lowest of equals",
        definition="The expert that most tokens selected.",
    ),
    Column(
        name="top_expert_token_share",
        unit="share of tokens",
        range="[0, 1]",
        definition="Tokens that selected it, over all tokens.",
    ),
    CHANCE,
    Column(name="num_experts", unit="experts", range="1 or more", definition="Routed experts, E."),
    Column(
        name="top_k",
        unit="experts",
        range="1 to E",
        definition="Experts per token, K, by the model's configuration.",
    ),
    NUM_TOKENS,
    NUM_PROMPTS,
)


def expert_load(
    store: Store, run_id: str, *, filters: Filters | None = None, by: str | None = None
) -> AnalysisTable:
    """Load, token share and importance of every expert.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        by: a field of prompts or tokens; one set of rows per value, in a first column `value`.

    Raises:
        AnalysisInputError: for an unknown field, or when nothing is left to count.
    """
    selection, values, usage = _read(store, run_id, filters or Filters(), by)
    parts = []
    for router_usage in usage.routers:
        router = router_usage.router
        index = expert_index(router, values)
        counts_GE = router_usage.counts
        parts.append(
            index
            | {
                "load": normalize(counts_GE).ravel(),
                "load_chance": np.full(counts_GE.size, 1 / router.num_experts),
                "token_share": divide(counts_GE, router_usage.tokens[:, None]).ravel(),
                "chance": np.full(counts_GE.size, router.chance),
                "importance": _importance(router_usage).ravel(),
                "num_slots": counts_GE.ravel().astype(np.int64),
                "num_tokens": np.repeat(router_usage.tokens, router.num_experts).astype(np.int64),
                "num_prompts": np.repeat(usage.group_prompts, router.num_experts),
            }
        )
    return _table("load", "Load of the experts", parts, LOAD_COLUMNS, selection, usage, by)


def load_balance(
    store: Store, run_id: str, *, filters: Filters | None = None, by: str | None = None
) -> AnalysisTable:
    """How evenly each router spreads its tokens.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        by: a field of prompts or tokens; one row per value of it, in a first column `value`.

    Raises:
        AnalysisInputError: for an unknown field, or when nothing is left to count.
    """
    selection, values, usage = _read(store, run_id, filters or Filters(), by)
    parts = []
    for router_usage in usage.routers:
        router, tokens_G = router_usage.router, router_usage.tokens
        counts_GE = router_usage.counts
        size = len(tokens_G)
        entropy_G = entropy_nats(normalize(counts_GE))
        cv_chance_G = np.sqrt(divide(1 - router.chance, tokens_G * router.chance))
        share_GE = divide(counts_GE, tokens_G[:, None])
        parts.append(
            router_index(router, values)
            | {
                "usage_entropy_nats": entropy_G,
                "usage_entropy": divide(entropy_G, np.log(router.num_experts)),
                "gini": gini(counts_GE),
                "gini_chance": cv_chance_G / np.sqrt(np.pi),
                "imbalance": imbalance(counts_GE),
                "cv": coefficient_of_variation(counts_GE),
                "cv_chance": cv_chance_G,
                "never_used": (counts_GE == 0).sum(axis=1),
                "never_used_chance": router.num_experts * (1 - router.chance) ** tokens_G,
                "top_expert": counts_GE.argmax(axis=1),
                "top_expert_token_share": share_GE.max(axis=1),
                "chance": np.full(size, router.chance),
                "num_experts": np.full(size, router.num_experts),
                "top_k": np.full(size, router.top_k),
                "num_tokens": tokens_G.astype(np.int64),
                "num_prompts": usage.group_prompts,
            }
        )
    title = "Balance of the routers"
    return _table("balance", title, parts, BALANCE_COLUMNS, selection, usage, by)


def _read(
    store: Store, run_id: str, filters: Filters, by: str | None
) -> tuple[Selection, list[str] | None, GroupedUsage]:
    is_token_field = by in TOKEN_FIELDS
    selection = select(store, run_id, filters, fields=[by] if by and not is_token_field else ())
    values, group_P, field = None, np.zeros(len(selection.prompts), dtype=np.int64), None
    if by is not None and is_token_field:
        field = token_field(selection, by)
        values = list(field.labels)
    elif by is not None:
        values, group_P = group_by_value(selection, by)
    quantities: list[Quantity] = ["num_tokens"]
    if has_quantity(selection, "weight_sum"):
        quantities.append("weight_sum")
    usage = read_counts(selection, group_P, quantities=quantities, field=field)
    return selection, values, usage


def _importance(usage: RouterUsage) -> FloatArray:
    """Share of the routing weight [G, E]; unknown where the run has no weights."""
    if "weight_sum" not in usage.sums:
        return np.full(usage.counts.shape, np.nan)
    return normalize(usage.sums["weight_sum"])


def _table(
    name: str,
    title: str,
    parts: list[dict[str, Any]],
    columns: tuple[Column, ...],
    selection: Selection,
    usage: GroupedUsage,
    by: str | None,
) -> AnalysisTable:
    described = columns if by is None else (value_column(by), *columns)
    notes = selection.notes
    if by is not None and by not in TOKEN_FIELDS:
        notes += missing_value_notes(selection, by)
    return AnalysisTable(
        name=name,
        title=title if by is None else f"{title} by {by}",
        frame=stack_parts(parts, described),
        columns=described,
        context=selection.context(
            num_prompts=usage.num_prompts, num_tokens=usage.num_tokens, parameters={"by": by}
        ),
        notes=notes,
    )
