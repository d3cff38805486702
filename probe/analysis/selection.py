"""Which prompts and routers of a run the filters leave, and what is known of the prompts.

A prompt field is a column of `prompts` or a key of its `meta`: both are read the same way, as
text. `moescope.probe.analysis.counts` reads what the selected prompts used.

Letters: P prompts, G groups of prompts, E experts of a router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.probe.analysis.filters import Filters, describe_conditions
from moescope.probe.analysis.frame import Context
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.schema import SHARD_TABLES
from moescope.probe.storage.store import Store

IntArray = NDArray[np.int64]

# Columns of `prompts` that are fields: all but what identifies a row and the bag of further ones.
FIELD_COLUMNS = tuple(
    name for name in SHARD_TABLES["prompts"].names if name not in ("prompt_id", "meta")
)

# Rows of a table split by a field (values x experts) above which a table helps nobody.
MOST_ROWS = 5_000_000


@dataclass(frozen=True, kw_only=True)
class Router:
    """One router of a run: decoder layer, kind, ordinal among routed layers, E and K."""

    layer: int
    kind: str
    moe_layer: int
    num_experts: int
    top_k: int

    @property
    def chance(self) -> float:
        """Share of tokens that would use an expert if all were used alike: K/E."""
        return self.top_k / self.num_experts


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The prompts and routers that filters leave of one run.

    Attributes:
        store: where the run lies.
        run_id, model, revision: the run.
        filters: what was asked.
        routers: ordered by kind and layer.
        prompts: `prompt_id` ascending, and each requested field as text (None where missing).
        notes: what the reader of any table must know (an unfinished run).
    """

    store: Store
    run_id: str
    model: str
    revision: str | None
    filters: Filters
    routers: tuple[Router, ...]
    prompts: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def prompt_ids(self) -> IntArray:
        """Ids of the selected prompts, ascending."""
        return self.prompts["prompt_id"].to_numpy(dtype=np.int64)

    def context(
        self, *, num_prompts: int, num_tokens: int, parameters: Mapping[str, Any]
    ) -> Context:
        """The context of a table computed from this selection."""
        return Context(
            model=self.model,
            revision=self.revision,
            run_id=self.run_id,
            num_prompts=num_prompts,
            num_tokens=num_tokens,
            parameters=dict(parameters),
            filters=self.filters.to_json(),
            selection=self.filters.describe(),
        )

    def require_routing(self, why: str) -> None:
        """Refuse when the run holds no row of routing.

        Raises:
            AnalysisInputError: naming what needs the rows and how to record them.
        """
        if not self.store.has_routing(self.run_id):
            raise AnalysisInputError(
                f"run {self.run_id!r} holds usage but no routing per token, which {why} needs; "
                "record it with --record topk"
            )


def select(store: Store, run_id: str, filters: Filters, *, fields: Sequence[str] = ()) -> Selection:
    """Find the prompts and routers that the filters leave.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        fields: further prompt fields to fetch, beside those that the filters name.

    Raises:
        RunError: when there is no such run.
        AnalysisInputError: for an unknown field or layer, or when no prompt is left.
    """
    names = tuple(dict.fromkeys([*filters.fields, *fields]))
    with store.at_once():
        run = store.run(run_id)
        routers = _select_routers(store, run_id, filters)
        prompts = read_fields(store, run_id, names)
    notes: tuple[str, ...] = ()
    if run.status != "complete":
        planned = f" of {run.num_prompts} planned" if run.num_prompts is not None else ""
        notes = (f"The run is {run.status}: {len(prompts)}{planned} prompts so far.",)
    lacks = run.manifest.get("lacks", [])
    if lacks:
        notes += (f"The run was imported; its source does not have: {', '.join(lacks)}.",)
    prompts = prompts[matching_prompts(prompts, filters.fields)].reset_index(drop=True)
    if prompts.empty:
        asked = f" with {describe_conditions(filters.fields)}" if filters.fields else ""
        raise AnalysisInputError(
            f"run {run_id!r} has no prompt{asked}{_known_values(store, run_id, filters.fields)}"
        )
    selection = Selection(
        store=store,
        run_id=run_id,
        model=run.model,
        revision=run.revision,
        filters=filters,
        routers=routers,
        prompts=prompts,
        notes=notes,
    )
    if filters.needs_positions:
        selection.require_routing(f"tokens {filters.scope!r}")
    return selection


def read_fields(store: Store, run_id: str, names: Sequence[str]) -> pd.DataFrame:
    """Prompt fields of a run as text: `prompt_id` ascending, then one column per name.

    A field is a column of `prompts`, or a key of its `meta` (numbers and truth values as JSON
    writes them).

    Raises:
        AnalysisInputError: for a field that the run's prompts do not have, listing those known.
    """
    keys = [] if set(names) <= set(FIELD_COLUMNS) else _meta_keys(store, run_id)
    expressions: list[str] = []
    parameters: list[str] = []
    for index, name in enumerate(names):
        if name in FIELD_COLUMNS:
            expressions.append(f'CAST("{name}" AS VARCHAR) AS field_{index}')
        elif name in keys:
            pointer = "/" + name.replace("~", "~0").replace("/", "~1")
            expressions.append(f"json_extract_string(meta, ?) AS field_{index}")
            parameters.append(pointer)
        else:
            raise AnalysisInputError(
                f"prompts of run {run_id!r} have no field {name!r}; "
                f"they have {', '.join([*FIELD_COLUMNS, *keys])}"
            )
    selected = ", ".join(["prompt_id", *expressions])
    frame = store.query(
        f"SELECT {selected} FROM prompts WHERE run_id = ? ORDER BY prompt_id",
        [*parameters, run_id],
    )
    frame.columns = pd.Index(["prompt_id", *names])
    return frame.astype(dict.fromkeys(names, "str"))


