"""Does a recorded run contradict itself?

The same routing is stored twice, as slots (`routing`) and as counts (`usage`), beside the tokens
and the plan. Whatever lost, doubled or misplaced a row makes two of them disagree. All checks are
SQL over the whole run; 7.7 million slots take a few seconds on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import duckdb

from moescope.probe.errors import RecordingError, RunError
from moescope.probe.storage.contradictions import (
    NORMS,
    NORMS_MISSING,
    POSITIONS,
    PROBS,
    PROBS_OF_TOKENS,
    PROMPTS_ONCE,
    SLOTS,
    SLOTS_OF_TOKENS,
    UNROUTED,
    USAGE,
    USAGE_BY_EXPERT,
    USAGE_SHAPE,
    WEIGHT_ORDER,
)
from moescope.probe.storage.in_shards import is_in_shards
from moescope.probe.storage.run_folder import run_folder
from moescope.probe.storage.shards import read_shard

if TYPE_CHECKING:
    from moescope.probe.storage.store import Store

PROBLEMS_PER_CHECK: Final = 20
"""A damaged run has the same problem in many places: this many of each kind are reported."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One contradiction.

    Attributes:
        check: the name of the check that found it.
        sentence: what contradicts what, with prompt, layer and numbers.
        prompt_id: the prompt, if it is about one.
        layer: the decoder layer, if it is about one.
    """

    check: str
    sentence: str
    prompt_id: int | None = None
    layer: int | None = None

    def __str__(self) -> str:
        return self.sentence


def verify_run(store: Store, run_id: str) -> list[Problem]:
    """Every contradiction in a run, at most `PROBLEMS_PER_CHECK` of each kind.

    Raises:
        RunError: the store has no such run.
    """
    store.run(run_id)
    with store.connection() as con:
        damaged = list(damaged_shards(con, store.path, run_id))
        return damaged or find_problems(con, run_id)


def find_problems(
    con: duckdb.DuckDBPyConnection, run_id: str, *, per_check: int | None = PROBLEMS_PER_CHECK
) -> list[Problem]:
    """As `verify_run`, on a connection that is open already; `per_check` None finds all."""
    row = con.execute(
        "SELECT record_level, plan_id, num_prompts, manifest, source FROM runs WHERE run_id = ?",
        [run_id],
    ).fetchone()
    if row is None:
        raise RunError(f"there is no run {run_id!r} to verify")
    record_level, plan_id, num_prompts, manifest, source = row
    check = partial(_run_check, con, run_id, per_check)
    problems = [
        *_missing_prompts(con, run_id, num_prompts, json.loads(manifest)),
        *check("prompts once", PROMPTS_ONCE),
        *check("norms", NORMS),
    ]
    if "positions" in json.loads(manifest).get("lacks", []):  # an import of counts
        problems += check("usage", USAGE_SHAPE)
        return problems
    problems += check("positions", POSITIONS)
    if source == "recorded":  # what others recorded may have tokens that were not captured
        problems += check("routed tokens", UNROUTED)
    problems += check("usage", USAGE)
    if json.loads(manifest).get("arguments", {}).get("norms"):
        problems += check("norms missing", NORMS_MISSING)
    if record_level != "usage":
        problems += check("slots of tokens", SLOTS_OF_TOKENS)
        problems += check("slots", SLOTS)
        problems += check("usage by expert", USAGE_BY_EXPERT)
        if plan_id is None:  # steering may drop a slot and leave it with weight 0
            problems += check("weight order", WEIGHT_ORDER, **_ordered_routers(con, run_id))
    if record_level == "probs":
        problems += check("probabilities of tokens", PROBS_OF_TOKENS)
        problems += check("probabilities", PROBS)
    return problems


def damaged_shards(con: duckdb.DuckDBPyConnection, store: Path, run_id: str) -> Iterator[Problem]:
    """Shards of a run that stays in them which are not what was written."""
    if not is_in_shards(con, run_id):
        return
    folder = run_folder(store, run_id).path
    shards = con.execute(
        "SELECT shard_id FROM ingested_shards WHERE run_id = ? ORDER BY shard_id", [run_id]
    ).fetchall()
    for (shard_id,) in shards:
        try:
            read_shard(folder, shard_id)
        except RecordingError as error:
            yield Problem(check="shards", sentence=str(error))


def weights_follow_rank(rule: Mapping[str, Any] | None) -> bool:
    """Whether a router of this rule gives a better rank at least the weight of a worse one.

    True for softmax over the scores that also select. A selection bias or a group fill chooses by
    other scores than it weighs by; of other rules, and of rules that were not verified, nothing is
    assumed.
    """
    if rule is None or rule.get("score") != "softmax" or not rule.get("verified", True):
        return False
    if rule.get("weights", "score") != "score" or rule.get("groups") or rule.get("from_table"):
        return False
    return not any(
        "bias" in key and value not in (None, False, "none") for key, value in rule.items()
    )


def _run_check(
    con: duckdb.DuckDBPyConnection,
    run_id: str,
    per_check: int | None,
    check: str,
    sql: str,
    **params: Any,
) -> Iterator[Problem]:
    """The problems a query finds; its columns are prompt id, layer and sentence."""
    limit = "" if per_check is None else f"LIMIT {per_check}"
    rows = con.execute(
        f"SELECT * FROM ({sql}) ORDER BY ALL {limit}", {"run": run_id, **params}
    ).fetchall()
    for prompt_id, layer, sentence in rows:
        yield Problem(check=check, sentence=sentence, prompt_id=prompt_id, layer=layer)


def _missing_prompts(
    con: duckdb.DuckDBPyConnection,
    run_id: str,
    num_prompts: int | None,
    manifest: Mapping[str, Any],
) -> Iterator[Problem]:
    """Planned prompts that are not there, and others that are.

    Imported runs know no plan; of them only the number of prompts is compared.
    """
    stored = {
        row[0]
        for row in con.execute(
            "SELECT prompt_id FROM prompts WHERE run_id = ?", [run_id]
        ).fetchall()
    }
    if num_prompts is not None and len(stored) != num_prompts:
        yield Problem(
            check="planned prompts",
            sentence=f"{num_prompts} prompts are planned, {len(stored)} are stored",
        )
    plan = manifest.get("batch_plan")
    if plan is None:
        return
    planned = {n for first, last in plan["prompt_ranges"] for n in range(first, last + 1)}
    for repair in manifest.get("repairs", []):
        planned -= set(repair["removed_prompts"])
    for prompt_id in sorted(planned ^ stored)[:PROBLEMS_PER_CHECK]:
        fault = "planned but not stored" if prompt_id in planned else "stored but not planned"
        yield Problem(
            check="planned prompts",
            sentence=f"prompt {prompt_id} is {fault}",
            prompt_id=prompt_id,
        )


def _ordered_routers(con: duckdb.DuckDBPyConnection, run_id: str) -> dict[str, list[Any]]:
    """Layers and kinds of the routers whose weights follow the rank."""
    routers = con.execute(
        "SELECT layer, kind, rule FROM layers WHERE run_id = ?", [run_id]
    ).fetchall()
    ordered = [
        (layer, kind)
        for layer, kind, rule in routers
        if weights_follow_rank(json.loads(rule) if rule else None)
    ]
    return {"layers": [layer for layer, _ in ordered], "kinds": [kind for _, kind in ordered]}
