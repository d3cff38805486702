"""Does a recorded run contradict itself?

The same routing is stored twice, as slots (`routing`) and as counts (`usage`), beside the tokens
and the plan. Whatever lost, doubled or misplaced a row makes two of them disagree. All checks are
SQL over the whole run; 7.7 million slots take a few seconds on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import duckdb

from moescope.probe.errors import RunError

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
        return find_problems(con, run_id)


def find_problems(con: duckdb.DuckDBPyConnection, run_id: str) -> list[Problem]:
    """As `verify_run`, on a connection that is open already."""
    row = con.execute(
        "SELECT record_level, plan_id, num_prompts, manifest FROM runs WHERE run_id = ?", [run_id]
    ).fetchone()
    if row is None:
        raise RunError(f"there is no run {run_id!r} to verify")
    record_level, plan_id, num_prompts, manifest = row
    problems = [
        *_missing_prompts(con, run_id, num_prompts, json.loads(manifest)),
        *_run_check(con, run_id, "prompts once", _PROMPTS_ONCE),
        *_run_check(con, run_id, "positions", _POSITIONS),
        *_run_check(con, run_id, "routed tokens", _UNROUTED),
        *_run_check(con, run_id, "usage", _USAGE),
    ]
    if record_level != "usage":
        problems += _run_check(con, run_id, "slots of tokens", _SLOTS_OF_TOKENS)
        problems += _run_check(con, run_id, "slots", _SLOTS)
        problems += _run_check(con, run_id, "usage by expert", _USAGE_BY_EXPERT)
        if plan_id is None:  # steering may drop a slot and leave it with weight 0
            problems += _weight_order(con, run_id)
    return problems


def weights_follow_rank(rule: Mapping[str, Any] | None) -> bool:
    """Whether a router of this rule gives a better rank at least the weight of a worse one.

    True for softmax over the scores that also select. A selection bias chooses by other scores
    than it weighs by; of other rules, and of rules that were not verified, nothing is assumed.
    """
    if rule is None or rule.get("score") != "softmax" or not rule.get("verified", True):
        return False
    return not any("bias" in key and value for key, value in rule.items())


_PROMPTS_ONCE: Final = """
    SELECT prompt_id, NULL, format('prompt {} is stored {} times', prompt_id, count(*))
    FROM prompts WHERE run_id = $run GROUP BY prompt_id HAVING count(*) > 1
"""

_POSITIONS: Final = """
    WITH counted AS (
        SELECT prompt_id, count(*) AS rows, count(DISTINCT position) AS places,
               min(position) AS first, max(position) AS last,
               count(*) FILTER (phase = 'generated') AS generated
        FROM tokens WHERE run_id = $run GROUP BY prompt_id
    ), stated AS (
        SELECT prompt_id, num_tokens, num_generated FROM prompts WHERE run_id = $run
    )
    SELECT coalesce(s.prompt_id, c.prompt_id), NULL,
           CASE WHEN s.prompt_id IS NULL THEN
               format('prompt {} has {} tokens but no row in prompts', c.prompt_id, c.rows)
           WHEN coalesce(c.rows, 0) <> s.num_tokens + s.num_generated
                OR coalesce(c.generated, 0) <> s.num_generated THEN
               format('prompt {} has {} tokens, {} of them generated; '
                      || 'prompts says {} + {} generated',
                      s.prompt_id, coalesce(c.rows, 0), coalesce(c.generated, 0),
                      s.num_tokens, s.num_generated)
           ELSE format('the positions of prompt {} are not 0 to {} once each: '
                       || '{} rows, {} to {}, {} different',
                       c.prompt_id, c.rows - 1, c.rows, c.first, c.last, c.places)
           END
    FROM stated s FULL JOIN counted c ON s.prompt_id = c.prompt_id
    WHERE s.prompt_id IS NULL OR coalesce(c.rows, 0) <> s.num_tokens + s.num_generated
       OR coalesce(c.generated, 0) <> s.num_generated
       OR c.first <> 0 OR c.last <> c.rows - 1 OR c.places <> c.rows
"""

_UNROUTED: Final = """
    SELECT t.prompt_id, NULL,
           format('token {} of prompt {} is marked as not routed, '
                  || 'only the last generated one can be',
                  t.position, t.prompt_id)
    FROM tokens t JOIN prompts p ON p.run_id = t.run_id AND p.prompt_id = t.prompt_id
    WHERE t.run_id = $run AND NOT t.is_routed
      AND (p.num_generated = 0 OR t.position <> p.num_tokens + p.num_generated - 1)
