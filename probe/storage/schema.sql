-- The store, version 3. Names and columns are a contract with users and other programs.
-- Statements are separated by semicolons at the end of a line.

CREATE TABLE moescope_schema (version INTEGER NOT NULL);

CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,          -- the name the user gave
    model TEXT NOT NULL,
    revision TEXT,
    family TEXT,                      -- transformers' model_type
    created_at TIMESTAMPTZ NOT NULL,
    finished_at TIMESTAMPTZ,
    status TEXT NOT NULL,             -- running, complete, failed
    source TEXT NOT NULL,             -- recorded, import:FORMAT
    record_level TEXT NOT NULL,       -- usage, topk, probs
    plan_id TEXT,
    num_prompts INTEGER,              -- planned
    num_tokens BIGINT,                -- rows of tokens, once complete
    manifest JSON NOT NULL            -- versions, dtype, device, threads, arguments, hashes, seed, template
);

CREATE TABLE layers (
    run_id TEXT NOT NULL,
    layer SMALLINT NOT NULL,          -- decoder layer index
    kind TEXT NOT NULL,               -- mlp, attention, encoder, mtp
    moe_layer SMALLINT NOT NULL,      -- ordinal from 0 among routed layers of that kind
    module TEXT NOT NULL,             -- the router's name in the model
    num_experts SMALLINT NOT NULL,
    top_k SMALLINT NOT NULL,
    num_shared_experts SMALLINT NOT NULL,
    rule JSON,                        -- how this router selects
    PRIMARY KEY (run_id, layer, kind)
);

CREATE TABLE prompts (
    run_id TEXT NOT NULL,
    prompt_id INTEGER NOT NULL,       -- order in the prompt files, from 0
    key TEXT,                         -- the file's id
    text TEXT NOT NULL,               -- the user's text
    rendered_text TEXT NOT NULL,      -- what was tokenized
    set_name TEXT NOT NULL,
    label TEXT,
    lang TEXT,
    domain TEXT,
    pair_id TEXT,
    target TEXT,
    span TEXT,
    expected TEXT,                    -- the file's answer
    num_tokens INTEGER NOT NULL,      -- of the prompt
    num_generated INTEGER NOT NULL,
    response TEXT,                    -- what the model wrote, null when nothing was generated
    outcome TEXT,                     -- correct, other, partial, refused, broken; null without a response
    detector TEXT,                    -- what decided the outcome
    meta JSON
);

CREATE TABLE tokens (
    run_id TEXT NOT NULL,
    prompt_id INTEGER NOT NULL,
    position INTEGER NOT NULL,        -- from 0 within the unpadded sequence, prompt and answer together
    token_id INTEGER NOT NULL,
    token TEXT NOT NULL,
    phase TEXT NOT NULL,              -- prompt, generated: of the input token
    segment TEXT NOT NULL,            -- system, user, template, thinking, answer
    is_special BOOLEAN NOT NULL,
    in_span BOOLEAN NOT NULL,
    is_routed BOOLEAN NOT NULL        -- the last generated token never passes the model
);

-- One row per routed token and router, experts and weights in order of rank.
CREATE TABLE routing_arrays (
    run_id TEXT NOT NULL,
    prompt_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    layer SMALLINT NOT NULL,
    kind TEXT NOT NULL,
    is_ranked BOOLEAN NOT NULL,       -- whether the order is that of rank
    experts USMALLINT[] NOT NULL,
    weights FLOAT[],                  -- what multiplied the experts' outputs; null where unknown
    bf16_weights USMALLINT[]          -- instead of them where all are exact in bfloat16: its bits
);

CREATE VIEW routing AS
SELECT run_id, prompt_id, position, layer, kind,
       CASE WHEN is_ranked THEN place END::UTINYINT AS rank,  -- 0 = highest selection score
       expert,
       CASE WHEN bits IS NULL THEN weight
            ELSE CASE WHEN bits >= 32768 THEN -1 ELSE 1 END
                 * CASE WHEN (bits >> 7) & 255 = 0 THEN (bits & 127) * pow(2.0, -133)
                        ELSE (128 + (bits & 127)) * pow(2.0, ((bits >> 7) & 255)::INTEGER - 134)
                   END
       END::FLOAT AS weight
