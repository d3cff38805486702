"""A recorded run against an independent capture of what the experts modules were called with."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moescope.probe import Store, read_prompts, trace_prompts
from moescope.probe.errors import InputError, RunError
from moescope.probe.storage.verify import verify_run
from moescope.probe.trace import TraceOptions

TEXTS = [
    "What?",
    "What happened in 1911 in Aldora?",
    "¿Qué?",
    "A much longer question, is it?",
    "x",
]


def prompt_file(folder: Path) -> Path:
    path = folder / "questions.jsonl"
    rows = [
        {"id": f"q{index}", "prompt": text, "label": "odd" if index % 2 else "even", "lang": "en",
         "span": text[:1], "answer": "never", "split": "a"}
        for index, text in enumerate(TEXTS)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@contextmanager
def captured(model: Any) -> Iterator[dict[int, list[tuple[Any, Any]]]]:
    """Every call of every experts module, written without moescope's own hooks."""
    calls: dict[int, list[tuple[Any, Any]]] = defaultdict(list)
    handles = [
        layer.mlp.experts.register_forward_pre_hook(
            lambda _m, args, index=index: calls[index].append(
                (args[1].numpy().copy(), args[2].numpy().copy())
            )
        )
        for index, layer in enumerate(model.model.layers)
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def recorded(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with generation in two padded batches, and the capture."""
    folder = tmp_path_factory.mktemp("trace")
    prompts = read_prompts([prompt_file(folder)])
    with captured(tiny_bundle.model) as calls:
        summary = trace_prompts(
            tiny_bundle, prompts, folder / "store.duckdb", "base",
            TraceOptions(max_new_tokens=6, tokens_per_batch=130),
        )  # fmt: skip
    return Store(folder / "store.duckdb"), summary, calls, prompts


def test_the_run_adds_up(recorded: Any) -> None:
    store, summary, _calls, prompts = recorded
    assert verify_run(store, "base") == []
    info = store.run("base")
    assert (info.status, info.num_prompts, info.num_tokens) == (
        "complete", len(prompts), summary.tokens,
    )  # fmt: skip
    per_layer = store.query(
        "SELECT u.prompt_id, u.layer, u.used, r.slots, t.routed FROM "
        "(SELECT prompt_id, layer, sum(num_tokens) AS used FROM usage GROUP BY ALL) u JOIN "
        "(SELECT prompt_id, layer, count(*) AS slots FROM routing GROUP BY ALL) r "
        "USING (prompt_id, layer) JOIN "
        "(SELECT prompt_id, count(*) FILTER (is_routed) AS routed FROM tokens GROUP BY ALL) t "
        "USING (prompt_id)"
    )
    assert len(per_layer) == len(prompts) * 3
    assert (per_layer["used"] == per_layer["slots"]).all()
    assert (per_layer["slots"] == per_layer["routed"] * 2).all()


def test_every_routed_token_equals_the_capture(recorded: Any, tiny_bundle: Any) -> None:
    """Rebuild which captured row is which token from the model's own inputs, then compare sets."""
    store, _summary, calls, _prompts = recorded
    tokens = store.query("SELECT * FROM tokens ORDER BY prompt_id, position")
    routing = store.query("SELECT * FROM routing ORDER BY prompt_id, position, layer, rank")
    lengths = tokens.groupby("prompt_id")["phase"].apply(lambda p: int((p == "prompt").sum()))
    batches = batches_of(store)
    found = {
        key: list(zip(rows["expert"], rows["weight"], strict=True))
        for key, rows in routing.groupby(["prompt_id", "position", "layer"])
    }
    compared = 0
    for layer, layer_calls in calls.items():
        index = 0
        # The first calls are those of the attach-time proof, made with one prompt at a time.
        layer_calls = layer_calls[len(layer_calls) - sum(steps for _, steps in batches) :]
        for members, steps in batches:
            width = max(lengths[prompt] for prompt in members)
            for step in range(steps):
                ids, weights = layer_calls[index]
                index += 1
                for row, prompt in enumerate(members):
                    for column in range(width if step == 0 else 1):
                        at = row * width + column if step == 0 else row
                        position = (
                            column - (width - lengths[prompt])
                            if step == 0
                            else lengths[prompt] + step - 1
                        )
                        slots = found.get((prompt, position, layer))
                        if slots is None:
                            continue
                        expected = set(zip(ids[at].tolist(), weights[at].tolist(), strict=True))
                        assert {(int(e), float(np.float32(w))) for e, w in slots} == expected
                        assert [w for _, w in slots] == sorted((w for _, w in slots), reverse=True)
                        compared += 1
        assert index == len(layer_calls)
    assert compared == len(found) == int(tokens["is_routed"].sum()) * 3


def batches_of(store: Store) -> list[tuple[list[int], int]]:
    """Planned members of each batch, and the forwards each took, from the tokens alone."""
    from moescope.probe.batching import plan_batches

    sizes = store.query("SELECT prompt_id, num_tokens, num_generated FROM prompts ORDER BY 1")
    plan = plan_batches(sizes["num_tokens"].tolist(), tokens_per_batch=130, extra_tokens=6)
    assert len(plan) > 1 and max(len(batch.members) for batch in plan) > 2
    return [
        (list(batch.members), int(sizes["num_generated"].iloc[list(batch.members)].max()))
        for batch in plan
    ]


def test_prompts_and_tokens_carry_what_was_given(recorded: Any, tiny_bundle: Any) -> None:
    store, _summary, _calls, prompts = recorded
    rows = store.query("SELECT * FROM prompts ORDER BY prompt_id")
    assert rows["text"].tolist() == TEXTS and rows["key"].tolist() == [p.key for p in prompts]
    assert rows["label"].tolist() == ["even", "odd", "even", "odd", "even"]
    assert [json.loads(meta) for meta in rows["meta"]] == [{"split": "a"}] * 5
    assert rows["outcome"].notna().all() and rows["detector"].notna().all()
    tokens = store.query("SELECT * FROM tokens ORDER BY prompt_id, position")
    for prompt, group in tokens.groupby("prompt_id"):
        assert group["position"].tolist() == list(range(len(group)))
        user = group[group["segment"] == "user"]["token_id"].tolist()
        assert tiny_bundle.tokenizer.decode(user) == TEXTS[prompt]
        assert group[group["in_span"]]["token"].str.len().sum() >= 1
        answer = group[group["phase"] == "generated"]
        assert answer["is_routed"].tolist() == [True] * (len(answer) - 1) + [False]
        assert (
            rows["response"].iloc[prompt]
            == tiny_bundle.tokenizer.decode(
                answer["token_id"].tolist(), skip_special_tokens=True
            ).strip()
        )


def test_answers_equal_those_of_plain_generate(recorded: Any, tiny_bundle: Any) -> None:
    store, _summary, _calls, _prompts = recorded
    rows = store.query("SELECT prompt_id, rendered_text, num_generated FROM prompts")
    for prompt, text, count in rows.itertuples(index=False):
        ids = tiny_bundle.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            out = tiny_bundle.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
        written = store.query(
            "SELECT token_id FROM tokens WHERE prompt_id = ? AND phase = 'generated' "
            "ORDER BY position",
            [int(prompt)],
        )["token_id"].tolist()
        assert written == out[0, ids.shape[1] :].tolist()[:count]


def test_level_usage_keeps_counts_and_no_rows(tiny_bundle: Any, tmp_path: Path) -> None:
    prompts = read_prompts([prompt_file(tmp_path)])
    options = TraceOptions(level="usage", layers=(1,))
    trace_prompts(tiny_bundle, prompts, tmp_path / "s.duckdb", "counts", options)
    store = Store(tmp_path / "s.duckdb")
    assert store.query("SELECT count(*) AS n FROM routing")["n"].item() == 0
    used = store.query("SELECT layer, sum(num_tokens) AS n FROM usage GROUP BY layer")
    routed = store.query("SELECT count(*) AS n FROM tokens WHERE is_routed")["n"].item()
    assert used.to_dict("list") == {"layer": [1], "n": [routed * 2]}
    assert verify_run(store, "counts") == []


def test_prompt_only_routing_equals_the_prefill_of_a_generating_run(
    recorded: Any, tiny_bundle: Any, tmp_path: Path
) -> None:
    store, _summary, _calls, prompts = recorded
    options = TraceOptions(tokens_per_batch=1)
    trace_prompts(tiny_bundle, prompts, tmp_path / "s.duckdb", "alone", options)
    query = (
        "SELECT r.prompt_id, r.position, layer, rank, expert, weight FROM routing r "
        "JOIN tokens t ON (r.run_id, r.prompt_id, r.position) = (t.run_id, t.prompt_id, t.position)"
        " WHERE phase = 'prompt' ORDER BY ALL"
    )
    batched, alone = store.query(query), Store(tmp_path / "s.duckdb").query(query)
    assert len(batched) == len(alone) > 0
    assert (batched["expert"] == alone["expert"]).mean() > 0.999
    np.testing.assert_allclose(batched["weight"], alone["weight"], atol=1e-5)


def test_a_layer_without_a_router_and_a_second_start_are_refused(
    recorded: Any, tiny_bundle: Any
) -> None:
    store, _summary, _calls, prompts = recorded
    with pytest.raises(InputError, match=r"layers \[9\] have no router"):
        trace_prompts(tiny_bundle, prompts, store.path, "new", TraceOptions(layers=(9,)))
    with pytest.raises(RunError, match="complete already"):
        trace_prompts(
            tiny_bundle, prompts, store.path, "base",
            TraceOptions(max_new_tokens=6, tokens_per_batch=130),
        )  # fmt: skip
    with pytest.raises(RunError, match="max_new_tokens"):
        trace_prompts(tiny_bundle, prompts, store.path, "base", TraceOptions(max_new_tokens=7))