"""

_USAGE: Final = """
    WITH routed AS (
        SELECT prompt_id, count(*) FILTER (is_routed) AS tokens
        FROM tokens WHERE run_id = $run GROUP BY prompt_id
    ), expected AS (
        SELECT r.prompt_id, l.layer, l.kind, r.tokens, l.top_k, l.num_experts
        FROM routed r CROSS JOIN layers l WHERE l.run_id = $run
    ), used AS (
        SELECT prompt_id, layer, kind, sum(list_sum(num_tokens)) AS slots,
               sum(routed_tokens) AS tokens,
               min(least(len(num_tokens), len(weight_sum), len(prob_sum))) AS shortest,
               max(greatest(len(num_tokens), len(weight_sum), len(prob_sum))) AS longest
        FROM usage_arrays WHERE run_id = $run GROUP BY prompt_id, layer, kind
    )
    SELECT coalesce(e.prompt_id, u.prompt_id), coalesce(e.layer, u.layer),
           CASE WHEN e.prompt_id IS NULL THEN
               format('usage has prompt {} in layer {} ({}), tokens or layers have not',
                      u.prompt_id, u.layer, u.kind)
           WHEN u.longest > e.num_experts OR u.shortest < e.num_experts THEN
               format('prompt {}, layer {} ({}): usage counts {} experts, the layer has {}',
                      e.prompt_id, e.layer, e.kind,
                      if(u.longest > e.num_experts, u.longest, u.shortest), e.num_experts)
           WHEN coalesce(u.tokens, 0) <> e.tokens THEN
               format('prompt {}, layer {} ({}): usage counts {} routed tokens, tokens has {}',
                      e.prompt_id, e.layer, e.kind, coalesce(u.tokens, 0), e.tokens)
           ELSE format('prompt {}, layer {} ({}): usage sums to {}, '
                       || '{} routed tokens x top-{} is {}',
                       e.prompt_id, e.layer, e.kind, coalesce(u.slots, 0), e.tokens, e.top_k,
                       e.tokens * e.top_k)
           END
    FROM expected e FULL JOIN used u
      ON e.prompt_id = u.prompt_id AND e.layer = u.layer AND e.kind = u.kind
    WHERE e.prompt_id IS NULL OR coalesce(u.tokens, 0) <> e.tokens
       OR coalesce(u.slots, 0) <> e.tokens * e.top_k
       OR u.shortest < e.num_experts OR u.longest > e.num_experts
"""

_SLOTS: Final = """
    WITH slots AS (
        SELECT prompt_id, position, layer, kind, count(*) AS slots,
               list_unique(list(expert)) AS experts, max(expert) AS highest,
               count(rank) AS ranked, max(rank) AS worst,
               bit_count(bit_or(1::UBIGINT << least(rank, 63)::UBIGINT)) AS ranks
        FROM routing WHERE run_id = $run GROUP BY prompt_id, position, layer, kind
    )
    SELECT prompt_id, layer,
           CASE WHEN experts <> slots THEN
               format('prompt {}, token {}, layer {} ({}): an expert is repeated, '
                      || '{} slots have {} different experts',
                      prompt_id, position, layer, kind, slots, experts)
           WHEN highest >= num_experts THEN
               format('prompt {}, token {}, layer {} ({}): expert {} is recorded, the layer has {}',
                      prompt_id, position, layer, kind, highest, num_experts)
           ELSE format('prompt {}, token {}, layer {} ({}): the ranks are not 0 to {} once each, '
                       || '{} slots have {} different ranks up to {}',
                       prompt_id, position, layer, kind, slots - 1, slots, ranks, worst)
           END
    FROM slots JOIN layers USING (layer, kind)
    WHERE run_id = $run AND (experts <> slots OR highest >= num_experts
       OR (ranked > 0 AND (ranked <> slots OR worst <> slots - 1 OR ranks <> slots)))
