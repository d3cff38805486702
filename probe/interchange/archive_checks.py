"""What a run from an archive must fulfil beyond the columns of the store.

`find_problems` finds where rows contradict each other. It was written for runs that this program
recorded itself, so what it takes for granted is checked here first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import duckdb

from moescope.probe.errors import ImportFileError
from moescope.probe.storage.shards import check_shard_id
from moescope.probe.storage.verify import find_problems

_LEVELS: Final = ("usage", "topk", "probs")

_IMPOSSIBLE: Final = {
    "a layer has impossible numbers of experts or a negative index": (
        "SELECT 1 FROM layers WHERE num_experts < 1 OR top_k < 1 OR top_k > num_experts "
        "OR num_shared_experts < 0 OR layer < 0 OR moe_layer < 0"
    ),
    "a prompt has a negative number or length": (
        "SELECT 1 FROM prompts WHERE prompt_id < 0 OR num_tokens < 0 OR num_generated < 0"
    ),
    "a token is neither of a prompt nor generated": (
        "SELECT 1 FROM tokens WHERE phase NOT IN ('prompt', 'generated')"
    ),
    "usage has a phase that is neither prompt nor generated, or a negative count": (
        "SELECT 1 FROM usage_arrays WHERE phase NOT IN ('prompt', 'generated') "
        "OR routed_tokens < 0 OR list_min(num_tokens) < 0"
    ),
    "usage has a prompt that is not there": (
        "SELECT 1 FROM usage_arrays ANTI JOIN prompts USING (run_id, prompt_id)"
    ),
}


def find_impossible(con: duckdb.DuckDBPyConnection, run_id: str) -> Iterator[str]:
    """Every contradiction in the only run of a store, as sentences.

    Raises:
        ImportFileError: the run's manifest is not what a run's manifest is.
    """
    level, text, prompts = con.execute(
        "SELECT record_level, manifest, (SELECT count(*) FROM prompts) FROM runs WHERE run_id = ?",
        [run_id],
    ).fetchall()[0]
    if level not in _LEVELS:
        raise ImportFileError(f"the run has record level {level!r}, known are {', '.join(_LEVELS)}")
    manifest = json.loads(text)
    _check_manifest(manifest, prompts)
    _check_rules(con)
    _check_tables(con, level, only_counts="positions" in manifest.get("lacks", []))
    sound = True
    for sentence, query in _IMPOSSIBLE.items():
        if con.execute(f"{query} LIMIT 1").fetchall():
            sound = False
            yield sentence
    if sound:  # else what follows may stumble over it
        yield from map(str, find_problems(con, run_id))


def _check_manifest(manifest: dict[str, Any], num_prompts: int) -> None:
    """Refuse parts that are of another form than `find_problems` reads, or would never end."""
    lacks = manifest.get("lacks", [])
    if not isinstance(lacks, list) or not all(isinstance(word, str) for word in lacks):
        raise ImportFileError("the run's manifest has no list of words under 'lacks'")
    if not isinstance(manifest.get("arguments", {}), dict):
        raise ImportFileError("the run's manifest has no arguments by name")
    try:
        repairs = manifest.get("repairs", [])
        removed = [prompt for repair in repairs for prompt in repair["removed_prompts"]]
        plan = manifest.get("batch_plan")
        ranges = [] if plan is None else [(first, last) for first, last in plan["prompt_ranges"]]
        planned = sum(last + 1 - first for first, last in ranges)
        numbers = [*removed, *(end for ends in ranges for end in ends)]
        sound = all(type(number) is int for number in numbers)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ImportFileError("the run's manifest has no sound plan of batches") from error
    if not sound or planned > num_prompts + len(removed):
        raise ImportFileError("the run's manifest plans other prompts than there are")


def _check_rules(con: duckdb.DuckDBPyConnection) -> None:
    for (text,) in con.execute("SELECT rule FROM layers WHERE rule IS NOT NULL").fetchall():
        if not isinstance(json.loads(text), dict | None):
            raise ImportFileError("the rule of a layer is no JSON object")


def _check_tables(con: duckdb.DuckDBPyConnection, level: str, *, only_counts: bool) -> None:
    """Refuse rows that no check would look at at this record level."""
    unexpected = []
    if only_counts and level != "usage":
        raise ImportFileError(f"the run has no positions and yet record level {level!r}")
    if only_counts:
        unexpected.append("tokens")
    if level == "usage":
        unexpected.append("routing_arrays")
    if level != "probs":
        unexpected.append("router_probs")
    for table in unexpected:
        if con.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchall():
            raise ImportFileError(f"a run of this record level has no rows in {table}")
    if not con.execute("SELECT 1 FROM layers LIMIT 1").fetchall():
        raise ImportFileError("the run has no layers")
    for (shard_id,) in con.execute("SELECT shard_id FROM ingested_shards").fetchall():
        try:
            check_shard_id(shard_id)
        except ValueError as error:
            raise ImportFileError(str(error)) from error
