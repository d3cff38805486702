"""The queries by which `verify_run` finds contradictions: prompt id, layer and sentence each."""

from __future__ import annotations

from typing import Final

PROMPTS_ONCE: Final = """
    SELECT prompt_id, NULL, format('prompt {} is stored {} times', prompt_id, count(*))
    FROM prompts WHERE run_id = $run GROUP BY prompt_id HAVING count(*) > 1
"""

POSITIONS: Final = """
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

UNROUTED: Final = """
    SELECT t.prompt_id, NULL,
           format('token {} of prompt {} is marked as not routed, '
                  || 'only the last generated one can be',
                  t.position, t.prompt_id)
    FROM tokens t JOIN prompts p ON p.run_id = t.run_id AND p.prompt_id = t.prompt_id
    WHERE t.run_id = $run AND NOT t.is_routed
      AND (p.num_generated = 0 OR t.position <> p.num_tokens + p.num_generated - 1)
"""

USAGE: Final = """
    WITH routed AS (
        SELECT prompt_id, count(*) FILTER (is_routed) AS tokens
        FROM tokens WHERE run_id = $run GROUP BY prompt_id
    ), expected AS (
        SELECT r.prompt_id, l.layer, l.kind, r.tokens, l.top_k, l.num_experts
        FROM routed r CROSS JOIN layers l WHERE l.run_id = $run
    ), used AS (
        SELECT prompt_id, layer, kind, sum(list_sum(num_tokens)) AS slots,
               sum(routed_tokens) AS tokens,
               min(least(len(num_tokens), len(weight_sum), len(prob_sum), len(norm_sum),
                         len(weighted_norm_sum), len(easyep_sum), len(max_abs))) AS shortest,
               max(greatest(len(num_tokens), len(weight_sum), len(prob_sum), len(norm_sum),
                            len(weighted_norm_sum), len(easyep_sum), len(max_abs))) AS longest
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

USAGE_SHAPE: Final = """
    SELECT u.prompt_id, u.layer,
           format('prompt {}, layer {} ({}): usage counts {} experts, the layer has {}',
                  u.prompt_id, u.layer, u.kind, len(u.num_tokens), l.num_experts)
    FROM usage_arrays u LEFT JOIN layers l
      ON l.run_id = u.run_id AND l.layer = u.layer AND l.kind = u.kind
    WHERE u.run_id = $run AND len(u.num_tokens) IS DISTINCT FROM l.num_experts
"""

SLOTS: Final = """
    WITH slots AS (
        SELECT prompt_id, position, layer, kind, len(experts) AS slots,
               list_unique(experts) AS different, list_max(experts) AS highest,
               coalesce(len(weights), len(bf16_weights), len(experts)) AS weights
        FROM routing_arrays WHERE run_id = $run
    )
    SELECT prompt_id, layer,
           CASE WHEN different <> slots THEN
               format('prompt {}, token {}, layer {} ({}): an expert is repeated, '
                      || '{} slots have {} different experts',
                      prompt_id, position, layer, kind, slots, different)
           WHEN highest >= num_experts THEN
               format('prompt {}, token {}, layer {} ({}): expert {} is recorded, the layer has {}',
                      prompt_id, position, layer, kind, highest, num_experts)
           ELSE format('prompt {}, token {}, layer {} ({}): {} slots have {} weights',
                       prompt_id, position, layer, kind, slots, weights)
           END
    FROM slots JOIN layers USING (layer, kind)
    WHERE run_id = $run AND (different <> slots OR highest >= num_experts OR weights <> slots)
"""

# Token by token this takes long, so the prompts and layers to look at are found first: those whose
# number of rows, of slots or sum of hashed positions is another than the routed tokens tell.
SLOTS_OF_TOKENS: Final = """
    WITH tokens_of AS (
        SELECT prompt_id, count(*) AS rows, sum(hash(position)) AS places
        FROM tokens WHERE run_id = $run AND is_routed GROUP BY prompt_id
    ), rows_of AS (
        SELECT prompt_id, layer, kind, count(*) AS rows, sum(hash(position)) AS places,
               min(len(experts)) AS fewest, max(len(experts)) AS most
        FROM routing_arrays WHERE run_id = $run GROUP BY prompt_id, layer, kind
    ), expected_of AS (
        SELECT t.*, l.layer, l.kind, l.top_k
        FROM tokens_of t CROSS JOIN layers l WHERE l.run_id = $run
    ), suspects AS (
        SELECT coalesce(e.prompt_id, r.prompt_id) AS prompt_id, coalesce(e.layer, r.layer) AS layer,
               coalesce(e.kind, r.kind) AS kind
        FROM expected_of e FULL JOIN rows_of r
          ON e.prompt_id = r.prompt_id AND e.layer = r.layer AND e.kind = r.kind
        WHERE e.prompt_id IS NULL OR r.prompt_id IS NULL OR e.rows <> r.rows
           OR e.places <> r.places OR r.fewest <> e.top_k OR r.most <> e.top_k
    ), found AS (
        SELECT prompt_id, position, layer, kind, count(*) AS rows, sum(len(experts)) AS slots
        FROM routing_arrays SEMI JOIN suspects USING (prompt_id, layer, kind)
        WHERE run_id = $run GROUP BY prompt_id, position, layer, kind
    ), expected AS (
        SELECT t.prompt_id, t.position, l.layer, l.kind, l.top_k
        FROM tokens t JOIN suspects s ON t.prompt_id = s.prompt_id
        JOIN layers l ON l.layer = s.layer AND l.kind = s.kind
        WHERE t.run_id = $run AND l.run_id = $run AND t.is_routed
    )
    SELECT coalesce(e.prompt_id, f.prompt_id), coalesce(e.layer, f.layer),
           CASE WHEN e.prompt_id IS NULL THEN
               format('routing has {} slots for prompt {}, token {}, layer {} ({}), '
                      || 'which is no routed token in a layer of this run',
                      f.slots, f.prompt_id, f.position, f.layer, f.kind)
           WHEN f.rows > 1 THEN
               format('prompt {}, token {}, layer {} ({}): recorded {} times',
                      e.prompt_id, e.position, e.layer, e.kind, f.rows)
           ELSE format('prompt {}, token {}, layer {} ({}): {} slots are recorded, top-k is {}',
                       e.prompt_id, e.position, e.layer, e.kind, coalesce(f.slots, 0), e.top_k)
           END
    FROM expected e FULL JOIN found f
      ON e.prompt_id = f.prompt_id AND e.position = f.position
     AND e.layer = f.layer AND e.kind = f.kind
    WHERE e.prompt_id IS NULL OR f.rows > 1 OR coalesce(f.slots, 0) <> e.top_k
"""

USAGE_BY_EXPERT: Final = """
    WITH counted AS (
        SELECT prompt_id, layer, kind, expert, count(*) AS slots
        FROM (SELECT prompt_id, layer, kind, unnest(experts) AS expert
              FROM routing_arrays WHERE run_id = $run)
        GROUP BY prompt_id, layer, kind, expert
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

NORMS: Final = """
    WITH sums AS (
        SELECT prompt_id, layer, kind, expert, num_tokens, weight_sum, norm_sum,
               weighted_norm_sum, easyep_sum, max_abs
        FROM usage WHERE run_id = $run
          AND NOT (norm_sum IS NULL AND weighted_norm_sum IS NULL AND easyep_sum IS NULL
                   AND max_abs IS NULL)
    )
    SELECT prompt_id, layer,
           format('prompt {}, layer {} ({}), expert {}: norms do not fit together: {} tokens, '
                  || 'norm_sum {}, weighted_norm_sum {}, easyep_sum {}, max_abs {}',
                  prompt_id, layer, kind, expert, num_tokens,
                  coalesce(norm_sum::TEXT, 'missing'), coalesce(weighted_norm_sum::TEXT, 'missing'),
                  coalesce(easyep_sum::TEXT, 'missing'), coalesce(max_abs::TEXT, 'missing'))
    FROM sums
    WHERE norm_sum IS NULL OR weighted_norm_sum IS NULL OR max_abs IS NULL
       OR NOT (isfinite(norm_sum) AND isfinite(weighted_norm_sum) AND isfinite(max_abs)
               AND isfinite(coalesce(easyep_sum, 0)))
       OR norm_sum < 0 OR max_abs < 0
       -- a vector is at least as long as its largest value
       OR max_abs > norm_sum * 1.001 + 1e-6
       OR (num_tokens = 0 AND (norm_sum <> 0 OR weighted_norm_sum <> 0 OR max_abs <> 0
                               OR coalesce(easyep_sum, 0) <> 0))
       -- 1 - cos is at most 2
       OR (easyep_sum > 2.001 * weighted_norm_sum + 1e-6 AND weight_sum >= 0)
"""

NORMS_MISSING: Final = """
    SELECT prompt_id, layer,
           format('prompt {}, layer {} ({}): the run was recorded with norms, '
                  || 'here they are missing', prompt_id, layer, kind)
    FROM usage_arrays WHERE run_id = $run AND norm_sum IS NULL
"""

PROBS_OF_TOKENS: Final = """
    WITH found AS (
        SELECT prompt_id, position, layer, kind, count(*) AS rows, min(len(probs)) AS experts,
               bool_and(list_bool_and(list_transform(probs, lambda p: p IS NOT NULL
                                                     AND isfinite(p)))) AS finite
        FROM router_probs WHERE run_id = $run GROUP BY prompt_id, position, layer, kind
    ), expected AS (
        SELECT t.prompt_id, t.position, l.layer, l.kind, l.num_experts
        FROM tokens t CROSS JOIN layers l
        WHERE t.run_id = $run AND l.run_id = $run AND t.is_routed
    )
    SELECT coalesce(e.prompt_id, f.prompt_id), coalesce(e.layer, f.layer),
           CASE WHEN e.prompt_id IS NULL THEN
               format('router_probs has prompt {}, token {}, layer {} ({}), '
                      || 'which is no routed token in a layer of this run',
                      f.prompt_id, f.position, f.layer, f.kind)
           WHEN coalesce(f.rows, 0) <> 1 THEN
               format('prompt {}, token {}, layer {} ({}): router_probs has {} rows instead of one',
                      e.prompt_id, e.position, e.layer, e.kind, coalesce(f.rows, 0))
           WHEN f.experts <> e.num_experts THEN
               format('prompt {}, token {}, layer {} ({}): router_probs has {} experts, '
                      || 'the layer has {}',
                      e.prompt_id, e.position, e.layer, e.kind, f.experts, e.num_experts)
           ELSE format('prompt {}, token {}, layer {} ({}): router_probs holds what is no number',
                       e.prompt_id, e.position, e.layer, e.kind)
           END
    FROM expected e FULL JOIN found f
      ON e.prompt_id = f.prompt_id AND e.position = f.position
     AND e.layer = f.layer AND e.kind = f.kind
    WHERE e.prompt_id IS NULL OR coalesce(f.rows, 0) <> 1 OR f.experts <> e.num_experts
       OR NOT f.finite
"""

PROBS: Final = """
    WITH each AS (
        SELECT prompt_id, layer, kind, unnest(range(len(probs))) AS expert,
               unnest(probs)::DOUBLE AS prob
        FROM router_probs WHERE run_id = $run
    ), counted AS (
        SELECT prompt_id, layer, kind, expert, sum(prob) AS total, sum(abs(prob)) AS size
        FROM each GROUP BY prompt_id, layer, kind, expert
    ), used AS (
        SELECT prompt_id, layer, kind, expert, sum(prob_sum::DOUBLE) AS total
        FROM usage WHERE run_id = $run GROUP BY prompt_id, layer, kind, expert
    )
    SELECT c.prompt_id, c.layer,
           format('prompt {}, layer {} ({}): the probabilities of expert {} sum to {:.6g} in '
                  || 'router_probs, to {:.6g} in usage',
                  c.prompt_id, c.layer, c.kind, c.expert, c.total, u.total)
    FROM counted c JOIN used u
      ON c.prompt_id = u.prompt_id AND c.layer = u.layer AND c.kind = u.kind
     AND c.expert = u.expert
    WHERE NOT abs(c.total - u.total) <= 1e-4 * size + 1e-6
"""

WEIGHT_ORDER: Final = """
    WITH ordered AS (
        SELECT unnest($layers) AS layer, unnest($kinds) AS kind
    ), suspects AS (
        -- The bits of numbers that are not negative have the order of the numbers.
        SELECT DISTINCT prompt_id, position, layer, kind
        FROM routing_arrays JOIN ordered USING (layer, kind)
        WHERE run_id = $run AND is_ranked
          AND (list_reverse_sort(weights) <> weights
               OR list_reverse_sort(bf16_weights) <> bf16_weights)
    ), pairs AS (
        SELECT prompt_id, position, layer, kind, rank, weight,
               lag(weight) OVER (PARTITION BY prompt_id, position, layer, kind ORDER BY rank)
                   AS better
        FROM routing SEMI JOIN suspects USING (prompt_id, position, layer, kind)
        WHERE run_id = $run
    )
    SELECT prompt_id, layer,
           format('prompt {}, token {}, layer {} ({}): rank {} has weight {:.6g}, '
                  || 'the rank before it {:.6g}',
                  prompt_id, position, layer, kind, rank, weight, better)
    FROM pairs WHERE weight > better
"""
