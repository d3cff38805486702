"""Real routing of DeepSeek-V2-Lite against the published and independently computed values.

The data (deepseek-ai/ESFT, MIT) lies beside a developer's checkout: one file per router, one line
per sequence, expert ids of all tokens, then their weights; 64 experts, 6 per token.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moescope.probe.analysis import (
    Filters,
    delta_experts,
    expert_contrast,
    expert_load,
    expert_specialization,
    load_balance,
)
from moescope.probe.storage.store import Store

LAW, SUMMARY = {"domain": ["law"]}, {"domain": ["summary"]}
DATA = Path(__file__).resolve().parents[4] / "shared/data/deepseek_v2_lite_routing"


def test_published_scores_of_the_authors(real_store: Store) -> None:
    """Their scores are rounded to four digits."""
    published = json.loads((DATA / "summary" / "summary.json").read_text())
    frame = expert_load(real_store, "real", filters=Filters(fields=SUMMARY)).frame
    means = real_store.query(
        "SELECT layer, expert, sum(weight_sum) / 8479 AS mean FROM usage "
        "JOIN prompts USING (run_id, prompt_id) WHERE domain = 'summary' GROUP BY ALL"
    ).set_index(["layer", "expert"])["mean"]
    assert len(frame) == len(means) == 26 * 64
    for row in frame.to_dict("records"):
        layer, expert = str(row["layer"]), str(row["expert"])
        assert row["load"] == pytest.approx(published["token_scores"][layer][expert], abs=5.01e-5)
        mean = means[row["layer"], row["expert"]]
        assert mean == pytest.approx(published["gate_scores"][layer][expert], abs=5.01e-5)


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
