"""Real routing of DeepSeek-V2-Lite against the published and independently computed values.

The data (deepseek-ai/ESFT, MIT) lies beside a developer's checkout: one file per router, one line
per sequence, expert ids of all tokens, then their weights; 64 experts, 6 per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moescope.probe.analysis import (
    Filters,
    delta_experts,
    expert_contrast,
    expert_specialization,
    load_balance,
)
from moescope.probe.storage.locks import insert_rows, writing
from moescope.probe.storage.store import Store

EXPERTS, TOP_K, LAYERS = 64, 6, range(1, 27)
LAW, SUMMARY = {"domain": ["law"]}, {"domain": ["summary"]}


def sequences(folder: Path, layer: int) -> list[np.ndarray]:
    """The expert ids of each sequence, [tokens, 6]."""
    lines = (folder / f"expert_weights_{layer}.txt").read_text().splitlines()
    return [
        np.array(line.split("\t\t")[0].split("\t"), dtype=np.int64).reshape(-1, TOP_K)
        for line in lines
    ]


def load_run(path: Path, folders: Sequence[Path]) -> Store:
    """Both tasks as one run: a prompt per sequence, its usage per layer."""
    usage = []
    prompts: dict[int, tuple[str, int]] = {}
    for layer in LAYERS:
        prompt_id = 0
        for folder in folders:
            for ids in sequences(folder, layer):
                prompts[prompt_id] = (folder.name, len(ids))
                counts = np.bincount(ids.ravel(), minlength=EXPERTS)
                usage.append((prompt_id, layer, len(ids), counts))
                prompt_id += 1
    zeros = [[0.0] * EXPERTS] * len(usage)
    arrays = {
        "prompt_id": [row[0] for row in usage], "phase": ["prompt"] * len(usage),
        "segment": ["user"] * len(usage), "is_special": [False] * len(usage),
        "layer": [row[1] for row in usage], "kind": ["mlp"] * len(usage),
        "routed_tokens": [row[2] for row in usage],
        "num_tokens": [row[3].tolist() for row in usage],
        "weight_sum": zeros, "prob_sum": zeros,
    }  # fmt: skip
    layers = [
        {"layer": layer, "kind": "mlp", "moe_layer": layer - 1, "module": "gate",
         "num_experts": EXPERTS, "top_k": TOP_K, "num_shared_experts": 2} for layer in LAYERS
    ]  # fmt: skip
    rows = [
        {"prompt_id": prompt_id, "text": "", "rendered_text": "", "set_name": "esft",
         "domain": domain, "num_tokens": length, "num_generated": 0}
        for prompt_id, (domain, length) in prompts.items()
    ]  # fmt: skip
    with writing(path) as con:
        con.execute(
            "INSERT INTO runs (run_id, model, created_at, status, source, record_level, manifest) "
            "VALUES ('real', 'deepseek-v2-lite', now(), 'complete', 'import:esft', 'usage', '{}')"
        )
        insert_rows(con, "layers", pa.Table.from_pylist(layers), run_id="real")
        insert_rows(con, "prompts", pa.Table.from_pylist(rows), run_id="real")
        insert_rows(con, "usage_arrays", pa.table(arrays), run_id="real")
    return Store(path)


@pytest.fixture(scope="module")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    data = Path(__file__).resolve().parents[4] / "shared/data/deepseek_v2_lite_routing"
    if not data.is_dir():
        pytest.skip(f"real recorded routing is not here ({data})")
    path = tmp_path_factory.mktemp("real") / "store.duckdb"
    return load_run(path, [data / "law", data / "summary"])


def test_balance_of_file_13(real_store: Store) -> None:
    table = load_balance(real_store, "real", by="domain", filters=Filters(layers=(13,)))
    frame = table.frame.set_index("value")
    assert frame["usage_entropy"].tolist() == pytest.approx([0.946014, 0.955314], abs=5e-7)
    assert frame["gini"].tolist() == pytest.approx([0.356757, 0.334995], abs=5e-7)
    assert frame["top_expert"].tolist() == [25, 19]
    assert frame["top_expert_token_share"].tolist() == pytest.approx([0.445419, 0.218540], abs=5e-7)
    assert frame["num_tokens"].tolist() == [8_327, 8_479]
    assert frame["num_prompts"].tolist() == [33, 13]


def test_specialization_of_file_13(real_store: Store) -> None:
    filters = Filters(layers=(13,))
    table = expert_specialization(real_store, "real", by="domain", filters=filters, bootstrap=50)
    frame = table.frame.set_index(["value", "expert"])
    assert frame.at[("law", 25), "token_share"] == pytest.approx(0.445419, abs=5e-7)
    assert frame.at[("law", 25), "low"] < 0.445419 < frame.at[("law", 25), "high"]
    assert set(frame["chance"]) == {6 / 64}


def test_pooled_risk_differences(real_store: Store) -> None:
    table = expert_contrast(
        real_store, "real", a=LAW, b=SUMMARY, split=False, permutations=400, bootstrap=50
    )
    frame = table.frame
    # The published pairs are (ordinal from 0, expert); file n is layer n, ordinal n - 1.
    expected = {
        (25, 48): -0.586781, (18, 17): -0.551547, (23, 0): 0.544036, (14, 8): -0.540121,
        (25, 36): -0.529894,
    }  # fmt: skip
    found = [(row["layer"] - 1, row["expert"]) for row in frame[:5].to_dict("records")]
    assert found == list(expected)
    assert frame["risk_difference"][:5].tolist() == pytest.approx(list(expected.values()), abs=5e-7)
    assert frame["confirmed"][:5].all()
    assert frame.loc[0, ["a1", "a2"]].sum() + frame.loc[0, ["d1", "d2"]].sum() == 8_327 + 8_479


def test_mean_differences_over_sequences(real_store: Store) -> None:
    frame = expert_contrast(
        real_store, "real", a=LAW, b=SUMMARY, average="unit", split=False, permutations=400,
        bootstrap=1,
    ).frame  # fmt: skip
    expected = {
        (23, 0): 0.550818, (18, 54): 0.488436, (14, 3): 0.447563, (22, 19): 0.424262,
        (12, 25): 0.419441,
    }  # fmt: skip
    largest = frame.sort_values("risk_difference", ascending=False)[:5]
    found = [(row["layer"] - 1, row["expert"]) for row in largest.to_dict("records")]
    assert found == list(expected)
    assert largest["risk_difference"].tolist() == pytest.approx(list(expected.values()), abs=5e-7)


def test_task_experts_by_mean_rates(real_store: Store) -> None:
    table = delta_experts(real_store, "real", by="domain", reference="summary", bootstrap=50)
    largest = table.frame.iloc[0]
    assert (largest["layer"] - 1, largest["expert"]) == (23, 0)
    assert largest["delta"] == pytest.approx(0.550818, abs=5e-7)
    assert largest["surely_above"]
    assert (largest["num_prompts"], largest["num_tokens"]) == (33, 8_327)


def test_discovery_and_confirmation_on_real_routing(real_store: Store) -> None:
    table = expert_contrast(real_store, "real", a=LAW, b=SUMMARY, bootstrap=200)
    assert table.summary["rank_correlation"] > 0.9
    assert table.summary["top_overlap"] > 0.7 > table.summary["top_overlap_chance"]
    confirmed = table.frame[table.frame["confirmed"]]
    assert len(confirmed) > 20
    assert (np.sign(confirmed["effect"]) == np.sign(confirmed["risk_difference"])).all()
