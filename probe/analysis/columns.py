"""Columns that many tables share, and the index columns of tables over routers and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moescope.probe.analysis.frame import Column
from moescope.probe.analysis.selection import Router

LAYER = Column(
    name="layer", unit="", range="0 or more", definition="Decoder layer index, as in the model."
)
KIND = Column(
    name="kind",
    unit="",
    range="mlp, attention, encoder or mtp",
    definition="What the router routes; a layer can have routers of several kinds.",
)
EXPERT = Column(
    name="expert", unit="", range="[0, E-1]", definition="Routed expert, as the router numbers it."
)
CHANCE = Column(
    name="chance",
    unit="share of tokens",
    range="K/E",
    definition="Share of tokens that would use an expert if all were used alike.",
)
NUM_TOKENS = Column(
    name="num_tokens",
    unit="tokens",
    range="1 or more",
    definition="Counted tokens that passed this router.",
)
NUM_PROMPTS = Column(
    name="num_prompts",
    unit="prompts",
    range="1 or more",
    definition="Prompts with at least one counted token.",
)


def value_column(by: str) -> Column:
    """The first column of a table that is split by a field of prompts or tokens."""
    return Column(name="value", unit="", range="text", definition=f"Value of the field {by}.")


def router_index(router: Router, values: Sequence[str] | None) -> dict[str, Any]:
    """Columns `value` (where split), layer, kind: one row per value."""
    size = 1 if values is None else len(values)
    index: dict[str, Any] = {} if values is None else {"value": list(values)}
    return index | {"layer": np.full(size, router.layer), "kind": [router.kind] * size}


def expert_index(router: Router, values: Sequence[str] | None) -> dict[str, Any]:
    """Columns `value` (where split), layer, kind, expert: one row per value and expert."""
    size, experts = 1 if values is None else len(values), router.num_experts
    index: dict[str, Any] = {}
    if values is not None:
        index["value"] = np.repeat(np.asarray(values, dtype=object), experts)
    return index | {
        "layer": np.full(size * experts, router.layer),
        "kind": [router.kind] * (size * experts),
        "expert": np.tile(np.arange(experts), size),
    }


def stack_parts(parts: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> pd.DataFrame:
    """One frame from the parts of each router, in the order of the described columns.

    Rows without a counted token are left out: nothing is defined on them.
    """
    frame = pd.concat([pd.DataFrame(dict(part)) for part in parts], ignore_index=True)
    frame = frame[frame["num_tokens"] > 0]
    return frame[[column.name for column in columns]].reset_index(drop=True)