"""

_SLOTS_OF_TOKENS: Final = """
    WITH found AS (
        SELECT prompt_id, position, layer, kind, count(*) AS slots
        FROM routing WHERE run_id = $run GROUP BY prompt_id, position, layer, kind
    ), expected AS (
        SELECT t.prompt_id, t.position, l.layer, l.kind, l.top_k
        FROM tokens t CROSS JOIN layers l
        WHERE t.run_id = $run AND l.run_id = $run AND t.is_routed
    )
    SELECT coalesce(e.prompt_id, f.prompt_id), coalesce(e.layer, f.layer),
           CASE WHEN e.prompt_id IS NULL THEN
               format('routing has {} slots for prompt {}, token {}, layer {} ({}), '
                      || 'which is no routed token in a layer of this run',
                      f.slots, f.prompt_id, f.position, f.layer, f.kind)
           ELSE format('prompt {}, token {}, layer {} ({}): {} slots are recorded, top-k is {}',
                       e.prompt_id, e.position, e.layer, e.kind, coalesce(f.slots, 0), e.top_k)
           END
    FROM expected e FULL JOIN found f
      ON e.prompt_id = f.prompt_id AND e.position = f.position
     AND e.layer = f.layer AND e.kind = f.kind
    WHERE e.prompt_id IS NULL OR coalesce(f.slots, 0) <> e.top_k
"""

_USAGE_BY_EXPERT: Final = """
    WITH counted AS (
        SELECT prompt_id, layer, kind, expert, count(*) AS slots
        FROM routing WHERE run_id = $run GROUP BY prompt_id, layer, kind, expert
    ), used AS (
        SELECT prompt_id, layer, kind, expert, sum(num_tokens) AS slots
        FROM usage WHERE run_id = $run
        GROUP BY prompt_id, layer, kind, expert HAVING sum(num_tokens) > 0
    )
    SELECT coalesce(c.prompt_id, u.prompt_id), coalesce(c.layer, u.layer),
           format('prompt {}, layer {} ({}): expert {} is in {} rows of routing, usage counts {}',
                  coalesce(c.prompt_id, u.prompt_id), coalesce(c.layer, u.layer),
                  coalesce(c.kind, u.kind), coalesce(c.expert, u.expert),
                  coalesce(c.slots, 0), coalesce(u.slots, 0))
    FROM counted c FULL JOIN used u
      ON c.prompt_id = u.prompt_id AND c.layer = u.layer AND c.kind = u.kind
     AND c.expert = u.expert
    WHERE coalesce(c.slots, 0) <> coalesce(u.slots, 0)
"""

_WEIGHT_ORDER: Final = """
    WITH ordered AS (
        SELECT unnest($layers) AS layer, unnest($kinds) AS kind
    ), pairs AS (
        SELECT prompt_id, position, layer, kind, rank, weight,
               lag(weight) OVER (PARTITION BY prompt_id, position, layer, kind ORDER BY rank)
                   AS better
        FROM routing JOIN ordered USING (layer, kind) WHERE run_id = $run AND rank IS NOT NULL
    )
    SELECT prompt_id, layer,
           format('prompt {}, token {}, layer {} ({}): rank {} has weight {:.6g}, '
                  || 'the rank before it {:.6g}',
                  prompt_id, position, layer, kind, rank, weight, better)
    FROM pairs WHERE weight > better
"""


def _run_check(
    con: duckdb.DuckDBPyConnection, run_id: str, check: str, sql: str, **params: Any
) -> Iterator[Problem]:
    """The problems a query finds; its columns are prompt id, layer and sentence."""
    rows = con.execute(
        f"SELECT * FROM ({sql}) ORDER BY ALL LIMIT {PROBLEMS_PER_CHECK}", {"run": run_id, **params}
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
    for prompt_id in sorted(planned ^ stored)[:PROBLEMS_PER_CHECK]:
        fault = "planned but not stored" if prompt_id in planned else "stored but not planned"
        yield Problem(
            check="planned prompts",
            sentence=f"prompt {prompt_id} is {fault}",
            prompt_id=prompt_id,
        )


def _weight_order(con: duckdb.DuckDBPyConnection, run_id: str) -> Iterator[Problem]:
    routers = con.execute(
        "SELECT layer, kind, rule FROM layers WHERE run_id = ?", [run_id]
    ).fetchall()
    ordered = [
        (layer, kind)
        for layer, kind, rule in routers
        if weights_follow_rank(json.loads(rule) if rule else None)
    ]
    return _run_check(
        con,
        run_id,
        "weight order",
        _WEIGHT_ORDER,
        layers=[layer for layer, _ in ordered],
        kinds=[kind for _, kind in ordered],
    )
