"""Runs at level probs and with norms, from the model to the store and its checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moescope.probe import Store, read_prompts, record, trace_prompts
from moescope.probe.errors import ModelInputError
from moescope.probe.models import ModelBundle
from moescope.probe.storage.verify import verify_run
from moescope.probe.trace import TraceOptions
from moescope.probe.zoo import tiny_model as zoo_model

TEXTS = ["What?", "What happened in 1911 in Aldora?", "x"]
SUMS = ("norm_sum", "weighted_norm_sum", "easyep_sum", "max_abs")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS))
    return read_prompts([path])


@pytest.fixture(scope="module")
def recorded(tiny_bundle: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One run with everything, one prompt a batch."""
    path = tmp_path_factory.mktemp("levels") / "store.duckdb"
    options = TraceOptions(level="probs", norms=True, max_new_tokens=4, tokens_per_batch=1)
    trace_prompts(tiny_bundle, prompts, path, "all", options)
    return Store(path)


@pytest.fixture(scope="module")
def replayed(tiny_bundle: Any, recorded: Store) -> list[Any]:
    """The same tokens once more through the model, one forward a prompt."""
    found = []
    tokens = recorded.query("SELECT * FROM tokens WHERE is_routed ORDER BY prompt_id, position")
    for _, rows in tokens.groupby("prompt_id"):
        ids = torch.tensor([rows["token_id"].tolist()])
        with record(tiny_bundle.model, norms=True) as trace, torch.inference_mode():
            tiny_bundle.model(input_ids=ids)
        found.append(trace)
    return found


def test_the_run_adds_up_and_says_what_it_holds(recorded: Store) -> None:
    assert verify_run(recorded, "all") == []
    info = recorded.run("all")
    assert info.record_level == "probs"
    assert info.manifest["arguments"]["norms"] is True
    assert info.manifest["easyep_missing"] == []


def test_probabilities_are_those_of_the_logits(recorded: Store, replayed: list[Any]) -> None:
    rows = recorded.query("SELECT * FROM router_probs ORDER BY prompt_id, layer, position")
    for (prompt, layer), group in rows.groupby(["prompt_id", "layer"]):
        probs = np.stack(group["probs"].tolist())
        expected = torch.softmax(replayed[prompt][layer].logits, dim=-1).numpy()
        np.testing.assert_allclose(probs, expected, atol=1e-5)
        np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    routed = recorded.query("SELECT count(*) AS n FROM tokens WHERE is_routed")["n"].item()
    assert len(rows) == routed * 3


def test_sums_of_norms_are_those_of_the_tokens(recorded: Store, replayed: list[Any]) -> None:
    """Each column by its formula, from the norms of single slots."""
    rows = recorded.query(
        "SELECT prompt_id, layer, expert, sum(num_tokens) AS n, sum(norm_sum) AS norm_sum, "
        "sum(weighted_norm_sum) AS weighted_norm_sum, sum(easyep_sum) AS easyep_sum, "
        "max(max_abs) AS max_abs FROM usage GROUP BY ALL ORDER BY ALL"
    )
    for prompt, layer, expert, n, norm, weighted, easyep, largest in rows.itertuples(index=False):
        seen = replayed[prompt][layer]
        slots = seen.expert_ids == expert
        norms = torch.where(slots, seen.norms.output_norm, 0)
        assert n == int(slots.sum())
        assert norm == pytest.approx(float(norms.sum()), rel=1e-3, abs=1e-4)
        assert weighted == pytest.approx(float((norms * seen.weights).sum()), rel=1e-3, abs=1e-4)
        turned = norms * seen.weights * seen.norms.residual_change[:, None]
        assert easyep == pytest.approx(float(turned.sum()), rel=1e-3, abs=1e-4)
        biggest = torch.where(slots, seen.norms.max_abs, 0).max()
        assert largest == pytest.approx(float(biggest), rel=1e-3, abs=1e-4)


def test_without_norms_the_columns_are_empty(
    tiny_bundle: Any, prompts: Any, tmp_path: Path
) -> None:
    trace_prompts(tiny_bundle, prompts, tmp_path / "s.duckdb", "plain")
    store = Store(tmp_path / "s.duckdb")
    filled = store.query(f"SELECT {', '.join(f'count({name})' for name in SUMS)} FROM usage")
    assert filled.to_numpy().sum() == 0
    assert store.query("SELECT count(*) AS n FROM router_probs")["n"].item() == 0
    assert store.run("plain").record_level == "topk"


def test_norms_go_with_level_usage(tiny_bundle: Any, prompts: Any, tmp_path: Path) -> None:
    options = TraceOptions(level="usage", norms=True)
    trace_prompts(tiny_bundle, prompts, tmp_path / "s.duckdb", "sums", options)
    store = Store(tmp_path / "s.duckdb")
    assert verify_run(store, "sums") == []
    used = store.query("SELECT sum(norm_sum) AS n, count(easyep_sum) AS e FROM usage")
    assert used["n"].item() > 0 and used["e"].item() > 0


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama4", TraceOptions(norms=True), "norms cannot be measured on layer .* Llama4"),
        ("switch_transformers", TraceOptions(), "encoder-decoder model"),
    ],
)
def test_what_cannot_be_recorded_is_said_before_anything_runs(
    byte_tokenizer: Any, prompts: Any, tmp_path: Path, family: str, options: TraceOptions,
    words: str,
) -> None:  # fmt: skip
    model: Any = zoo_model(family).model
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    bundle = ModelBundle(model, byte_tokenizer, "tiny", None, family)
    with pytest.raises(ModelInputError, match=words):
        trace_prompts(bundle, prompts, tmp_path / "s.duckdb", "no", options)
    assert not ran and not (tmp_path / "s.duckdb").exists()


def test_ranks_follow_the_biased_score(
    byte_tokenizer: Any, prompts: Any, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    """With a selection bias rank 0 is what the bias put first, not the largest weight."""
    model: Any = zoo_model("deepseek_v3").model
    if model.config.vocab_size < 300:
        model.resize_token_embeddings(300)
    model.generation_config.eos_token_id = 256
    bundle = ModelBundle(model, byte_tokenizer, "tiny", None, "deepseek_v3")
    trace_prompts(bundle, prompts, tmp_path / "s.duckdb", "biased")
    store = Store(tmp_path / "s.duckdb")
    assert verify_run(store, "biased") == []
    rows = store.query(
        "SELECT r.*, t.token_id FROM routing r JOIN tokens t USING (prompt_id, position) "
        "WHERE prompt_id = 1 ORDER BY layer, position, rank"
    )
    ids = store.query(
        "SELECT token_id FROM tokens WHERE prompt_id = 1 AND is_routed ORDER BY position"
    )["token_id"].tolist()
    with record(model) as trace, torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    unlike = 0
    for layer, group in rows.groupby("layer"):
        seen = trace[layer]
        assert seen.bias is not None
        biased = torch.sigmoid(seen.logits.float()) + seen.bias
        for position, slots in group.groupby("position"):
            scores = [float(biased[position, expert]) for expert in slots["expert"]]
            assert scores == sorted(scores, reverse=True)
            weights = slots["weight"].tolist()
            unlike += weights != sorted(weights, reverse=True)
    assert unlike > 0