def known_fields(store: Store, run_id: str) -> list[str]:
    """The fields of a run's prompts: columns, then further keys found in `meta`."""
    return [*FIELD_COLUMNS, *_meta_keys(store, run_id)]


def field_values(store: Store, run_id: str, name: str) -> dict[str, int]:
    """The values of a prompt field, sorted, with the number of prompts that have each.

    Raises:
        AnalysisInputError: for a field that the run's prompts do not have, listing those known.
    """
    counts = read_fields(store, run_id, [name])[name].value_counts()
    return {str(value): int(counts[value]) for value in sorted(counts.index)}


def _meta_keys(store: Store, run_id: str) -> list[str]:
    keys = store.query(
        "SELECT DISTINCT unnest(json_keys(meta)) AS key FROM prompts WHERE run_id = ? ORDER BY key",
        [run_id],
    )["key"]
    return [key for key in keys.tolist() if key not in FIELD_COLUMNS]


def matching_prompts(
    prompts: pd.DataFrame, conditions: Mapping[str, tuple[str, ...]]
) -> NDArray[np.bool_]:
    """Which rows hold one of the values, for every field; a missing value matches nothing."""
    kept = np.ones(len(prompts), dtype=bool)
    for name, values in conditions.items():
        kept &= prompts[name].isin(list(values)).to_numpy(dtype=bool)
    return kept


def group_by_value(selection: Selection, name: str) -> tuple[list[str], IntArray]:
    """The values of a field, sorted, and the index of each prompt's value (-1 where missing).

    Raises:
        AnalysisInputError: when no prompt has a value, or there are too many values for a table.
    """
    codes, values = pd.factorize(selection.prompts[name], sort=True, use_na_sentinel=True)
    if not len(values):
        raise AnalysisInputError(
            f"no selected prompt of run {selection.run_id!r} has a value of {name!r}; "
            "name a field that they have"
        )
    experts = sum(router.num_experts for router in selection.routers)
    if len(values) * experts > MOST_ROWS:
        raise AnalysisInputError(
            f"field {name!r} has {len(values)} values for {experts} experts, more than "
            f"{MOST_ROWS:,} rows; name a field with fewer values, or keep some of them by a filter"
        )
    return [str(value) for value in values], codes.astype(np.int64)


def missing_value_notes(selection: Selection, name: str) -> tuple[str, ...]:
    """A note on prompts without a value of the field, if there are any."""
    missing = int(selection.prompts[name].isna().sum())
    if not missing:
        return ()
    return (f"Prompts without a value of {name}, left out: {missing}.",)


def unit_labels(prompts: pd.DataFrame, name: str) -> IntArray:
    """The unit of each prompt, from 0: its value of a field, else the prompt itself.

    Translations and templates of one item are one unit of resampling (methods of contrast).
    """
    own = "prompt " + prompts["prompt_id"].astype(str)
    values = ("value " + prompts[name]).fillna(own)
    return pd.factorize(values)[0].astype(np.int64)


def _select_routers(store: Store, run_id: str, filters: Filters) -> tuple[Router, ...]:
    rows = store.arrow(
        "SELECT layer, kind, moe_layer, num_experts, top_k FROM layers WHERE run_id = ? "
        "ORDER BY kind, layer",
        [run_id],
    )
    routers = [Router(**row) for row in rows.to_pylist()]
    of_kind = [router for router in routers if filters.kind in (None, router.kind)]
    if not of_kind:
        kinds = ", ".join(sorted({router.kind for router in routers})) or "none"
        raise AnalysisInputError(
            f"run {run_id!r} has no router of kind {filters.kind!r}; it has: {kinds}"
        )
    layers = {router.layer for router in of_kind}
    for layer in filters.layers or ():
        if layer not in layers:
            known = ", ".join(str(known) for known in sorted(layers))
            raise AnalysisInputError(
                f"run {run_id!r} has no router in layer {layer}; it has {known}"
            )
    return tuple(
        router for router in of_kind if filters.layers is None or router.layer in filters.layers
    )


def _known_values(store: Store, run_id: str, conditions: Mapping[str, tuple[str, ...]]) -> str:
    """What the named fields do hold, for an error message."""
    if not conditions:
        return ""
    frame = read_fields(store, run_id, tuple(conditions))
    held = []
    for name in conditions:
        values = sorted(frame[name].dropna().unique())
        shown = ", ".join(values[:8]) + (", …" if len(values) > 8 else "")
        held.append(f"{name} holds {shown or 'nothing'}")
    return "; " + "; ".join(held)
