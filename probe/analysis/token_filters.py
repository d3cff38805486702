"""Filters as SQL: which tokens and routers count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.selection import Router


def chosen_tokens_sql(
    filters: Filters,
    *,
    columns: Sequence[str] = (),
    neighbors: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """SQL for `prompt_id, position` and further columns of the tokens that the filters pick.

    `neighbors` are columns made of the token before or after, as name -> window function; -1 where
    there is none. The parameters are the run, the first and the last prompt id.
    """
    looked_up = "".join(
        f", coalesce({window} OVER (PARTITION BY prompt_id ORDER BY position), -1) AS {name}"
        for name, window in neighbors.items()
    )
    conditions = ["t.is_routed"]
    positions = {
        "last_prompt": "t.position = p.num_tokens - 1",
        "first_generated": "t.position >= p.num_tokens AND "
        f"t.position < p.num_tokens + {filters.first_generated}",
        "span": "t.in_span",
    }
    if filters.needs_positions:
        conditions.append(positions[filters.scope])
    conditions += token_conditions(filters)
    return (
        f"SELECT {', '.join(f't.{name}' for name in ('prompt_id', 'position', *columns))} "
        f"FROM (SELECT *{looked_up} FROM tokens WHERE run_id = ? AND prompt_id BETWEEN ? AND ?) t "
        f"JOIN prompts p USING (run_id, prompt_id) WHERE {' AND '.join(conditions)}"
    )


def router_condition(routers: Sequence[Router], prefix: str = "") -> str:
    """SQL that keeps the layers and kinds of these routers."""
    layers = ", ".join(str(layer) for layer in sorted({router.layer for router in routers}))
    kinds = ", ".join(f"'{kind}'" for kind in sorted({router.kind for router in routers}))
    return f"{prefix}layer IN ({layers}) AND {prefix}kind IN ({kinds})"


def token_conditions(filters: Filters) -> list[str]:
    """Conditions on phase, segment and is_special, which `usage_arrays` and `tokens` both have."""
    phase = filters.scope if filters.scope in ("prompt", "generated") else filters.phase
    conditions = [f"phase = '{phase}'"] if phase else []
    if filters.segments is not None:
        listed = ", ".join(f"'{segment}'" for segment in filters.segments)
        conditions.append(f"segment IN ({listed})")
    if filters.content_only and filters.scope != "last_prompt":
        conditions.append("NOT is_special")
        if filters.segments is None:
            conditions.append("segment != 'template'")
    return conditions


def column_array(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of numbers as a numpy array."""
    return np.asarray(table.column(name).to_numpy())