FROM (
    SELECT run_id, prompt_id, position, layer, kind, is_ranked,
           unnest(range(len(experts))) AS place, unnest(experts) AS expert,
           unnest(weights) AS weight, unnest(bf16_weights) AS bits
    FROM routing_arrays
);

-- Runs whose routing (and router_probs) stays in the Parquet shards beside the store.
CREATE TABLE runs_in_shards (run_id TEXT PRIMARY KEY);

-- One row per prompt, token group and layer; the arrays are indexed by expert.
CREATE TABLE usage_arrays (
    run_id TEXT NOT NULL,
    prompt_id INTEGER NOT NULL,
    phase TEXT NOT NULL,
    segment TEXT NOT NULL,
    is_special BOOLEAN NOT NULL,
    layer SMALLINT NOT NULL,
    kind TEXT NOT NULL,
    routed_tokens INTEGER NOT NULL,   -- tokens of this group that passed the router
    num_tokens INTEGER[] NOT NULL,    -- tokens that selected each expert
    -- Null in imported runs whose source did not say:
    weight_sum FLOAT[],               -- sum of routing weights over those tokens
    prob_sum FLOAT[],                 -- sum of router scores (after softmax or sigmoid) over all tokens
    -- With norms, over the tokens that selected each expert; E is its output before its weight:
    norm_sum FLOAT[],                 -- sum of |E|
    weighted_norm_sum FLOAT[],        -- sum of w |E|
    easyep_sum FLOAT[],               -- sum of w max(1 - cos(x, x + r), 0) |E|; null where it has none
    max_abs FLOAT[]                   -- largest absolute value that left its down_proj
);

CREATE VIEW usage AS
SELECT run_id, prompt_id, phase, segment, is_special, layer, kind,
       unnest(range(len(num_tokens)))::USMALLINT AS expert,
       unnest(num_tokens) AS num_tokens,
       unnest(weight_sum) AS weight_sum,
       unnest(prob_sum) AS prob_sum,
       unnest(norm_sum) AS norm_sum,
       unnest(weighted_norm_sum) AS weighted_norm_sum,
       unnest(easyep_sum) AS easyep_sum,
       unnest(max_abs) AS max_abs
FROM usage_arrays;

-- At level probs: what the router gave each expert, in the order of their ids.
CREATE TABLE router_probs (
    run_id TEXT NOT NULL,
    prompt_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    layer SMALLINT NOT NULL,
    kind TEXT NOT NULL,
    probs FLOAT[] NOT NULL
);

CREATE TABLE plans (
    plan_id TEXT PRIMARY KEY,         -- hash of the plan's content
    name TEXT,
    created_at TIMESTAMPTZ NOT NULL,
    plan JSON NOT NULL
);

CREATE TABLE evaluations (
    evaluation_id TEXT NOT NULL,
    plan_id TEXT,
    created_at TIMESTAMPTZ NOT NULL,
    condition TEXT NOT NULL,          -- unsteered, steered, control:NAME:SEED
    set_name TEXT NOT NULL,
    metric TEXT NOT NULL,
    value DOUBLE,
    low DOUBLE,
    high DOUBLE,
    n INTEGER,
    details JSON
);

CREATE TABLE measurements (
    measurement_id TEXT NOT NULL,
    what TEXT NOT NULL,
    model TEXT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL,
    layer SMALLINT,
    kind TEXT,
    expert USMALLINT,
    metric TEXT NOT NULL,
    value DOUBLE,
    n INTEGER,
    details JSON
);

-- Which shards are in: what makes every shard count exactly once.
CREATE TABLE ingested_shards (
    run_id TEXT NOT NULL,
    shard_id TEXT NOT NULL,
    checksum TEXT NOT NULL,
    PRIMARY KEY (run_id, shard_id)
);

INSERT INTO moescope_schema VALUES (3);
